// SPDX-License-Identifier: Apache-2.0
//
// What a call with adapters checks besides what experts_forward and experts_backward check, and the
// problem that it then is.
#pragma once

#include "penstock/adapters.h"

namespace penstock {

// Throws Error(invalid_argument) unless ranks are in range.
void check_ranks(const AdaptedProblem& problem);
AdaptedProblem adapted_problem_of(ExpertsProblem experts, const ExpertAdapters& adapters);
void check_adapters(const ExpertAdapters& adapters, const AdaptedProblem& problem);
void check_adapter_rows(const AdapterRows& rows, const AdaptedProblem& problem);
void check_adapter_grads(const ExpertAdapters& grads, const ExpertAdapters& adapters,
                         const AdaptedProblem& problem);

// What backends are asked, and workspaces planned for: the ranks, and what these passes hold to.
ExpertsProblem with_ranks(const AdaptedProblem& problem);

}  // namespace penstock
