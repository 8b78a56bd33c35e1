// SPDX-License-Identifier: Apache-2.0
//
// build_plan: checks of a routing and of the plan's arrays, then the backend's counting sort.
// Counts are checked before any pointer is looked at, so a routing too large for int32 is refused
// whatever its tensors hold.
#include <string>

#include "backend/registry.h"
#include "penstock/routing.h"
#include "routing/id_checks.h"
#include "tensor/checks.h"
#include "tensor/overlap.h"

namespace penstock {
namespace {

// A plan does not depend on a storage dtype; every backend that routes at all builds one.
const Backend& plan_backend(Device device, const Context& context) {
  return select_backend(device, DType::float32, context);
}

void check_slots(const Routing& routing) {
  constexpr std::string_view kSplit = "Split the tokens over several calls.";
  check_count(routing.num_tokens, "num_tokens", kSplit);
  if (routing.token_offsets.present()) {
    if (routing.top_k != 0)
      fail({"top_k", std::to_string(routing.top_k), "0, because token_offsets is given",
            "Set one of the two."});
  } else if (routing.top_k < 0) {
    fail({"top_k", std::to_string(routing.top_k), "0 or more", "Pass the experts per token."});
  } else {
    check_count(routing.num_tokens * routing.top_k, "slots = T * K", kSplit);
  }
  check_rank(routing.ids, "ids", "(slots)", 1);
  check_count(routing.ids.numel(), "slots", kSplit);
}

void check_routing(const Routing& routing) {
  const TensorView& ids = routing.ids;
  const DeviceRule device{ids.device, "ids"};
  const int64_t num_slots =
      routing.token_offsets.present() ? ids.numel() : routing.num_tokens * routing.top_k;
  if (ids.dtype != DType::int32 && ids.dtype != DType::int64)
    fail({"ids", std::string(name_of(ids.dtype)), "int32 or int64", "Convert it."});
  check_tensor(ids, {"ids", "(slots)", {num_slots}, {ids.dtype}, device});
  if (routing.scores.present()) {
    const bool wide = routing.scores.dtype == DType::float64;
    check_tensor(
        routing.scores,
        {"scores", "(slots)", {num_slots}, {wide ? DType::float64 : DType::float32}, device});
  }
  if (routing.token_offsets.present())
    check_tensor(routing.token_offsets,
                 {"token_offsets", "(T+1)", {routing.num_tokens + 1}, {DType::int32}, device});
}

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

void check_plan_aliases(const Routing& routing, const RoutingPlan& plan, const Workspace& scratch,
                        int64_t needed) {
  AliasCheck aliases;
  aliases.input(routing.ids, "ids");
  aliases.input(routing.scores, "scores");
  aliases.input(routing.token_offsets, "token_offsets");
  aliases.output(plan.expert_counts, "plan.expert_counts");
  aliases.output(plan.expert_offsets, "plan.expert_offsets");
  aliases.output(plan.row_to_token, "plan.row_to_token");
  aliases.output(plan.row_to_slot, "plan.row_to_slot");
  aliases.output(plan.slot_to_row, "plan.slot_to_row");
  aliases.output(plan.dropped_slots, "plan.dropped_slots");
  if (plan.token_offsets.data != routing.token_offsets.data)  // the routing's own: only read
    aliases.output(plan.token_offsets, "plan.token_offsets");
  aliases.workspace(scratch, needed);
  aliases.run();
}

}  // namespace

int64_t plan_workspace_bytes(int64_t num_slots, int64_t num_experts, Device device,
                             const Context& context) {
  check_count(num_slots, "num_slots", "Split the tokens over several calls.");
  check_count(num_experts, "num_experts", "Use fewer experts.");
  return plan_backend(device, context).plan_scratch_bytes(num_slots, num_experts, context);
}

void build_plan(const Routing& routing, const RoutingPlan& plan, Workspace workspace,
                const Context& context) {
  check_slots(routing);
  check_routing(routing);
  check_plan_arrays(plan, routing);
  const Device device = routing.ids.device;
  const Backend& backend = plan_backend(device, context);
  const int64_t needed =
      backend.plan_scratch_bytes(routing.num_slots(), plan.num_experts(), context);
  check_workspace(workspace, needed, "plan_workspace_bytes");
  check_plan_aliases(routing, plan, workspace, needed);
  if (device.type == DeviceType::cpu && routing.token_offsets.present())
    check_token_offsets(routing);
  if (context.id_checks == IdChecks::checked) {
    if (device.type != DeviceType::cpu)
      throw Error(ErrorCode::unsupported,
                  {"id_checks", "ids on " + name_of(device), "ids on cpu, which the host can read",
                   "Check a copy on the CPU, or use IdChecks::trusted."});
    check_ids(routing, plan.num_experts());
  }
  backend.build_plan({routing, plan, workspace}, context);
}

}  // namespace penstock
