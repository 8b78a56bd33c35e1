// SPDX-License-Identifier: Apache-2.0
//
// Launches 3 and 8: O_t = sum over the slots of t, in slot order, of S_slot * Y_row, and the same
// without scores for dX. One thread owns eight columns of one token, so the order of the sum is
// the slot order whatever the launch looks like. Bound by memory: reads R d, writes T d elements.
#include "backends/cuda/arch/launch.cuh"
#include "backends/cuda/bandwidth/bandwidth_ops.h"
#include "backends/cuda/bandwidth/combine.cuh"
#include "backends/cuda/bandwidth/elements.cuh"
#include "backends/cuda/launch.h"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 8;  // rows loaded before the first is used

template <typename T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const CombineParams params) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = index / params.vectors;
  const int64_t column = (index - token * params.vectors) * kVector;
  if (token >= params.num_tokens) return;

  int64_t slot = token * params.top_k;
  int64_t end = slot + params.top_k;
  if (params.token_offsets != nullptr) {
    slot = params.token_offsets[token];
    end = params.token_offsets[token + 1];
  }
  const T* rows = static_cast<const T*>(params.rows) + column;
  Float8 sum = {};
  for (; slot < end; slot += kInFlight) {
    uint4 values[kInFlight];
    float weights[kInFlight];
    bool live[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int32_t row = slot + i < end ? params.slot_to_row[slot + i] : -1;
      live[i] = row >= 0;
      weights[i] = 1.0f;
      if (live[i]) {
        values[i] = load_streaming(rows + row * params.row_stride);
        if (params.scores != nullptr) weights[i] = params.scores[slot + i];
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!live[i]) continue;
      const Float8 value = widen<T>(values[i]);
#pragma unroll
      for (int c = 0; c < kVector; ++c) sum.v[c] = fmaf(weights[i], value.v[c], sum.v[c]);
    }
  }
  T* output = static_cast<T*>(params.output) + token * params.output_stride + column;
  *reinterpret_cast<uint4*>(output) = narrow<T>(sum);
}

struct ScaleParams {
  const void* input;
  int64_t input_stride;
  const float* scores;  // null: 1
  void* output;
  int64_t output_stride;
  const int32_t* expert_counts;
  const int32_t* expert_offsets;
  int32_t vectors;
};

// Blocks of an expert (blockIdx.y) walk its rows; gaps between experts are not touched.
template <typename T>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(const ScaleParams params) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const int32_t first = params.expert_offsets[blockIdx.y];
  const int64_t count = static_cast<int64_t>(params.expert_counts[blockIdx.y]) * params.vectors;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = first + i / params.vectors;
    const int64_t column = (i % params.vectors) * kVector;
    const T* source = static_cast<const T*>(params.input) + row * params.input_stride + column;
    Float8 value = widen<T>(load_streaming(source));
    const float score = params.scores == nullptr ? 1.0f : params.scores[row];
#pragma unroll
    for (int c = 0; c < kVector; ++c) value.v[c] *= score;
    T* target = static_cast<T*>(params.output) + row * params.output_stride + column;
    *reinterpret_cast<uint4*>(target) = narrow<T>(value);
  }
}

}  // namespace

void combine(const CombineArgs& args, const Context& context) {
  check_clean_device("combine");
  const CombineParams params = combine_params(args);
  if (params.num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_tokens * params.vectors, kThreads));
  visit_storage(args.output.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_dependent({"combine_kernel", dim3(blocks), kThreads}, context, combine_kernel<T>,
                     params);
  });
}

void scale_rows(const ScaleRowsArgs& args, const Context& context) {
  check_clean_device("scale_rows");
  const int64_t num_experts = args.rows.num_experts();
  if (args.rows.row_capacity == 0 || num_experts == 0) return;
  ScaleParams params;
  params.input = args.input.data;
  params.input_stride = args.input.stride(0);
  params.scores = args.scores.as<float>();
  params.output = args.output.data;
  params.output_stride = args.output.stride(0);
  params.expert_counts = args.rows.expert_counts.as<int32_t>();
  params.expert_offsets = args.rows.expert_offsets.as<int32_t>();
  params.vectors = static_cast<int32_t>(args.output.size(1) / kVector);
  constexpr unsigned kBlocksPerExpert = 16;
  const dim3 grid(kBlocksPerExpert, static_cast<unsigned>(num_experts));
  visit_storage(args.output.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_dependent({"scale_rows_kernel", grid, kThreads}, context, scale_rows_kernel<T>, params);
  });
}

}  // namespace penstock::cuda
