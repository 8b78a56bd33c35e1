// SPDX-License-Identifier: Apache-2.0
//
// The forward pass of adapted experts: U1, up_projection with its term, U2, down_projection with
// its term, combine. Both factors' products are up and down projections of rank outputs.
#include "experts/adapters_plan.h"
#include "experts/launches.h"
#include "experts/problem.h"
#include "experts/validate.h"
#include "experts/weight_views.h"
#include "tensor/checks.h"
#include "tensor/overlap.h"

namespace penstock {
namespace {

void check_adapter_aliases(const AdaptedForwardArgs& args, int64_t workspace_bytes) {
  AliasCheck check;
  check.input(args.adapters.up_a, "adapters.up_a");
  check.input(args.adapters.up_b, "adapters.up_b");
  check.input(args.adapters.down_a, "adapters.down_a");
  check.input(args.adapters.down_b, "adapters.down_b");
  check.output(args.experts.h, "h");
  check.output(args.experts.output, "output");
  check.workspace(args.experts.workspace, workspace_bytes);
  check.run();
}

}  // namespace

int64_t adapted_forward_workspace_bytes(const AdaptedProblem& problem, const Context& context) {
  check_problem(problem.experts);
  check_ranks(problem);
  return plan_adapted_forward(problem, select_adapted_backend(problem, context), context).bytes;
}

void adapted_experts_forward(const AdaptedForwardArgs& args, const Context& context) {
  const ExpertsForwardArgs& experts = args.experts;
  const AdaptedProblem problem = adapted_problem_of(problem_of(experts), args.adapters);
  check_forward(experts, problem.experts);
  check_adapters(args.adapters, problem);
  const Backend& backend = select_adapted_backend(problem, context);
  const AdaptedForwardWorkspace layout = plan_adapted_forward(problem, backend, context);
  check_workspace(experts.workspace, layout.bytes, "adapted_forward_workspace_bytes");
  check_aliases(experts, layout.bytes);
  check_adapter_aliases(args, layout.bytes);

  const RowGroups rows = row_groups_of(experts.plan, problem.experts);
  const Workspace scratch = part_of(experts.workspace, layout.scratch);
  const ActivationSpec activation = activation_of(experts.config);
  const bool dispatched = experts.plan.dispatched();
  const auto buffer = [&](const Buffer& place, int64_t width) {
    return row_view(address_of(experts.workspace, place), width, problem.experts);
  };
  const TensorView a = buffer(layout.a, problem.experts.intermediate_size);
  const TensorView y = dispatched ? experts.output : buffer(layout.y, problem.experts.hidden_size);

  LowRankTerm up_term;
  if (problem.up_rank != 0) {
    up_term = {buffer(layout.u1, problem.up_rank), halves_of(args.adapters.up_b, experts.config).w};
    backend.up_projection({rows, activation, experts.x, single(factor_of(args.adapters.up_a)),
                           up_term.rows, TensorView{}, scratch},
                          context);
  }
  backend.up_projection(
      {rows, activation, experts.x, up_weights_of(experts.weights, experts.config), experts.h, a,
       scratch, up_term},
      context);
  LowRankTerm down_term;
  if (problem.down_rank != 0) {
    down_term = {buffer(layout.u2, problem.down_rank), {factor_of(args.adapters.down_b)}};
    backend.down_projection(
        {rows, a, {factor_of(args.adapters.down_a), {}}, down_term.rows, scratch}, context);
  }
  backend.down_projection(
      {rows, a, down_weights_of(experts.weights, experts.config), y, scratch, down_term}, context);
  if (!dispatched)
    backend.combine({experts.plan, y, experts.scores, experts.output}, context);
  else if (experts.scores.present())
    backend.scale_rows({rows, experts.scores, y, experts.output}, context);
}

}  // namespace penstock
