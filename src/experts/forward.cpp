// SPDX-License-Identifier: Apache-2.0
//
// The forward pass: up_projection (H stored under SavePolicy::preactivation, A always),
// down_projection, combine, the latter two for each block of columns. Dispatched rows: Y goes to
// the output and is scaled there.
#include <algorithm>

#include "backend/registry.h"
#include "experts/launches.h"
#include "experts/problem.h"
#include "experts/validate.h"
#include "experts/weight_views.h"
#include "experts/workspace_plan.h"
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

  const RowGroups rows = row_groups_of(args.plan, problem);
  const Workspace scratch = part_of(args.workspace, layout.scratch);
  const bool dispatched = args.plan.dispatched();
  const TensorView a =
      row_view(address_of(args.workspace, layout.a), problem.intermediate_size, problem);
  backend.up_projection({rows, activation_of(args.config), args.x,
                         up_weights_of(args.weights, args.config), args.h, a, scratch},
                        context);
  const DownWeights down = down_weights_of(args.weights, args.config);
  const int64_t width = columns_at_a_time(problem);
  for (int64_t first = 0; first < problem.hidden_size; first += width) {
    const HiddenColumns columns = {first, std::min(width, problem.hidden_size - first)};
    const TensorView output = columns_of(args.output, columns);
    const TensorView y =
        dispatched ? output
                   : row_view(address_of(args.workspace, layout.y), columns.count, problem);
    backend.down_projection({rows, a, columns_of(down, columns), y, scratch}, context);
    if (!dispatched)
      backend.combine({args.plan, y, args.scores, output}, context);
    else if (args.scores.present())
      backend.scale_rows({rows, args.scores, y, output}, context);
  }
}

}  // namespace penstock
