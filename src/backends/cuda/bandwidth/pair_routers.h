// SPDX-License-Identifier: Apache-2.0
//
// token_rounding, expert_choice and threshold on the GPU; routers.cpp says for which problems.
#pragma once

#include "backend/ops.h"

namespace penstock::cuda {

inline constexpr int64_t kMaxPairExperts = 1024;

// Bytes of the scratch of forward; backward needs none.
int64_t pair_scratch_bytes(const RouteProblem& problem, const Context& context);

void pair_router_forward(const RouterForwardArgs& args, const Context& context);
void pair_router_backward(const RouterBackwardArgs& args, const Context& context);

}  // namespace penstock::cuda
