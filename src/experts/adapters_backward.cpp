// SPDX-License-Identifier: Apache-2.0
//
// The backward pass of adapted experts. In order: H again under SavePolicy::input, V2,
// down_backward with its term, score_gradient, dA2, S U2, dB2, V1, dA1 and dB1, up_backward with
// its term, combine. With s = S_r, every gradient follows from what experts_backward computes
// anyway and from the thin rows U that forward left:
//   V2_r = dO_t B2_e     dA2_e = sum_r V2_r^T (s A_r)      dB2_e = sum_r dO_t^T (s U2_r)
//   V1_r = dH_r B1_e     dA1_e = sum_r V1_r^T X_t          dB1_e = sum_r dH_r^T U1_r
// A launch whose every result is absent is left out.
#include "backend/registry.h"
#include "experts/adapter_checks.h"
#include "experts/adapter_views.h"
#include "experts/backward_call.h"
#include "experts/launches.h"
#include "experts/problem.h"
#include "experts/validate.h"
#include "tensor/checks.h"
#include "tensor/overlap.h"

namespace penstock {
namespace {

// The launches of adapters between and in those of a BackwardCall.
class AdaptedBackward {
 public:
  AdaptedBackward(const AdaptedBackwardArgs& args, const ExpertsProblem& problem,
                  const Backend& backend, const Context& context)
      : args_(args),
        experts_(args.experts),
        problem_(problem),
        backend_(backend),
        context_(context),
        call_(args.experts, problem, backend, context) {}

  void place(const BackwardWorkspace& layout) {
    call_.place(layout);
    const auto [up_rank, down_rank] = problem_.adapter_ranks;
    if (up_rank != 0) v1_ = call_.buffer(layout.v1, up_rank);
    if (down_rank != 0) {
      scaled_u2_ = call_.buffer(layout.u2, down_rank);
      v2_ = call_.buffer(layout.v2, down_rank);
    }
  }

  // H again, V2, dH, A' and dS.
  void down() {
    LowRankTerm up_term;
    if (v1_.present()) up_term = {args_.rows.up, halves_of(args_.adapters.up_b, experts_.config).w};
    const TensorView h = call_.preactivation(up_term);
    LowRankTerm down_term;
    if (v2_.present()) {
      backend_.up_projection({call_.rows(), activation_of(experts_.config), experts_.d_output,
                              single(transposed(factor_of(args_.adapters.down_b))), v2_,
                              TensorView{}, call_.scratch()},
                             context_);
      down_term = {v2_, {transposed(factor_of(args_.adapters.down_a))}};
    }
    call_.down(h, down_term);
  }

  void down_adapter_gradients() {
    if (args_.grads.down_a.present())
      gradient({v2_, RowAccess::direct}, {call_.a_scaled(), RowAccess::direct},
               single(factor_of(args_.grads.down_a)));
    if (!args_.grads.down_b.present()) return;
    backend_.scale_rows({call_.rows(), experts_.scores, args_.rows.down, scaled_u2_}, context_);
    gradient({experts_.d_output, RowAccess::gathered}, {scaled_u2_, RowAccess::direct},
             single(factor_of(args_.grads.down_b)));
  }

  void up_adapter_gradients() {
    if (v1_.present() && (experts_.dx.present() || args_.grads.up_a.present()))
      backend_.up_backward({call_.rows(), call_.dh(),
                            halves_of(args_.adapters.up_b, experts_.config), v1_, call_.scratch()},
                           context_);
    if (args_.grads.up_a.present())
      gradient({v1_, RowAccess::direct}, {experts_.x, RowAccess::gathered},
               single(factor_of(args_.grads.up_a)));
    if (args_.grads.up_b.present())
      gradient({call_.dh(), RowAccess::direct}, {args_.rows.up, RowAccess::direct},
               halves_of(args_.grads.up_b, experts_.config));
  }

  void up() {
    LowRankTerm term;
    if (v1_.present()) term = {v1_, {transposed(factor_of(args_.adapters.up_a))}};
    call_.up({0, problem_.hidden_size}, term);
  }

 private:
  struct Side {
    TensorView tensor;
    RowAccess access;
  };

  void gradient(const Side& left, const Side& right, const UpWeights& out) {
    backend_.weight_gradient(
        {call_.rows(), left.tensor, left.access, right.tensor, right.access, out.w, out.halves,
         GradMode::overwrite, TensorView{}, call_.scratch()},
        context_);
  }

  const AdaptedBackwardArgs& args_;
  const ExpertsBackwardArgs& experts_;
  const ExpertsProblem& problem_;
  const Backend& backend_;
  const Context& context_;
  BackwardCall call_;
  TensorView scaled_u2_;
  TensorView v1_;
  TensorView v2_;
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
  check.input(args.rows.up, "rows.up");
  check.input(args.rows.down, "rows.down");
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

int64_t adapted_backward_workspace_bytes(const AdaptedProblem& adapted, const Context& context) {
  check_problem(adapted.experts);
  check_ranks(adapted);
  const ExpertsProblem problem = with_ranks(adapted);
  check_backward_possible(problem.config);
  return plan_backward(problem, BackwardPass::whole, select_backend(problem, context), context)
      .bytes;
}

void adapted_experts_backward(const AdaptedBackwardArgs& args, const Context& context) {
  const AdaptedProblem adapted = adapted_problem_of(problem_of(args.experts), args.adapters);
  check_no_weight_gradients(args.experts.weight_grads);
  check_backward(args.experts, adapted.experts, BackwardPass::whole);
  check_adapters(args.adapters, adapted);
  check_adapter_rows(args.rows, adapted);
  check_adapter_grads(args.grads, args.adapters, adapted);
  const ExpertsProblem problem = with_ranks(adapted);
  const Backend& backend = select_backend(problem, context);
  const BackwardWorkspace layout = plan_backward(problem, BackwardPass::whole, backend, context);
  check_workspace(args.experts.workspace, layout.bytes, "adapted_backward_workspace_bytes");
  check_aliases(args.experts, layout.bytes, BackwardPass::whole);
  check_adapter_aliases(args, layout.bytes);

  AdaptedBackward call(args, problem, backend, context);
  call.place(layout);
  call.down();
  call.down_adapter_gradients();
  call.up_adapter_gradients();
  call.up();
}

}  // namespace penstock
