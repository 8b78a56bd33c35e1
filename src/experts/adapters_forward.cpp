// SPDX-License-Identifier: Apache-2.0
//
// The forward pass of adapted experts: checks, then forward_launches.cpp.
#include "backend/registry.h"
#include "experts/adapter_checks.h"
#include "experts/forward_launches.h"
#include "experts/problem.h"
#include "experts/validate.h"
#include "tensor/checks.h"
#include "tensor/overlap.h"

namespace penstock {
namespace {

void check_adapter_aliases(const AdaptedForwardArgs& args, int64_t workspace_bytes) {
  AliasCheck check;
  check.input(args.experts.x, "x");
  check.input(args.experts.scores, "scores");
  check.input(args.experts.weights.w1, "weights.w1");
  check.input(args.experts.weights.w2, "weights.w2");
  check.input(args.adapters.up_a, "adapters.up_a");
  check.input(args.adapters.up_b, "adapters.up_b");
  check.input(args.adapters.down_a, "adapters.down_a");
  check.input(args.adapters.down_b, "adapters.down_b");
  check.output(args.rows.up, "rows.up");
  check.output(args.rows.down, "rows.down");
  check.output(args.experts.h, "h");
  check.output(args.experts.output, "output");
  check.workspace(args.experts.workspace, workspace_bytes);
  check.run();
}

}  // namespace

int64_t adapted_forward_workspace_bytes(const AdaptedProblem& adapted, const Context& context) {
  check_problem(adapted.experts);
  check_ranks(adapted);
  const ExpertsProblem problem = with_ranks(adapted);
  return plan_forward(problem, select_backend(problem, context), context).bytes;
}

void adapted_experts_forward(const AdaptedForwardArgs& args, const Context& context) {
  const ExpertsForwardArgs& experts = args.experts;
  const AdaptedProblem adapted = adapted_problem_of(problem_of(experts), args.adapters);
  check_forward(experts, adapted.experts);
  check_adapters(args.adapters, adapted);
  check_adapter_rows(args.rows, adapted);
  const ExpertsProblem problem = with_ranks(adapted);
  const Backend& backend = select_backend(problem, context);
  const ForwardWorkspace layout = plan_forward(problem, backend, context);
  check_workspace(experts.workspace, layout.bytes, "adapted_forward_workspace_bytes");
  check_aliases(experts, layout.bytes);
  check_adapter_aliases(args, layout.bytes);

  launch_forward(args, problem, backend, layout, context);
}

}  // namespace penstock
