// SPDX-License-Identifier: Apache-2.0
//
// The caller's weights (and their gradients) as the strided forms that backends read: both gate
// layouts, both weight orders, gate and up in one tensor or two, without a copy; and blocks of
// their columns. Shapes have been checked by validate.h. An absent tensor gives absent (null)
// parts.
#pragma once

#include "backend/ops.h"

namespace penstock {

UpWeights up_weights_of(const ExpertWeights& weights, const ExpertsConfig& config);
DownWeights down_weights_of(const ExpertWeights& weights, const ExpertsConfig& config);

// Some of the columns of the hidden axis (d).
struct HiddenColumns {
  int64_t first = 0;
  int64_t count = 0;
};

// These columns alone, of rows (.., d), of W1 and of W2 with b2.
TensorView columns_of(const TensorView& rows, const HiddenColumns& columns);
UpWeights columns_of(UpWeights weights, const HiddenColumns& columns);
DownWeights columns_of(DownWeights weights, const HiddenColumns& columns);

}  // namespace penstock
