// SPDX-License-Identifier: Apache-2.0
//
// The backward pass, whole or in two halves. In order: (recompute H under SavePolicy::input),
// down_backward (dH, A' and the partial sums of dS), score_gradient, dW2 and db2; for each block of
// columns up_backward (dX~), dW1 beside combine (dX); db1. A launch whose every result is absent is
// left out.
#include <algorithm>

#include "backend/registry.h"
#include "experts/launches.h"
#include "experts/problem.h"
#include "experts/validate.h"
#include "experts/weight_views.h"
#include "experts/workspace_plan.h"
#include "tensor/checks.h"

namespace penstock {
namespace {

// A checked call: where its temporaries are and what its launches share.
class BackwardCall {
 public:
  BackwardCall(const ExpertsBackwardArgs& args, const ExpertsProblem& problem,
               const Backend& backend, const Context& context)
      : args_(args), problem_(problem), backend_(backend), context_(context) {
    rows_ = row_groups_of(args.plan, problem);
    up_ = up_weights_of(args.weights, args.config);
    down_ = down_weights_of(args.weights, args.config);
  }

  void place(const BackwardWorkspace& layout) {
    scratch_ = part_of(args_.workspace, layout.scratch);
    partials_ = address_of(args_.workspace, layout.partials);
    dx_rows_ = address_of(args_.workspace, layout.dx_rows);
    const bool delayed = args_.delayed.dh.present();
    void* const dh =
        overwrites_h(args_.config) ? args_.h.data : address_of(args_.workspace, layout.dh);
    dh_ = delayed ? args_.delayed.dh : row_view(dh, problem_.preactivation_size(), problem_);
    a_scaled_ = delayed ? args_.delayed.a_scaled
                        : row_view(address_of(args_.workspace, layout.a_scaled),
                                   problem_.intermediate_size, problem_);
  }

  // dH, A' and dS.
  void down() {
    TensorView h = args_.h;
    if (args_.config.save == SavePolicy::input) {
      h = dh_;
      backend_.up_projection(
          {rows_, activation_of(args_.config), args_.x, up_, h, TensorView{}, scratch_}, context_);
    }
    TensorView partials;
    if (args_.dscores.present())
      partials = TensorView::contiguous(partials_, accumulator_of(problem_.dtype),
                                        {problem_.row_capacity, backend_.score_partials(problem_)},
                                        problem_.device);
    backend_.down_backward({rows_, activation_of(args_.config), args_.d_output, down_, args_.scores,
                            h, dh_, a_scaled_, partials, scratch_},
                           context_);
    if (args_.dscores.present())
      backend_.score_gradient({rows_, partials, args_.d_output, down_.b, args_.dscores}, context_);
  }

  void down_weight_gradients() {
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

  // dX~ in some columns, then dX from it and dW1 beside each other, which share nothing but what
  // they read.
  void up(BackwardPass pass, const HiddenColumns& columns) {
    const bool wants_dx = pass != BackwardPass::weights && args_.dx.present();
    const bool wants_dw1 = pass != BackwardPass::data && args_.weight_grads.into.w1.present();
    const bool dispatched = args_.plan.dispatched();
    const TensorView dx_rows = dispatched ? args_.dx : row_view(dx_rows_, columns.count, problem_);
    if (wants_dx)
      backend_.up_backward({rows_, dh_, columns_of(up_, columns), dx_rows, scratch_}, context_);
    if (wants_dx && !dispatched) {
      const CombineArgs combine = {args_.plan, dx_rows, TensorView{},
                                   columns_of(args_.dx, columns)};
      if (wants_dw1)
        return backend_.weight_gradient_beside_combine({up_weight_gradient_args(columns), combine},
                                                       context_);
      return backend_.combine(combine, context_);
    }
    if (wants_dw1) backend_.weight_gradient(up_weight_gradient_args(columns), context_);
  }

  void up_bias_gradient() {
    const WeightGrads& grads = args_.weight_grads;
    const UpWeights out = up_weights_of(grads.into, args_.config);
    if (!out.b[0].present()) return;
    backend_.bias_gradient({rows_, dh_, RowAccess::direct, TensorView{}, out.b, out.halves,
                            grads.mode, grads.trainable, scratch_},
                           context_);
  }

  bool wants_row_gradients() const {
    const ExpertWeights& into = args_.weight_grads.into;
    return args_.dx.present() || args_.dscores.present() || args_.delayed.dh.present() ||
           into.w1.present() || into.b1.present() || into.w2.present();
  }

 private:
  WeightGradientArgs up_weight_gradient_args(const HiddenColumns& columns) const {
    const WeightGrads& grads = args_.weight_grads;
    const UpWeights out = columns_of(up_weights_of(grads.into, args_.config), columns);
    return {rows_,
            dh_,
            RowAccess::direct,
            columns_of(args_.x, columns),
            RowAccess::gathered,
            out.w,
            out.halves,
            grads.mode,
            grads.trainable,
            scratch_};
  }

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

const char* query_of(BackwardPass pass) {
  switch (pass) {
    case BackwardPass::whole:
      return "backward_workspace_bytes";
    case BackwardPass::data:
      return "backward_data_workspace_bytes";
    case BackwardPass::weights:
      return "backward_weights_workspace_bytes";
  }
  return "";
}

void run(const ExpertsBackwardArgs& args, BackwardPass pass, const Context& context) {
  const ExpertsProblem problem = problem_of(args);
  check_backward(args, problem, pass);
  const Backend& backend = select_backend(problem, context);
  const BackwardWorkspace layout = plan_backward(problem, pass, backend, context);
  check_workspace(args.workspace, layout.bytes, query_of(pass));
  check_aliases(args, layout.bytes, pass);

  BackwardCall call(args, problem, backend, context);
  call.place(layout);
  if (pass != BackwardPass::weights && call.wants_row_gradients()) call.down();
  if (pass != BackwardPass::data) call.down_weight_gradients();
  const int64_t width = columns_at_a_time(problem);
  for (int64_t first = 0; first < problem.hidden_size; first += width)
    call.up(pass, {first, std::min(width, problem.hidden_size - first)});
  if (pass != BackwardPass::data) call.up_bias_gradient();
}

int64_t bytes_of(const ExpertsProblem& problem, BackwardPass pass, const Context& context) {
  check_problem(problem);
  check_backward_possible(problem.config);
  return plan_backward(problem, pass, select_backend(problem, context), context).bytes;
}

}  // namespace

int64_t backward_workspace_bytes(const ExpertsProblem& problem, const Context& context) {
  return bytes_of(problem, BackwardPass::whole, context);
}

int64_t backward_data_workspace_bytes(const ExpertsProblem& problem, const Context& context) {
  return bytes_of(problem, BackwardPass::data, context);
}

int64_t backward_weights_workspace_bytes(const ExpertsProblem& problem, const Context& context) {
  return bytes_of(problem, BackwardPass::weights, context);
}

void experts_backward(const ExpertsBackwardArgs& args, const Context& context) {
  run(args, BackwardPass::whole, context);
}

void experts_backward_data(const ExpertsBackwardArgs& args, const Context& context) {
  run(args, BackwardPass::data, context);
}

void experts_backward_weights(const ExpertsBackwardArgs& args, const Context& context) {
  run(args, BackwardPass::weights, context);
}

}  // namespace penstock
