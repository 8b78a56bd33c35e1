// SPDX-License-Identifier: Apache-2.0
//
// See backward_call.h.
#include "experts/backward_call.h"

#include "experts/launches.h"

namespace penstock {

BackwardCall::BackwardCall(const ExpertsBackwardArgs& args, const ExpertsProblem& problem,
                           const Backend& backend, const Context& context)
    : args_(args), problem_(problem), backend_(backend), context_(context) {
  rows_ = row_groups_of(args.plan, problem);
  up_ = up_weights_of(args.weights, args.config);
  down_ = down_weights_of(args.weights, args.config);
}

void BackwardCall::place(const BackwardWorkspace& layout) {
  scratch_ = part_of(args_.workspace, layout.scratch);
  partials_ = address_of(args_.workspace, layout.partials);
  dx_rows_ = address_of(args_.workspace, layout.dx_rows);
  const bool delayed = args_.delayed.dh.present();
  void* const dh =
      overwrites_h(problem_.config) ? args_.h.data : address_of(args_.workspace, layout.dh);
  dh_ = delayed ? args_.delayed.dh : row_view(dh, problem_.preactivation_size(), problem_);
  a_scaled_ =
      delayed ? args_.delayed.a_scaled : buffer(layout.a_scaled, problem_.intermediate_size);
}

TensorView BackwardCall::preactivation(const LowRankTerm& term) {
  if (args_.config.save != SavePolicy::input) return args_.h;
  backend_.up_projection(
      {rows_, activation_of(args_.config), args_.x, up_, dh_, TensorView{}, scratch_, term},
      context_);
  return dh_;
}

void BackwardCall::down(const TensorView& h, const LowRankTerm& term) {
  TensorView partials;
  if (args_.dscores.present())
    partials = TensorView::contiguous(partials_, accumulator_of(problem_.dtype),
                                      {problem_.row_capacity, backend_.score_partials(problem_)},
                                      problem_.device);
  backend_.down_backward({rows_, activation_of(args_.config), args_.d_output, down_, args_.scores,
                          h, dh_, a_scaled_, partials, scratch_, term},
                         context_);
  if (args_.dscores.present())
    backend_.score_gradient({rows_, partials, args_.d_output, down_.b, args_.dscores}, context_);
}

void BackwardCall::down_weight_gradients() {
  const WeightGrads& grads = args_.weight_grads;
  const DownWeights out = down_weights_of(grads.into, args_.config);
  if (out.w.present())
    backend_.weight_gradient({rows_,
                              args_.d_output,
                              RowAccess::gathered,
                              a_scaled_,
                              RowAccess::direct,
                              {out.w, {}},
                              1,
                              grads.mode,
                              grads.trainable,
                              scratch_},
                             context_);
  if (out.b.present())
    backend_.bias_gradient({rows_,
                            args_.d_output,
                            RowAccess::gathered,
                            args_.scores,
                            {out.b, {}},
                            1,
                            grads.mode,
                            grads.trainable,
                            scratch_},
                           context_);
}

void BackwardCall::up(const HiddenColumns& columns, const LowRankTerm& term) {
  if (!args_.dx.present()) return;
  const bool dispatched = args_.plan.dispatched();
  const TensorView dx_rows = dispatched ? args_.dx : row_view(dx_rows_, columns.count, problem_);
  backend_.up_backward({rows_, dh_, columns_of(up_, columns), dx_rows, scratch_, term}, context_);
  if (!dispatched)
    backend_.combine({args_.plan, dx_rows, TensorView{}, columns_of(args_.dx, columns)}, context_);
}

void BackwardCall::up_weight_gradients() {
  const WeightGrads& grads = args_.weight_grads;
  const UpWeights out = up_weights_of(grads.into, args_.config);
  if (out.w[0].present())
    backend_.weight_gradient({rows_, dh_, RowAccess::direct, args_.x, RowAccess::gathered, out.w,
                              out.halves, grads.mode, grads.trainable, scratch_},
                             context_);
  if (out.b[0].present())
    backend_.bias_gradient({rows_, dh_, RowAccess::direct, TensorView{}, out.b, out.halves,
                            grads.mode, grads.trainable, scratch_},
                           context_);
}

bool BackwardCall::wants_row_gradients() const {
  const ExpertWeights& into = args_.weight_grads.into;
  return args_.dx.present() || args_.dscores.present() || args_.delayed.dh.present() ||
         into.w1.present() || into.b1.present() || into.w2.present();
}

TensorView BackwardCall::buffer(const Buffer& place, int64_t width) const {
  return row_view(address_of(args_.workspace, place), width, problem_);
}

}  // namespace penstock
