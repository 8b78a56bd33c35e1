// SPDX-License-Identifier: Apache-2.0
//
// Counting sort of slots by (expert, slot). The counts double as the cursors of the second pass,
// so a slot that finds no room under the row capacity is simply never counted.
#include "backends/cpu/common/plan.h"

#include <algorithm>
#include <cstdint>

#include "backends/cpu/common/rows.h"

namespace penstock::cpu {
namespace {

// The expert of a slot, or -1 if its id is none: read at full width, so no id wraps into range.
int64_t expert_of(const TensorView& ids, int64_t slot, int64_t num_experts) {
  const int64_t offset = slot * ids.stride(0);
  const int64_t id =
      ids.dtype == DType::int64 ? ids.as<const int64_t>()[offset] : ids.as<const int32_t>()[offset];
  return id >= 0 && id < num_experts ? id : -1;
}

// counts[e] = slots that name e, then exclusive offsets from them.
void count_slots(const Routing& routing, const RoutingPlan& plan) {
  const int64_t num_experts = plan.num_experts();
  int32_t* counts = plan.expert_counts.as<int32_t>();
  int32_t* offsets = plan.expert_offsets.as<int32_t>();
  std::fill_n(counts, num_experts, 0);
  for (int64_t token = 0; token < routing.num_tokens; ++token) {
    const RowRange slots = slots_of(routing.token_offsets, routing.top_k, token);
    for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
      const int64_t expert = expert_of(routing.ids, slot, num_experts);
      if (expert >= 0) ++counts[expert];
    }
  }
  offsets[0] = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert)
    offsets[expert + 1] = offsets[expert] + counts[expert];
}

// Gives every slot its row. Returns how many found the capacity used up.
int32_t place_slots(const Routing& routing, const RoutingPlan& plan) {
  const int64_t num_experts = plan.num_experts();
  const int64_t row_capacity = plan.row_to_token.numel();
  const int32_t* offsets = plan.expert_offsets.as<const int32_t>();
  int32_t* counts = plan.expert_counts.as<int32_t>();
  int32_t* row_to_token = plan.row_to_token.as<int32_t>();
  int32_t* row_to_slot = plan.row_to_slot.as<int32_t>();
  int32_t* slot_to_row = plan.slot_to_row.as<int32_t>();
  std::fill_n(counts, num_experts, 0);
  std::fill_n(slot_to_row, routing.num_slots(), -1);
  int32_t dropped = 0;
  for (int64_t token = 0; token < routing.num_tokens; ++token) {
    const RowRange slots = slots_of(routing.token_offsets, routing.top_k, token);
    for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
      const int64_t expert = expert_of(routing.ids, slot, num_experts);
      if (expert < 0) continue;
      const int64_t row = int64_t{offsets[expert]} + counts[expert];
      if (row >= row_capacity) {
        ++dropped;
        continue;
      }
      ++counts[expert];
      row_to_token[row] = static_cast<int32_t>(token);
      row_to_slot[row] = static_cast<int32_t>(slot);
      slot_to_row[slot] = static_cast<int32_t>(row);
    }
  }
  return dropped;
}

}  // namespace

void build_plan(const PlanArgs& args) {
  const Routing& routing = args.routing;
  const RoutingPlan& plan = args.plan;
  count_slots(routing, plan);
  const int32_t dropped = place_slots(routing, plan);

  // Rows past the capacity do not exist, so no offset may point there.
  const int64_t row_capacity = plan.row_to_token.numel();
  const int64_t num_experts = plan.num_experts();
  int32_t* offsets = plan.expert_offsets.as<int32_t>();
  for (int64_t expert = 0; expert <= num_experts; ++expert)
    offsets[expert] = static_cast<int32_t>(std::min<int64_t>(offsets[expert], row_capacity));

  const int64_t num_rows = offsets[num_experts];
  std::fill_n(plan.row_to_token.as<int32_t>() + num_rows, row_capacity - num_rows, -1);
  std::fill_n(plan.row_to_slot.as<int32_t>() + num_rows, row_capacity - num_rows, -1);
  if (plan.token_offsets.present() && plan.token_offsets.data != routing.token_offsets.data) {
    std::copy_n(routing.token_offsets.as<const int32_t>(), routing.num_tokens + 1,
                plan.token_offsets.as<int32_t>());
  }
  if (plan.dropped_slots.present()) *plan.dropped_slots.as<int32_t>() = dropped;
}

}  // namespace penstock::cpu
