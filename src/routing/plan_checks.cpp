// SPDX-License-Identifier: Apache-2.0
//
// See plan_checks.h.
#include "routing/plan_checks.h"

#include <string>

#include "tensor/checks.h"

namespace penstock {

void check_plan_arrays(const RoutingPlan& plan, const Routing& routing) {
  check_rank(plan.expert_counts, "plan.expert_counts", "(E)", 1);
  check_rank(plan.row_to_token, "plan.row_to_token", "(R_cap)", 1);
  const int64_t num_experts = plan.num_experts();
  const int64_t row_capacity = plan.row_to_token.numel();
  check_count(row_capacity, "row_capacity", "Split the tokens over several calls.");
  check_count(num_experts, "num_experts", "Use fewer experts.");
  if (num_experts == 0)
    fail({"plan.expert_counts", "no expert", "one count for each expert", "Pass at least one."});
  const DeviceRule device{routing.ids.device, "ids"};
  const DTypeRule index{DType::int32};
  check_tensor(plan.expert_counts, {"plan.expert_counts", "(E)", {num_experts}, index, device});
  check_tensor(plan.expert_offsets,
               {"plan.expert_offsets", "(E+1)", {num_experts + 1}, index, device});
  check_tensor(plan.row_to_token, {"plan.row_to_token", "(R_cap)", {row_capacity}, index, device});
  check_tensor(plan.row_to_slot, {"plan.row_to_slot", "(R_cap)", {row_capacity}, index, device});
  check_tensor(plan.slot_to_row,
               {"plan.slot_to_row", "(slots)", {routing.num_slots()}, index, device});
  if (plan.dropped_slots.present())
    check_tensor(plan.dropped_slots, {"plan.dropped_slots", "(1)", {1}, index, device});
  if (plan.top_k != routing.top_k)
    fail({"plan.top_k", std::to_string(plan.top_k),
          std::to_string(routing.top_k) + " (from the routing)", "Set them alike."});
  if (!routing.token_offsets.present())
    return check_absent(plan.token_offsets, "plan.token_offsets", "the routing has none");
  check_tensor(plan.token_offsets,
               {"plan.token_offsets", "(T+1)", {routing.num_tokens + 1}, index, device});
}

void add_plan_outputs(const RoutingPlan& plan, AliasCheck& aliases) {
  aliases.output(plan.expert_counts, "plan.expert_counts");
  aliases.output(plan.expert_offsets, "plan.expert_offsets");
  aliases.output(plan.row_to_token, "plan.row_to_token");
  aliases.output(plan.row_to_slot, "plan.row_to_slot");
  aliases.output(plan.slot_to_row, "plan.slot_to_row");
  aliases.output(plan.dropped_slots, "plan.dropped_slots");
}

}  // namespace penstock
