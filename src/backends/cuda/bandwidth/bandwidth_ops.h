// SPDX-License-Identifier: Apache-2.0
//
// The operations that move bytes rather than multiply: routing, plan, combine, small gradients.
// The backend's table points at these.
#pragma once

#include "backend/ops.h"

namespace penstock::cuda {

void router_forward(const RouterForwardArgs& args, const Context& context);
void router_backward(const RouterBackwardArgs& args, const Context& context);

int64_t plan_scratch_bytes(int64_t num_slots, int64_t num_experts, const Context& context);
void build_plan(const PlanArgs& args, const Context& context);

void combine(const CombineArgs& args, const Context& context);
void scale_rows(const ScaleRowsArgs& args, const Context& context);
void score_gradient(const ScoreGradientArgs& args, const Context& context);
void bias_gradient(const BiasGradientArgs& args, const Context& context);

inline constexpr int64_t kMaxExperts = 8192;
inline constexpr int64_t kMaxTopK = 64;

}  // namespace penstock::cuda
