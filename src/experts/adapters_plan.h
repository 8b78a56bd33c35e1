// SPDX-License-Identifier: Apache-2.0
//
// What the two passes of adapted experts share: checks of the adapters, where temporaries live, and
// the adapters as the strided matrices and terms that backends read.
//
//   U1_r = X_t A1_e^T      U2_r = A_r A2_e^T       forward; (R_cap, r1), (R_cap, r2)
//   V2_r = dO_t B2_e       V1_r = dH_r B1_e        backward
#pragma once

#include "backend/ops.h"
#include "experts/workspace_plan.h"
#include "penstock/adapters.h"

namespace penstock {

struct AdaptedForwardWorkspace {
  Buffer a;        // (R_cap, n)
  Buffer y;        // (R_cap, d)  empty when dispatched
  Buffer u1;       // (R_cap, r1)
  Buffer u2;       // (R_cap, r2)
  Buffer scratch;  //
  int64_t bytes = 0;
};

struct AdaptedBackwardWorkspace {
  Buffer dh;        // (R_cap, h)
  Buffer a_scaled;  // (R_cap, n)
  Buffer partials;  // (R_cap, P)
  Buffer dx_rows;   // (R_cap, d)  empty when dispatched
  Buffer u1;        // (R_cap, r1)
  Buffer u2;        // (R_cap, r2)  S_r U2_r
  Buffer v1;        // (R_cap, r1)
  Buffer v2;        // (R_cap, r2)
  Buffer scratch;   //
  int64_t bytes = 0;
};

AdaptedForwardWorkspace plan_adapted_forward(const AdaptedProblem& problem, const Backend& backend,
                                             const Context& context);
AdaptedBackwardWorkspace plan_adapted_backward(const AdaptedProblem& problem,
                                               const Backend& backend, const Context& context);

// Throws Error(invalid_argument) unless ranks are in range.
void check_ranks(const AdaptedProblem& problem);
AdaptedProblem adapted_problem_of(ExpertsProblem experts, const ExpertAdapters& adapters);
void check_adapters(const ExpertAdapters& adapters, const AdaptedProblem& problem);
void check_adapter_grads(const ExpertAdapters& grads, const ExpertAdapters& adapters,
                         const AdaptedProblem& problem);

// The backend of the call, asked with both ranks.
const Backend& select_adapted_backend(const AdaptedProblem& problem, const Context& context);

// An adapter's factor as (rows, columns) of one matrix, and the same read as its transpose.
GroupedMatrix factor_of(const TensorView& view);
GroupedMatrix transposed(const GroupedMatrix& matrix);
// One matrix in the place of W1.
UpWeights single(const GroupedMatrix& matrix);
// The halves of up_b (or its gradient), split as W1's rows are.
UpWeights halves_of(const TensorView& up_b, const ExpertsConfig& config);

}  // namespace penstock
