// SPDX-License-Identifier: Apache-2.0
//
// The backward pass, whole or in two halves. In order: (recompute H under SavePolicy::input),
// down_backward (dH, A' and the partial sums of dS), score_gradient, dW2 and db2; for each block of
// columns up_backward (dX~), combine (dX); dW1 and db1.
#include <algorithm>

#include "backend/registry.h"
#include "experts/backward_call.h"
#include "experts/problem.h"
#include "experts/validate.h"
#include "tensor/checks.h"

namespace penstock {
namespace {

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
  if (pass != BackwardPass::weights && call.wants_row_gradients())
    call.down(call.preactivation({}), {});
  if (pass != BackwardPass::data) call.down_weight_gradients();
  const int64_t width = columns_at_a_time(problem);
  for (int64_t first = 0; first < problem.hidden_size; first += width)
    call.up({first, std::min(width, problem.hidden_size - first)}, {});
  if (pass != BackwardPass::data) call.up_weight_gradients();
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
