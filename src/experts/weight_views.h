// SPDX-License-Identifier: Apache-2.0
//
// The caller's weights (and their gradients) as the strided forms that backends read: both gate
// layouts, both weight orders, gate and up in one tensor or two, without a copy. Shapes have been
// checked by validate.h. An absent tensor gives absent (null) parts.
#pragma once

#include "backend/ops.h"

namespace penstock {

UpWeights up_weights_of(const ExpertWeights& weights, const ExpertsConfig& config);
DownWeights down_weights_of(const ExpertWeights& weights, const ExpertsConfig& config);

}  // namespace penstock
