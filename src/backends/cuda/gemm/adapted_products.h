// SPDX-License-Identifier: Apache-2.0
//
// The row products with a low-rank term in their sums, for the launchers of the plain ones, which
// hand over where RowProblem::low_rank is present. Instances of their own: the plain kernels know
// nothing of the term.
#pragma once

#include "backend/ops.h"

namespace penstock::cuda {

struct RowProblem;
struct StoreOutput;
struct UpEpilogueParams;

template <typename Element>
void adapted_up_projection(const RowProblem& problem, const UpEpilogueParams& epilogue,
                           const Context& context);
template <typename Element>
void adapted_store_rows(const RowProblem& problem, const StoreOutput& output,
                        const Context& context);
template <typename Element>
void adapted_down_backward(const RowProblem& problem, const DownBackwardArgs& args,
                           const Context& context);

}  // namespace penstock::cuda
