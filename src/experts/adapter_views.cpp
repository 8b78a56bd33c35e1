// SPDX-License-Identifier: Apache-2.0
//
// See adapter_views.h.
#include "experts/adapter_views.h"

#include <utility>

#include "experts/weight_views.h"

namespace penstock {

GroupedMatrix factor_of(const TensorView& view) {
  if (!view.present()) return {};
  return {view.data, view.dtype, view.stride(0), view.stride(1), view.stride(2)};
}

GroupedMatrix transposed(const GroupedMatrix& matrix) {
  GroupedMatrix result = matrix;
  std::swap(result.row_stride, result.col_stride);
  return result;
}

UpWeights single(const GroupedMatrix& matrix) {
  UpWeights weights;
  weights.w[0] = matrix;
  return weights;
}

UpWeights halves_of(const TensorView& up_b, const ExpertsConfig& config) {
  ExpertsConfig output_major = config;
  output_major.weight_order = WeightOrder::output_major;
  ExpertWeights weights;
  weights.w1 = up_b;
  return up_weights_of(weights, output_major);
}

}  // namespace penstock
