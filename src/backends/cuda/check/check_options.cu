// SPDX-License-Identifier: Apache-2.0
//
// What callers may vary without changing a bit: rows already dispatched, a budget of
// multiprocessors; and what must be left alone: frozen experts, everything where nobody is routed.
#include "backends/cuda/check/checks.h"

namespace penstock::cuda::check {
namespace {

using Element = __nv_bfloat16;

template <typename T>
std::vector<uint8_t> bits(const DeviceArray<T>& array) {
  require(cudaDeviceSynchronize(), "option check");
  std::vector<uint8_t> copy(static_cast<size_t>(array.count()) * sizeof(T));
  if (!copy.empty())
    require(cudaMemcpy(copy.data(), array.data(), copy.size(), cudaMemcpyDeviceToHost), "copy");
  return copy;
}

__global__ void gather(const Element* source, const int32_t* map, int64_t rows, int64_t columns,
                       Element* out) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < rows * columns;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int32_t token = map[i / columns];
    if (token >= 0) out[i] = source[token * columns + i % columns];
  }
}

void forward_and_dw1(Layer<Element>& layer, const UpProjectionArgs& up,
                     const WeightGradientArgs& dw1, const Context& context) {
  layer.h.poison();
  layer.a.poison();
  layer.dw1.poison();
  launch_up_projection(up, context);
  launch_weight_gradient(dw1, context);
}

void dispatched_rows(Report& report, Layer<Element>& layer) {
  launch_up_projection(layer.up_args(), {});
  launch_down_backward(layer.down_backward_args(), {});
  forward_and_dw1(layer, layer.up_args(), layer.dw1_args(), {});
  const auto h = bits(layer.h), a = bits(layer.a), dw1 = bits(layer.dw1);

  DeviceArray<Element> x_rows(layer.rows * layer.shape.d);
  gather<<<256, 128>>>(layer.x.data(), layer.row_to_token.data(), layer.rows, layer.shape.d,
                       x_rows.data());
  UpProjectionArgs up = layer.up_args();
  up.rows.row_to_token = {};
  up.x = layer.view(x_rows.data(), DType::bfloat16, layer.rows, layer.shape.d);
  WeightGradientArgs direct = layer.dw1_args();
  direct.rows.row_to_token = {};
  direct.right = up.x;
  direct.right_access = RowAccess::direct;
  forward_and_dw1(layer, up, direct, {});
  if (h != bits(layer.h) || a != bits(layer.a)) report.fail("options", "dispatched", "H or A");
  if (dw1 != bits(layer.dw1)) report.fail("options", "dispatched", "dW1");

  Context few;
  few.sm_budget = 7;
  forward_and_dw1(layer, layer.up_args(), layer.dw1_args(), few);
  if (h != bits(layer.h) || a != bits(layer.a) || dw1 != bits(layer.dw1))
    report.fail("options", "7 multiprocessors", "different bits");
}

// Scores absent are ones; partials absent change nothing else.
void absent_tensors(Report& report, Layer<Element>& layer) {
  ones<<<64, 128>>>(layer.scores.data(), layer.scores.count());
  launch_up_projection(layer.up_args(), {});
  launch_down_backward(layer.down_backward_args(), {});
  const auto dh = bits(layer.dh), scaled = bits(layer.a_scaled);
  DownBackwardArgs args = layer.down_backward_args();
  args.scores = {};
  args.partials = {};
  layer.dh.poison();
  launch_down_backward(args, {});
  if (dh != bits(layer.dh) || scaled != bits(layer.a_scaled))
    report.fail("options", "absent scores", "different bits");
  const auto a = bits(layer.a);
  UpProjectionArgs only_a = layer.up_args();
  only_a.h = {};
  layer.a.poison();
  launch_up_projection(only_a, {});
  if (a != bits(layer.a)) report.fail("options", "absent H", "different A");
}

void frozen_experts(Report& report, Layer<Element>& layer) {
  layer.dw1.poison();
  launch_weight_gradient(layer.dw1_args(), {});
  const auto all = bits(layer.dw1);
  std::vector<uint8_t> mask;
  for (int64_t e = 0; e < layer.shape.experts; ++e) mask.push_back(e % 3 == 0 ? 0 : 1);
  DeviceArray<uint8_t> trainable(mask);
  WeightGradientArgs args = layer.dw1_args();
  args.trainable = TensorView::contiguous(trainable.data(), DType::uint8, {trainable.count()});
  layer.dw1.poison();
  launch_weight_gradient(args, {});
  const auto some = bits(layer.dw1);
  const size_t slice = all.size() / mask.size();
  for (size_t e = 0; e < mask.size(); ++e) {
    for (size_t i = e * slice; i < (e + 1) * slice; ++i) {
      if (some[i] == (mask[e] == 0 ? 0xff : all[i])) continue;
      return report.fail("options", "frozen", "expert " + std::to_string(e));
    }
  }
}

// Nobody is routed anywhere: rows stay poison, gradients are zeros, accumulators stay.
void no_rows(Report& report, Layer<Element>& layer) {
  DeviceArray<int32_t> counts(layer.shape.experts), offsets(layer.shape.experts + 1);
  counts.zero();
  offsets.zero();
  UpProjectionArgs up = layer.up_args();
  up.rows.expert_counts = layer.ints(counts);
  up.rows.expert_offsets = layer.ints(offsets);
  WeightGradientArgs dw1 = layer.dw1_args();
  dw1.rows = up.rows;
  forward_and_dw1(layer, up, dw1, {});
  for (const uint8_t byte : bits(layer.h))
    if (byte != 0xff) return report.fail("options", "no rows", "H was written");
  for (const uint8_t byte : bits(layer.dw1))
    if (byte != 0) return report.fail("options", "no rows", "dW1 is not zero");
  layer.dw1.poison();
  dw1.mode = GradMode::accumulate;
  launch_weight_gradient(dw1, {});
  for (const uint8_t byte : bits(layer.dw1))
    if (byte != 0xff) return report.fail("options", "no rows", "the accumulator was touched");
}

}  // namespace

void check_options(Report& report) {
  try {
    Layer<Element> layer({200, 136, 200, 10, 3}, {}, 31);
    dispatched_rows(report, layer);
    absent_tensors(report, layer);
    frozen_experts(report, layer);
    no_rows(report, layer);
    Layer<Element> swapped({200, 136, 200, 10, 3}, {.layout = Layout::input_major}, 32);
    dispatched_rows(report, swapped);
  } catch (const Error& error) {
    report.fail("error", "options", error.what());
  }
}

}  // namespace penstock::cuda::check
