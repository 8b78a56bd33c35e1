// SPDX-License-Identifier: Apache-2.0
//
// build_plan: checks of a routing and of the plan's arrays, then the backend's counting sort.
// Counts are checked before any pointer is looked at, so a routing too large for int32 is refused
// whatever its tensors hold.
#include <string>

#include "backend/registry.h"
#include "penstock/routing.h"
#include "routing/id_checks.h"
#include "routing/plan_checks.h"
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

void check_plan_aliases(const Routing& routing, const RoutingPlan& plan, const Workspace& scratch,
                        int64_t needed) {
  AliasCheck aliases;
  aliases.input(routing.ids, "ids");
  aliases.input(routing.scores, "scores");
  aliases.input(routing.token_offsets, "token_offsets");
  add_plan_outputs(plan, aliases);
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
