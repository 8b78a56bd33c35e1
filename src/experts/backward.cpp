// SPDX-License-Identifier: Apache-2.0
//
// The backward pass, whole or in two halves. In order: (recompute H under SavePolicy::input),
// down_backward (dH, A' and the partial sums of dS), score_gradient, dW2 and db2, up_backward
// (dX~), dW1 beside combine (dX), db1. A launch whose every result is absent is left out.
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
    dx_rows_ = args_.plan.dispatched() ? args_.dx
                                       : row_view(address_of(args_.workspace, layout.dx_rows),
                                                  problem_.hidden_size, problem_);
    const bool delayed = args_.delayed.dh.present();
    dh_ = delayed ? args_.delayed.dh
                  : row_view(address_of(args_.workspace, layout.dh), problem_.preactivation_size(),
                             problem_);
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

  void up() { backend_.up_backward({rows_, dh_, up_, dx_rows_, scratch_}, context_); }

  // dW1 of the second half of a pass.
  void up_weight_gradient() { backend_.weight_gradient(up_weight_gradient_args(), context_); }

  // dX from dX~.
  void combine() { backend_.combine(combine_args(), context_); }

  // Both, which share nothing but what they read.
  void up_weight_gradient_beside_combine() {
    backend_.weight_gradient_beside_combine({up_weight_gradient_args(), combine_args()}, context_);
  }

  void up_bias_gradient() {
    const WeightGrads& grads = args_.weight_grads;
    const UpWeights out = up_weights_of(grads.into, args_.config);
    backend_.bias_gradient({rows_, dh_, RowAccess::direct, TensorView{}, out.b, out.halves,
                            grads.mode, grads.trainable, scratch_},
                           context_);
  }

  bool wants_dx() const { return args_.dx.present(); }
  bool combines() const { return wants_dx() && !args_.plan.dispatched(); }
  bool wants_up_weights() const { return args_.weight_grads.into.w1.present(); }
  bool wants_up_biases() const { return args_.weight_grads.into.b1.present(); }
  bool wants_row_gradients() const {
    const ExpertWeights& into = args_.weight_grads.into;
    return wants_dx() || args_.dscores.present() || args_.delayed.dh.present() ||
           into.w1.present() || into.b1.present() || into.w2.present();
  }

 private:
  WeightGradientArgs up_weight_gradient_args() const {
    const WeightGrads& grads = args_.weight_grads;
    const UpWeights out = up_weights_of(grads.into, args_.config);
    return {rows_, dh_,        RowAccess::direct, args_.x,         RowAccess::gathered,
            out.w, out.halves, grads.mode,        grads.trainable, scratch_};
  }
  CombineArgs combine_args() const { return {args_.plan, dx_rows_, TensorView{}, args_.dx}; }

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
  TensorView dx_rows_;
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
  const bool data = pass != BackwardPass::weights;
  const bool weights = pass != BackwardPass::data;
  if (data && call.wants_row_gradients()) call.down();
  if (weights) call.down_weight_gradients();
  if (data && call.wants_dx()) call.up();
  const bool combines = data && call.combines();
  const bool up_weights = weights && call.wants_up_weights();
  if (combines && up_weights) {
    call.up_weight_gradient_beside_combine();
  } else if (combines) {
    call.combine();
  } else if (up_weights) {
    call.up_weight_gradient();
  }
  if (weights && call.wants_up_biases()) call.up_bias_gradient();
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
