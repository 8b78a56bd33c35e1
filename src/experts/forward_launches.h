// SPDX-License-Identifier: Apache-2.0
//
// The launches of a checked forward pass, with adapters or without: called by forward.cpp and
// adapters_forward.cpp.
#pragma once

#include "experts/workspace_plan.h"
#include "penstock/adapters.h"

namespace penstock {

// problem: with the adapters' ranks, 0 where there is none; layout: plan_forward's of the problem.
void launch_forward(const AdaptedForwardArgs& adapted, const ExpertsProblem& problem,
                    const Backend& backend, const ForwardWorkspace& layout, const Context& context);

}  // namespace penstock
