// SPDX-License-Identifier: Apache-2.0
//
// See weight_views.h.
#include "experts/weight_views.h"

namespace penstock {
namespace {

void* advanced(const TensorView& view, int64_t elements) {
  return view.as<char>() + elements * size_of(view.dtype);
}

template <typename Grouped>
void advance(Grouped& part, int64_t elements) {
  if (part.present()) part.data = static_cast<char*>(part.data) + elements * size_of(part.dtype);
}

// (E, rows, cols) output_major, (E, cols, rows) input_major.
GroupedMatrix matrix_of(const TensorView& view, WeightOrder order) {
  if (!view.present()) return {};
  const int32_t row_axis = order == WeightOrder::output_major ? 1 : 2;
  return {view.data, view.dtype, view.stride(0), view.stride(row_axis), view.stride(3 - row_axis)};
}

GroupedVector vector_of(const TensorView& view) {
  if (!view.present()) return {};
  return {view.data, view.dtype, view.stride(0), view.stride(1)};
}

// The two halves of an axis that holds gate and up: where up starts, and the step within a half.
struct HalfSplit {
  int64_t up_start = 0;
  int64_t step = 1;
};

HalfSplit split_of(GateLayout layout, int64_t length) {
  if (layout == GateLayout::interleaved) return {1, 2};
  return {length / 2, 1};
}

}  // namespace

UpWeights up_weights_of(const ExpertWeights& weights, const ExpertsConfig& config) {
  UpWeights up;
  up.halves = static_cast<int32_t>(config.halves());
  up.w[0] = matrix_of(weights.w1, config.weight_order);
  up.b[0] = vector_of(weights.b1);
  if (!is_gated(config.activation)) return up;
  if (weights.w1_up.present() || weights.b1_up.present()) {
    up.w[1] = matrix_of(weights.w1_up, config.weight_order);
    up.b[1] = vector_of(weights.b1_up);
    return up;
  }
  if (weights.w1.present()) {
    const int32_t row_axis = config.weight_order == WeightOrder::output_major ? 1 : 2;
    const HalfSplit split = split_of(config.gate_layout, weights.w1.size(row_axis));
    up.w[1] = up.w[0];
    up.w[1].data = advanced(weights.w1, split.up_start * up.w[0].row_stride);
    for (GroupedMatrix& half : up.w) half.row_stride *= split.step;
  }
  if (weights.b1.present()) {
    const HalfSplit split = split_of(config.gate_layout, weights.b1.size(1));
    up.b[1] = up.b[0];
    up.b[1].data = advanced(weights.b1, split.up_start * up.b[0].stride);
    for (GroupedVector& half : up.b) half.stride *= split.step;
  }
  return up;
}

DownWeights down_weights_of(const ExpertWeights& weights, const ExpertsConfig& config) {
  return {matrix_of(weights.w2, config.weight_order), vector_of(weights.b2)};
}

TensorView columns_of(const TensorView& rows, const HiddenColumns& columns) {
  TensorView some = rows;
  some.data = advanced(rows, columns.first * rows.stride(1));
  some.shape[1] = columns.count;
  return some;
}

UpWeights columns_of(UpWeights weights, const HiddenColumns& columns) {
  for (GroupedMatrix& half : weights.w) advance(half, columns.first * half.col_stride);
  return weights;
}

DownWeights columns_of(DownWeights weights, const HiddenColumns& columns) {
  advance(weights.w, columns.first * weights.w.row_stride);
  advance(weights.b, columns.first * weights.b.stride);
  return weights;
}

}  // namespace penstock
