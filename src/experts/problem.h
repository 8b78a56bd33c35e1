// SPDX-License-Identifier: Apache-2.0
//
// The sizes of a call, checked: every dimension in range, so that the queries and the passes agree
// on what they work on. Called by the workspace queries and by both passes.
#pragma once

#include "penstock/experts.h"

namespace penstock {

// Throws unless every size is one that the core can count and the configuration makes sense.
void check_problem(const ExpertsProblem& problem);

// Throws under SavePolicy::nothing, which leaves no input for a backward pass.
void check_backward_possible(const ExpertsConfig& config);

}  // namespace penstock
