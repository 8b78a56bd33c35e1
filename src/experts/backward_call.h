// SPDX-License-Identifier: Apache-2.0
//
// The launches of a checked backward pass, one method for what belongs together: called in order by
// backward.cpp, and by adapters_backward.cpp, which has terms in some and launches of its own
// between them. A launch whose every result is absent is left out.
#pragma once

#include "experts/weight_views.h"
#include "experts/workspace_plan.h"

namespace penstock {

class BackwardCall {
 public:
  BackwardCall(const ExpertsBackwardArgs& args, const ExpertsProblem& problem,
               const Backend& backend, const Context& context);

  // Where temporaries are.
  void place(const BackwardWorkspace& layout);

  // The H that was kept, or H computed again, with the up-projection's term, where dH will be.
  TensorView preactivation(const LowRankTerm& term);
  // dH, A' and dS from H.
  void down(const TensorView& h, const LowRankTerm& term);
  void down_weight_gradients();
  // dX~ in some columns, and dX from it.
  void up(const HiddenColumns& columns, const LowRankTerm& term);
  void up_weight_gradients();

  bool wants_row_gradients() const;

  const RowGroups& rows() const { return rows_; }
  const Workspace& scratch() const { return scratch_; }
  const TensorView& dh() const { return dh_; }
  const TensorView& a_scaled() const { return a_scaled_; }
  // (R_cap, width) in the storage dtype at this place of the workspace.
  TensorView buffer(const Buffer& place, int64_t width) const;

 private:
  const ExpertsBackwardArgs& args_;
  const ExpertsProblem& problem_;
  const Backend& backend_;
  const Context& context_;
  RowGroups rows_;
  UpWeights up_;
  DownWeights down_;
  Workspace scratch_;
  TensorView dh_;
  TensorView a_scaled_;
  void* dx_rows_ = nullptr;
  void* partials_ = nullptr;
};

}  // namespace penstock
