// SPDX-License-Identifier: Apache-2.0
//
// (U1), up_projection (H stored under SavePolicy::preactivation, A always), (U2), down_projection,
// combine, the latter two for each block of columns. Dispatched rows: Y goes to the output and is
// scaled there. U1 and U2 are the thin rows of adapters, whose products are up and down projections
// of rank outputs; they go where the caller keeps them, or to the workspace.
#include "experts/forward_launches.h"

#include <algorithm>

#include "experts/adapter_views.h"
#include "experts/launches.h"
#include "experts/weight_views.h"

namespace penstock {

void launch_forward(const AdaptedForwardArgs& adapted, const ExpertsProblem& problem,
                    const Backend& backend, const ForwardWorkspace& layout,
                    const Context& context) {
  const ExpertsForwardArgs& args = adapted.experts;
  const ExpertAdapters& adapters = adapted.adapters;
  const RowGroups rows = row_groups_of(args.plan, problem);
  const Workspace scratch = part_of(args.workspace, layout.scratch);
  const ActivationSpec activation = activation_of(args.config);
  const auto [up_rank, down_rank] = problem.adapter_ranks;
  const auto buffer = [&](const Buffer& place, int64_t width) {
    return row_view(address_of(args.workspace, place), width, problem);
  };
  const bool keeps = args.config.save != SavePolicy::nothing;
  const TensorView a = buffer(layout.a, problem.intermediate_size);

  LowRankTerm up_term;
  if (up_rank != 0) {
    up_term = {keeps ? adapted.rows.up : buffer(layout.u1, up_rank),
               halves_of(adapters.up_b, args.config).w};
    backend.up_projection({rows, activation, args.x, single(factor_of(adapters.up_a)), up_term.rows,
                           TensorView{}, scratch},
                          context);
  }
  backend.up_projection({rows, activation, args.x, up_weights_of(args.weights, args.config), args.h,
                         a, scratch, up_term},
                        context);
  LowRankTerm down_term;
  if (down_rank != 0) {
    down_term = {keeps ? adapted.rows.down : buffer(layout.u2, down_rank),
                 {factor_of(adapters.down_b)}};
    backend.down_projection({rows, a, {factor_of(adapters.down_a), {}}, down_term.rows, scratch},
                            context);
  }
  const bool dispatched = args.plan.dispatched();
  const DownWeights down = down_weights_of(args.weights, args.config);
  // One block where there are adapters (with_ranks), so the term has all columns.
  const int64_t width = columns_at_a_time(problem);
  for (int64_t first = 0; first < problem.hidden_size; first += width) {
    const HiddenColumns columns = {first, std::min(width, problem.hidden_size - first)};
    const TensorView output = columns_of(args.output, columns);
    const TensorView y = dispatched ? output : buffer(layout.y, columns.count);
    backend.down_projection({rows, a, columns_of(down, columns), y, scratch, down_term}, context);
    if (!dispatched)
      backend.combine({args.plan, y, args.scores, output}, context);
    else if (args.scores.present())
      backend.scale_rows({rows, args.scores, y, output}, context);
  }
}

}  // namespace penstock
