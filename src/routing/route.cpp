// SPDX-License-Identifier: Apache-2.0
//
// Routing by logits: checks, then the backend's router. With a fixed K and no tokens there is
// nothing to launch; without a fixed K the offsets and the report are written even then.
#include <string>

#include "backend/registry.h"
#include "penstock/routing.h"
#include "routing/id_checks.h"
#include "routing/plan_checks.h"
#include "routing/router_options.h"
#include "tensor/checks.h"
#include "tensor/overlap.h"

namespace penstock {
namespace {

void check_accumulator(const TensorView& view, std::string_view name) {
  if (view.dtype == DType::float32 || view.dtype == DType::float64) return;
  fail({std::string(name), std::string(name_of(view.dtype)), "float32 or float64",
        "Compute it with router_logits, or convert it."});
}

// The problem of a call by the shapes of its tensors; forward and backward have these in common.
template <typename Args>
RouteProblem problem_of(const Args& args) {
  check_rank(args.logits, "logits", "(T, E)", 2);
  const bool fixed = has_fixed_top_k(args.kind);
  check_rank(args.scores, "scores", fixed ? "(T, K)" : "(slots)", fixed ? 2 : 1);
  check_accumulator(args.logits, "logits");
  RouteProblem problem;
  problem.kind = args.kind;
  problem.options = args.options;
  problem.num_tokens = args.logits.size(0);
  problem.num_experts = args.logits.size(1);
  problem.dtype = args.logits.dtype;
  problem.device = args.logits.device;
  if (!fixed) {
    problem.num_slots = args.scores.numel();
    problem.top_k = args.top_k;
    return problem;
  }
  check_count(args.scores.size(1), "top_k", "Choose no more experts than there are.");
  problem.top_k = static_cast<int32_t>(args.scores.size(1));
  problem.num_slots = checked_product({problem.num_tokens, args.scores.size(1)}, "slots = T * K");
  return problem;
}

// What scores, ids and dscores look like.
TensorSpec slots_spec(std::string_view name, const RouteProblem& problem, DTypeRule dtype) {
  const DeviceRule device{problem.device, "logits"};
  if (has_fixed_top_k(problem.kind))
    return {name, "(T, K)", {problem.num_tokens, int64_t{problem.top_k}}, dtype, device};
  return {name, "(slots)", {problem.num_slots}, dtype, device};
}

template <typename Args>
void check_slots(const Args& args, const RouteProblem& problem) {
  const DeviceRule device{problem.device, "logits"};
  check_tensor(args.logits, {"logits",
                             "(T, E)",
                             {problem.num_tokens, problem.num_experts},
                             {problem.dtype},
                             device,
                             Layout::readable_rows});
  check_tensor(args.scores, slots_spec("scores", problem, {problem.dtype, "logits"}));
  check_tensor(args.ids, slots_spec("ids", problem, {DType::int32}));
  if (has_fixed_top_k(problem.kind))
    return check_absent(args.token_offsets, "token_offsets", "every token has K slots");
  check_tensor(args.token_offsets,
               {"token_offsets", "(T+1)", {problem.num_tokens + 1}, {DType::int32}, device});
}

void check_router_inputs(const RouterForwardArgs& args, const RouteProblem& problem) {
  const DeviceRule device{problem.device, "logits"};
  if (args.bias.present() && args.kind == RouterKind::sigmoid_topk) {
    check_tensor(args.bias,
                 {"bias", "(E)", {problem.num_experts}, {problem.dtype, "logits"}, device});
  } else {
    check_absent(args.bias, "bias", "only sigmoid_topk has one");
  }
  const bool drawn = args.kind == RouterKind::token_rounding &&
                     args.options.rounding == RoundingMode::stochastic_count &&
                     args.selection == Selection::chosen;
  if (drawn) {
    check_tensor(args.seed, {"seed", "(1)", {1}, {DType::int64}, device});
  } else {
    check_absent(args.seed, "seed", "nothing is drawn at random");
  }
  if (!args.report.present()) return;
  if (has_fixed_top_k(args.kind))
    return check_absent(args.report, "report", "every token has K experts");
  check_tensor(args.report,
               {"report", "(kRouterReportSize)", {kRouterReportSize}, {DType::int32}, device});
}

// A plan that the router hands over: of the slots that it fills, a row for each.
void check_router_plan(const RouterForwardArgs& args) {
  const RoutingPlan& plan = args.plan;
  if (!plan.present()) return;
  constexpr std::string_view kBuild = "only a router without a fixed K that chooses hands one over";
  if (has_fixed_top_k(args.kind) || args.selection == Selection::given)
    return check_absent(plan.expert_counts, "plan.expert_counts", kBuild);
  check_absent(plan.dropped_slots, "plan.dropped_slots", "every slot has a row");
  RoutingPlan arrays = plan;
  arrays.token_offsets = args.token_offsets;
  check_plan_arrays(arrays, chosen_routing(args));
  const int64_t num_experts = args.logits.size(1);
  const int64_t num_slots = args.ids.numel();
  if (plan.num_experts() != num_experts)
    fail({"plan.expert_counts", std::to_string(plan.num_experts()) + " experts",
          std::to_string(num_experts) + ", as the logits have", "Size it by the logits."});
  if (plan.row_to_token.numel() != num_slots)
    fail({"plan.row_to_token", std::to_string(plan.row_to_token.numel()) + " rows",
          std::to_string(num_slots) + ", one for each slot", "Size it by the ids."});
  if (plan.token_offsets.present() && plan.token_offsets.data != args.token_offsets.data)
    fail({"plan.token_offsets", "an array of its own", "token_offsets, or none",
          "Leave it out: the router's are the plan's."});
}

// Offsets that a replay is given address memory.
void check_given_offsets(const RouterForwardArgs& args, const RouteProblem& problem) {
  if (args.selection == Selection::chosen || !args.token_offsets.present()) return;
  if (problem.device.type != DeviceType::cpu) return;
  Routing given;
  given.ids = args.ids;
  given.token_offsets = args.token_offsets;
  given.num_tokens = problem.num_tokens;
  check_token_offsets(given);
}

// The backend of a backward pass, or of a question about one. Whether the ids were chosen or given
// makes no difference to it, so a backend that cannot replay is no reason against it.
const Backend& backend_of(RouteProblem problem, const Context& context) {
  problem.selection = Selection::chosen;
  return select_backend(problem, context);
}

void check_forward_aliases(const RouterForwardArgs& args, int64_t needed) {
  AliasCheck aliases;
  aliases.input(args.logits, "logits");
  aliases.input(args.bias, "bias");
  aliases.input(args.seed, "seed");
  aliases.output(args.scores, "scores");
  if (args.selection == Selection::chosen) {
    aliases.output(args.ids, "ids");
    aliases.output(args.token_offsets, "token_offsets");
    aliases.output(args.report, "report");
    add_plan_outputs(args.plan, aliases);
  } else {
    aliases.input(args.ids, "ids");
    aliases.input(args.token_offsets, "token_offsets");
  }
  aliases.workspace(args.workspace, needed);
  aliases.run();
}

}  // namespace

int64_t route_workspace_bytes(const RouteProblem& problem, const Context& context) {
  check_route_problem(problem);
  return backend_of(problem, context).route_scratch_bytes(problem, context);
}

void router_forward(const RouterForwardArgs& args, const Context& context) {
  RouteProblem problem = problem_of(args);
  problem.selection = args.selection;
  check_route_problem(problem);
  check_slots(args, problem);
  check_router_inputs(args, problem);
  check_router_plan(args);
  const Backend& backend = select_backend(problem, context);
  const int64_t needed = backend.route_scratch_bytes(problem, context);
  check_workspace(args.workspace, needed, "route_workspace_bytes");
  check_forward_aliases(args, needed);
  check_given_offsets(args, problem);
  if (problem.num_tokens > 0 || !has_fixed_top_k(args.kind)) backend.router_forward(args, context);
}

void router_backward(const RouterBackwardArgs& given, const Context& context) {
  RouterBackwardArgs args = given;
  // The gradient of a softmax over the chosen reads no logit: dlogits stands in for their shape.
  const bool shape_only = !given.logits.present() && given.kind == RouterKind::softmax_topk;
  if (shape_only) args.logits = given.dlogits;
  RouteProblem problem = problem_of(args);
  problem.selection = Selection::given;
  check_route_problem(problem);
  check_slots(args, problem);
  check_tensor(args.dscores, slots_spec("dscores", problem, {problem.dtype, "logits"}));
  check_tensor(args.dlogits, {"dlogits",
                              "(T, E)",
                              {problem.num_tokens, problem.num_experts},
                              {problem.dtype, "logits"},
                              {problem.device, "logits"}});
  const Backend& backend = backend_of(problem, context);
  const int64_t needed = backend.route_scratch_bytes(problem, context);
  check_workspace(args.workspace, needed, "route_workspace_bytes");
  AliasCheck aliases;
  if (!shape_only) aliases.input(args.logits, "logits");
  aliases.input(args.scores, "scores");
  aliases.input(args.ids, "ids");
  aliases.input(args.token_offsets, "token_offsets");
  aliases.input(args.dscores, "dscores");
  aliases.output(args.dlogits, "dlogits");
  aliases.workspace(args.workspace, needed);
  aliases.run();
  if (problem.num_tokens > 0) backend.router_backward(args, context);
}

}  // namespace penstock
