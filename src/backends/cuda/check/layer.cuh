// SPDX-License-Identifier: Apache-2.0
//
// One MoE layer's tensors on the device, for checking and for timing: weights in any layout, a
// routing made on the host with gaps after every expert, and the op structs over them.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>

#include "backends/cuda/check/device_array.cuh"
#include "backends/cuda/gemm/gemm_ops.h"

namespace penstock::cuda::check {

enum class Load : uint8_t { uniform, skewed, one_expert };
enum class Layout : uint8_t { concatenated, interleaved, separate, input_major };

struct LayerShape {
  int64_t tokens, d, n, experts, top_k;
  Load load = Load::uniform;
  int64_t gap = 3;  // unused rows after every expert
};

struct Variant {
  Activation activation = Activation::swiglu;
  Layout layout = Layout::concatenated;
  bool bias = false;
  GradMode mode = GradMode::overwrite;
  bool fp32_gradients = false;
  Values values = Values::random;
};

struct HostPlan {
  std::vector<int32_t> counts, offsets, row_to_token, row_to_slot, expert_of_row;
};

inline HostPlan make_plan(const LayerShape& s, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::vector<int32_t>> slots(static_cast<size_t>(s.experts));
  std::vector<int32_t> order(static_cast<size_t>(s.experts));
  std::iota(order.begin(), order.end(), 0);
  for (int64_t t = 0; t < s.tokens; ++t) {
    for (int64_t k = 0; k < s.top_k; ++k) {
      // A partial shuffle draws K distinct experts; skewed draws only odd ids where it can.
      std::swap(order[k], order[k + random() % (s.experts - k)]);
      int32_t expert = order[k];
      if (s.load == Load::skewed && s.top_k == 1) expert = expert | 1;
      if (s.load == Load::skewed && expert >= s.experts) expert = 1;
      if (s.load == Load::one_expert)
        expert = static_cast<int32_t>((s.experts / 2 + k) % s.experts);
      slots[static_cast<size_t>(expert)].push_back(static_cast<int32_t>(t * s.top_k + k));
    }
  }
  HostPlan plan;
  for (size_t e = 0; e < slots.size(); ++e) {
    plan.offsets.push_back(static_cast<int32_t>(plan.row_to_token.size()));
    plan.counts.push_back(static_cast<int32_t>(slots[e].size()));
    for (const int32_t slot : slots[e]) {
      plan.row_to_token.push_back(static_cast<int32_t>(slot / s.top_k));
      plan.row_to_slot.push_back(slot);
      plan.expert_of_row.push_back(static_cast<int32_t>(e));
    }
    for (int64_t g = 0; g < s.gap; ++g) {
      plan.row_to_token.push_back(-1);
      plan.row_to_slot.push_back(-1);
      plan.expert_of_row.push_back(-1);
    }
  }
  plan.offsets.push_back(static_cast<int32_t>(plan.row_to_token.size()));
  return plan;
}

template <typename E>
struct Layer {
  LayerShape shape;
  Variant variant;
  HostPlan host;
  int64_t rows, halves, h_size, num_partials;
  DeviceArray<int32_t> counts, offsets, row_to_token, row_to_slot, expert_of_row;
  DeviceArray<E> x, d_output, w1, w1_up, w2, b1, b1_up, b2, h, a, y, dh, a_scaled, dx_rows;
  DeviceArray<float> scores, partials;
  DeviceArray<E> dw1, dw1_up, dw2;            // gradients in the storage type
  DeviceArray<float> dw1_f, dw1_up_f, dw2_f;  // or in fp32

  static constexpr DType kDType =
      std::is_same_v<E, __nv_bfloat16> ? DType::bfloat16 : DType::float16;

  Layer(const LayerShape& s, const Variant& v, uint64_t seed)
      : shape(s),
        variant(v),
        host(make_plan(s, seed)),
        rows(static_cast<int64_t>(host.row_to_token.size())),
        halves(is_gated(v.activation) ? 2 : 1),
        h_size(halves * s.n),
        num_partials(score_partials(problem())),
        counts(host.counts),
        offsets(host.offsets),
        row_to_token(host.row_to_token),
        row_to_slot(host.row_to_slot),
        expert_of_row(host.expert_of_row),
        x(s.tokens * s.d),
        d_output(s.tokens * s.d),
        w1(s.experts * s.d * (separate() ? s.n : h_size)),
        w1_up(separate() ? s.experts * s.d * s.n : 0),
        w2(s.experts * s.d * s.n),
        b1(s.experts * (separate() ? s.n : h_size)),
        b1_up(separate() ? s.experts * s.n : 0),
        b2(s.experts * s.d),
        h(rows * h_size),
        a(rows * s.n),
        y(rows * s.d),
        dh(rows * h_size),
        a_scaled(rows * s.n),
        dx_rows(rows * s.d),
        scores(s.tokens * s.top_k),
        partials(rows * num_partials),
        dw1(v.fp32_gradients ? 0 : w1.count()),
        dw1_up(v.fp32_gradients ? 0 : w1_up.count()),
        dw2(v.fp32_gradients ? 0 : w2.count()),
        dw1_f(v.fp32_gradients ? w1.count() : 0),
        dw1_up_f(v.fp32_gradients ? w1_up.count() : 0),
        dw2_f(v.fp32_gradients ? w2.count() : 0) {
    const auto w_scale = [](int64_t k) { return 1.0f / std::sqrt(static_cast<float>(k)); };
    x.randomise(seed + 1, 1.0f, v.values);
    d_output.randomise(seed + 2, 1.0f, v.values);
    w1.randomise(seed + 3, w_scale(s.d), v.values);
    w1_up.randomise(seed + 4, w_scale(s.d), v.values);
    w2.randomise(seed + 5, w_scale(s.n), v.values);
    b1.randomise(seed + 6, 0.5f, v.values);
    b1_up.randomise(seed + 7, 0.5f, v.values);
    b2.randomise(seed + 8, 0.5f, v.values);
    scores.randomise(seed + 9, 0.5f, v.values);
  }

  bool separate() const { return variant.layout == Layout::separate && halves == 2; }
  bool input_major() const { return variant.layout == Layout::input_major; }

  ExpertsProblem problem() const {
    ExpertsProblem p;
    p.config.activation = variant.activation;
    p.num_tokens = shape.tokens;
    p.hidden_size = shape.d;
    p.intermediate_size = shape.n;
    p.num_experts = shape.experts;
    p.num_slots = shape.tokens * shape.top_k;
    p.row_capacity = rows;
    p.dtype = kDType;
    return p;
  }

  TensorView view(void* data, DType dtype, int64_t r, int64_t c) const {
    return TensorView::contiguous(data, dtype, {r, c}, {DeviceType::cuda, 0});
  }
  TensorView ints(const DeviceArray<int32_t>& array) const {
    return TensorView::contiguous(array.data(), DType::int32, {array.count()},
                                  {DeviceType::cuda, 0});
  }

  RowGroups groups() const {
    RowGroups g;
    g.expert_counts = ints(counts);
    g.expert_offsets = ints(offsets);
    g.row_to_token = ints(row_to_token);
    g.row_to_slot = ints(row_to_slot);
    g.row_capacity = rows;
    return g;
  }

  // Either half of a tensor shaped like W1 that lies at `base` (and `up` where separate).
  template <typename P>
  GroupedMatrix w1_half(P* base, P* up, DType dtype, int64_t half) const {
    const int64_t d = shape.d, n = shape.n;
    switch (variant.layout) {
      case Layout::concatenated:
        return {base + half * n * d, dtype, h_size * d, d, 1};
      case Layout::interleaved:
        return {base + half * d, dtype, h_size * d, d * halves, 1};
      case Layout::separate:
        return {half == 0 ? base : up, dtype, n * d, d, 1};
      case Layout::input_major:
        return {base + half * n, dtype, h_size * d, 1, h_size};
    }
    return {};
  }
  template <typename P>
  GroupedMatrix w2_matrix(P* base, DType dtype) const {
    const int64_t d = shape.d, n = shape.n;
    if (input_major()) return {base, dtype, n * d, 1, d};
    return {base, dtype, n * d, n, 1};
  }

  UpWeights up_weights() const {
    UpWeights w;
    w.halves = static_cast<int32_t>(halves);
    for (int64_t half = 0; half < halves; ++half) {
      w.w[half] = w1_half(w1.data(), w1_up.data(), kDType, half);
      if (!variant.bias) continue;
      if (separate()) {
        w.b[half] = {half == 0 ? b1.data() : b1_up.data(), kDType, shape.n, 1};
      } else if (variant.layout == Layout::interleaved) {
        w.b[half] = {b1.data() + half, kDType, h_size, halves};
      } else {
        w.b[half] = {b1.data() + half * shape.n, kDType, h_size, 1};
      }
    }
    return w;
  }
  DownWeights down_weights() const {
    DownWeights w;
    w.w = w2_matrix(w2.data(), kDType);
    if (variant.bias) w.b = {b2.data(), kDType, shape.d, 1};
    return w;
  }

  UpProjectionArgs up_args() const {
    return {groups(),
            {variant.activation},
            view(x.data(), kDType, shape.tokens, shape.d),
            up_weights(),
            view(h.data(), kDType, rows, h_size),
            view(a.data(), kDType, rows, shape.n),
            {}};
  }
  DownProjectionArgs down_args() const {
    return {groups(),
            view(a.data(), kDType, rows, shape.n),
            down_weights(),
            view(y.data(), kDType, rows, shape.d),
            {}};
  }
  DownBackwardArgs down_backward_args() const {
    return {groups(),
            {variant.activation},
            view(d_output.data(), kDType, shape.tokens, shape.d),
            down_weights(),
            TensorView::contiguous(scores.data(), DType::float32, {scores.count()}),
            view(h.data(), kDType, rows, h_size),
            view(dh.data(), kDType, rows, h_size),
            view(a_scaled.data(), kDType, rows, shape.n),
            view(partials.data(), DType::float32, rows, num_partials),
            {}};
  }
  UpBackwardArgs up_backward_args() const {
    return {groups(),
            view(dh.data(), kDType, rows, h_size),
            up_weights(),
            view(dx_rows.data(), kDType, rows, shape.d),
            {}};
  }
  WeightGradientArgs dw1_args() const {
    WeightGradientArgs args = gradient(view(dh.data(), kDType, rows, h_size),
                                       view(x.data(), kDType, shape.tokens, shape.d));
    args.left_access = RowAccess::direct;
    args.right_access = RowAccess::gathered;
    args.halves = static_cast<int32_t>(halves);
    for (int64_t half = 0; half < halves; ++half) {
      args.out[half] = variant.fp32_gradients
                           ? w1_half(dw1_f.data(), dw1_up_f.data(), DType::float32, half)
                           : w1_half(dw1.data(), dw1_up.data(), kDType, half);
    }
    return args;
  }
  WeightGradientArgs dw2_args() const {
    WeightGradientArgs args = gradient(view(d_output.data(), kDType, shape.tokens, shape.d),
                                       view(a_scaled.data(), kDType, rows, shape.n));
    args.left_access = RowAccess::gathered;
    args.right_access = RowAccess::direct;
    args.out[0] = variant.fp32_gradients ? w2_matrix(dw2_f.data(), DType::float32)
                                         : w2_matrix(dw2.data(), kDType);
    return args;
  }

 private:
  WeightGradientArgs gradient(TensorView left, TensorView right) const {
    WeightGradientArgs args = {};
    args.rows = groups();
    args.left = left;
    args.right = right;
    args.mode = variant.mode;
    return args;
  }
};

}  // namespace penstock::cuda::check
