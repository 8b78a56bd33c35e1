// SPDX-License-Identifier: Apache-2.0
//
// Every check of a call's tensors, made before anything is launched or written, so that backends
// check nothing again. Throws Error(invalid_argument). The elements of tensors are not read, except
// the counts and offsets of dispatched rows on the CPU (E values, which address memory).
#pragma once

#include "experts/workspace_plan.h"
#include "penstock/experts.h"

namespace penstock {

void check_forward(const ExpertsForwardArgs& args, const ExpertsProblem& problem);
void check_backward(const ExpertsBackwardArgs& args, const ExpertsProblem& problem,
                    BackwardPass pass);

// No output shares memory with another argument. `workspace_bytes` of the workspace count.
void check_aliases(const ExpertsForwardArgs& args, int64_t workspace_bytes);
void check_aliases(const ExpertsBackwardArgs& args, int64_t workspace_bytes, BackwardPass pass);

}  // namespace penstock
