// SPDX-License-Identifier: Apache-2.0
//
// The forward pass: checks, then forward_launches.cpp.
#include "backend/registry.h"
#include "experts/forward_launches.h"
#include "experts/problem.h"
#include "experts/validate.h"
#include "tensor/checks.h"

namespace penstock {

int64_t forward_workspace_bytes(const ExpertsProblem& problem, const Context& context) {
  check_problem(problem);
  return plan_forward(problem, select_backend(problem, context), context).bytes;
}

void experts_forward(const ExpertsForwardArgs& args, const Context& context) {
  const ExpertsProblem problem = problem_of(args);
  check_forward(args, problem);
  const Backend& backend = select_backend(problem, context);
  const ForwardWorkspace layout = plan_forward(problem, backend, context);
  check_workspace(args.workspace, layout.bytes, "forward_workspace_bytes");
  check_aliases(args, layout.bytes);

  launch_forward({args, {}, {}}, problem, backend, layout, context);
}

}  // namespace penstock
