// SPDX-License-Identifier: Apache-2.0
//
// The backward pass of adapted experts. In order: U1 again, H again under SavePolicy::input, V2,
// down_backward with its term, score_gradient, dA2 and dB2, V1, dA1 and dB1, up_backward with its
// term, combine. With s = S_r, every gradient follows from what experts_backward computes anyway:
//   V2_r = dO_t B2_e     dA2_e = sum_r V2_r^T (s A_r)      dB2_e = sum_r dO_t^T (s A_r A2_e^T)
//   V1_r = dH_r B1_e     dA1_e = sum_r V1_r^T X_t          dB1_e = sum_r dH_r^T U1_r
// A launch whose every result is absent is left out.
#include "experts/adapters_plan.h"
#include "experts/launches.h"
#include "experts/problem.h"
#include "experts/validate.h"
#include "experts/weight_views.h"
#include "tensor/checks.h"
#include "tensor/overlap.h"

namespace penstock {
namespace {

// A checked call: where its temporaries are and what its launches share.
class AdaptedBackward {
 public:
  AdaptedBackward(const AdaptedBackwardArgs& args, const AdaptedProblem& problem,
                  const Backend& backend, const Context& context)
      : args_(args),
        experts_(args.experts),
        problem_(problem),
        backend_(backend),
        context_(context),
        rows_(row_groups_of(experts_.plan, problem.experts)),
        activation_(activation_of(experts_.config)),
        up_(up_weights_of(experts_.weights, experts_.config)),
        down_(down_weights_of(experts_.weights, experts_.config)) {}

  void place(const AdaptedBackwardWorkspace& layout) {
    const ExpertsProblem& sizes = problem_.experts;
    scratch_ = part_of(experts_.workspace, layout.scratch);
    dh_ = buffer(layout.dh, sizes.preactivation_size());
    a_scaled_ = buffer(layout.a_scaled, sizes.intermediate_size);
    dx_rows_ = experts_.plan.dispatched() ? experts_.dx : buffer(layout.dx_rows, sizes.hidden_size);
    partials_ = address_of(experts_.workspace, layout.partials);
    if (problem_.up_rank != 0) {
      u1_ = buffer(layout.u1, problem_.up_rank);
      v1_ = buffer(layout.v1, problem_.up_rank);
    }
    if (problem_.down_rank != 0) {
      u2_ = buffer(layout.u2, problem_.down_rank);
      v2_ = buffer(layout.v2, problem_.down_rank);
    }
  }

  // U1, and H where it was not kept; returns H.
  TensorView preactivation() {
    const bool again = experts_.config.save == SavePolicy::input;
    if (u1_.present() && (again || args_.grads.up_b.present()))
      project(experts_.x, factor_of(args_.adapters.up_a), u1_);
    if (!again) return experts_.h;
    LowRankTerm term;
    if (u1_.present()) term = {u1_, halves_of(args_.adapters.up_b, experts_.config).w};
    backend_.up_projection({rows_, activation_, experts_.x, up_, dh_, TensorView{}, scratch_, term},
                           context_);
    return dh_;
  }

  // V2, dH, A' and dS.
  void down(const TensorView& h) {
    LowRankTerm term;
    if (v2_.present()) {
      project(experts_.d_output, transposed(factor_of(args_.adapters.down_b)), v2_);
      term = {v2_, {transposed(factor_of(args_.adapters.down_a))}};
    }
    TensorView partials;
    if (experts_.dscores.present())
      partials = TensorView::contiguous(
          partials_, accumulator_of(problem_.experts.dtype),
          {problem_.experts.row_capacity, backend_.score_partials(problem_.experts)},
          problem_.experts.device);
    backend_.down_backward({rows_, activation_, experts_.d_output, down_, experts_.scores, h, dh_,
                            a_scaled_, partials, scratch_, term},
                           context_);
    if (experts_.dscores.present())
      backend_.score_gradient({rows_, partials, experts_.d_output, down_.b, experts_.dscores},
                              context_);
  }

  void down_adapter_gradients() {
    if (args_.grads.down_a.present())
      gradient({v2_, RowAccess::direct}, {a_scaled_, RowAccess::direct},
               single(factor_of(args_.grads.down_a)));
    if (!args_.grads.down_b.present()) return;
    backend_.down_projection(
        {rows_, a_scaled_, {factor_of(args_.adapters.down_a), {}}, u2_, scratch_}, context_);
    gradient({experts_.d_output, RowAccess::gathered}, {u2_, RowAccess::direct},
             single(factor_of(args_.grads.down_b)));
  }

  void up_adapter_gradients() {
    if (v1_.present() && (experts_.dx.present() || args_.grads.up_a.present()))
      backend_.up_backward(
          {rows_, dh_, halves_of(args_.adapters.up_b, experts_.config), v1_, scratch_}, context_);
    if (args_.grads.up_a.present())
      gradient({v1_, RowAccess::direct}, {experts_.x, RowAccess::gathered},
               single(factor_of(args_.grads.up_a)));
    if (args_.grads.up_b.present())
      gradient({dh_, RowAccess::direct}, {u1_, RowAccess::direct},
               halves_of(args_.grads.up_b, experts_.config));
  }

  void up() {
    if (!experts_.dx.present()) return;
    LowRankTerm term;
    if (v1_.present()) term = {v1_, {transposed(factor_of(args_.adapters.up_a))}};
    backend_.up_backward({rows_, dh_, up_, dx_rows_, scratch_, term}, context_);
    if (!experts_.plan.dispatched())
      backend_.combine({experts_.plan, dx_rows_, TensorView{}, experts_.dx}, context_);
  }

 private:
  struct Side {
    TensorView tensor;
    RowAccess access;
  };

  TensorView buffer(const Buffer& place, int64_t width) const {
    return row_view(address_of(experts_.workspace, place), width, problem_.experts);
  }

  // Rows of a token's tensor times a factor (outputs, inputs).
  void project(const TensorView& tokens, const GroupedMatrix& factor, const TensorView& output) {
    backend_.up_projection(
        {rows_, activation_, tokens, single(factor), output, TensorView{}, scratch_}, context_);
  }

  void gradient(const Side& left, const Side& right, const UpWeights& out) {
    backend_.weight_gradient({rows_, left.tensor, left.access, right.tensor, right.access, out.w,
                              out.halves, GradMode::overwrite, TensorView{}, scratch_},
                             context_);
  }

  const AdaptedBackwardArgs& args_;
  const ExpertsBackwardArgs& experts_;
  const AdaptedProblem& problem_;
  const Backend& backend_;
  const Context& context_;
  RowGroups rows_;
  ActivationSpec activation_;
  UpWeights up_;
  DownWeights down_;
  Workspace scratch_;
  TensorView dh_;
  TensorView a_scaled_;
  TensorView dx_rows_;
  TensorView u1_;
  TensorView u2_;
  TensorView v1_;
  TensorView v2_;
  void* partials_ = nullptr;
};

void check_no_weight_gradients(const WeightGrads& grads) {
  constexpr std::string_view kFrozen = "adapted experts are frozen";
  check_absent(grads.into.w1, "weight_grads.into.w1", kFrozen);
  check_absent(grads.into.w1_up, "weight_grads.into.w1_up", kFrozen);
  check_absent(grads.into.w2, "weight_grads.into.w2", kFrozen);
  check_absent(grads.into.b1, "weight_grads.into.b1", kFrozen);
  check_absent(grads.into.b1_up, "weight_grads.into.b1_up", kFrozen);
  check_absent(grads.into.b2, "weight_grads.into.b2", kFrozen);
}

void check_adapter_aliases(const AdaptedBackwardArgs& args, int64_t workspace_bytes) {
  AliasCheck check;
  check.input(args.experts.x, "x");
  check.input(args.experts.d_output, "d_output");
  check.input(args.experts.scores, "scores");
  check.input(args.experts.h, "h");
  check.input(args.experts.weights.w1, "weights.w1");
  check.input(args.experts.weights.w2, "weights.w2");
  check.input(args.adapters.up_a, "adapters.up_a");
  check.input(args.adapters.up_b, "adapters.up_b");
  check.input(args.adapters.down_a, "adapters.down_a");
  check.input(args.adapters.down_b, "adapters.down_b");
  check.output(args.experts.dx, "dx");
  check.output(args.experts.dscores, "dscores");
  check.output(args.grads.up_a, "grads.up_a");
  check.output(args.grads.up_b, "grads.up_b");
  check.output(args.grads.down_a, "grads.down_a");
  check.output(args.grads.down_b, "grads.down_b");
  check.workspace(args.experts.workspace, workspace_bytes);
  check.run();
}

}  // namespace

int64_t adapted_backward_workspace_bytes(const AdaptedProblem& problem, const Context& context) {
  check_problem(problem.experts);
  check_ranks(problem);
  check_backward_possible(problem.experts.config);
  return plan_adapted_backward(problem, select_adapted_backend(problem, context), context).bytes;
}

void adapted_experts_backward(const AdaptedBackwardArgs& args, const Context& context) {
  const AdaptedProblem problem = adapted_problem_of(problem_of(args.experts), args.adapters);
  check_no_weight_gradients(args.experts.weight_grads);
  check_backward(args.experts, problem.experts, BackwardPass::whole);
  check_adapters(args.adapters, problem);
  check_adapter_grads(args.grads, args.adapters, problem);
  const Backend& backend = select_adapted_backend(problem, context);
  const AdaptedBackwardWorkspace layout = plan_adapted_backward(problem, backend, context);
  check_workspace(args.experts.workspace, layout.bytes, "adapted_backward_workspace_bytes");
  check_aliases(args.experts, layout.bytes, BackwardPass::whole);
  check_adapter_aliases(args, layout.bytes);

  AdaptedBackward call(args, problem, backend, context);
  call.place(layout);
  call.down(call.preactivation());
  call.down_adapter_gradients();
  call.up_adapter_gradients();
  call.up();
}

}  // namespace penstock
