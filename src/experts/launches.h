// SPDX-License-Identifier: Apache-2.0
//
// What the launches of both passes share: the rows, the activation, and views of row buffers.
#pragma once

#include "backend/ops.h"

namespace penstock {

inline RowGroups row_groups_of(const RoutingPlan& plan, const ExpertsProblem& problem) {
  return {plan.expert_counts, plan.expert_offsets, plan.row_to_token, plan.row_to_slot,
          problem.row_capacity};
}

inline ActivationSpec activation_of(const ExpertsConfig& config) {
  return {config.activation, config.clamp_alpha, config.clamp_limit};
}

// (R_cap, width) in the storage dtype.
inline TensorView row_view(void* data, int64_t width, const ExpertsProblem& problem) {
  return TensorView::contiguous(data, problem.dtype, {problem.row_capacity, width}, problem.device);
}

}  // namespace penstock
