// SPDX-License-Identifier: Apache-2.0
//
// The router: checks, then the backend's operation. Without tokens there is nothing to launch,
// except the router weight's gradient, which is then exact zeros.
#include <string>

#include "backend/registry.h"
#include "penstock/routing.h"
#include "tensor/checks.h"
#include "tensor/overlap.h"

namespace penstock {
namespace {

void check_accumulator(const TensorView& view, std::string_view name) {
  if (view.dtype == DType::float32 || view.dtype == DType::float64) return;
  fail({std::string(name), std::string(name_of(view.dtype)), "float32 or float64",
        "Compute it with router_logits, or convert it."});
}

// The sizes of logits (T, E) and K chosen experts.
struct TopKSizes {
  int64_t num_tokens;
  int64_t num_experts;
  int64_t top_k;
};

TopKSizes check_top_k(const TensorView& logits, const TensorView& scores, const TensorView& ids) {
  check_rank(logits, "logits", "(T, E)", 2);
  check_rank(scores, "scores", "(T, K)", 2);
  check_accumulator(logits, "logits");
  const TopKSizes sizes{logits.size(0), logits.size(1), scores.size(1)};
  if (sizes.top_k < 1 || sizes.top_k > sizes.num_experts)
    fail({"top_k", std::to_string(sizes.top_k) + " (from scores)",
          "1 to " + std::to_string(sizes.num_experts) + ", the experts of logits",
          "Choose no more experts than there are."});
  check_count(sizes.num_experts, "num_experts", "Use fewer experts.");
  check_count(checked_product({sizes.num_tokens, sizes.top_k}, "slots"), "slots = T * K",
              "Split the tokens over several calls.");
  const DeviceRule device{logits.device, "logits"};
  const Extents chosen{sizes.num_tokens, sizes.top_k};
  check_tensor(logits, {"logits",
                        "(T, E)",
                        {sizes.num_tokens, sizes.num_experts},
                        {logits.dtype},
                        device,
                        Layout::readable_rows});
  check_tensor(scores, {"scores", "(T, K)", chosen, {logits.dtype, "logits"}, device});
  check_tensor(ids, {"ids", "(T, K)", chosen, {DType::int32}, device});
  return sizes;
}

RouterProblem check_products(const TensorView& x, const TensorView& router_weight) {
  check_rank(x, "x", "(T, d)", 2);
  check_rank(router_weight, "router_weight", "(E, d)", 2);
  if (!is_floating(x.dtype))
    fail({"x", std::string(name_of(x.dtype)), "float64, float32, float16 or bfloat16",
          "Convert it."});
  const DeviceRule device{x.device, "x"};
  const RouterProblem problem{x.size(0), x.size(1), router_weight.size(0), x.dtype, x.device};
  check_tensor(x, {"x",
                   "(T, d)",
                   {problem.num_tokens, problem.hidden_size},
                   {x.dtype},
                   device,
                   Layout::readable_rows});
  check_tensor(router_weight, {"router_weight",
                               "(E, d)",
                               {problem.num_experts, problem.hidden_size},
                               {x.dtype, "x"},
                               device});
  return problem;
}

void check_router_problem(const RouterProblem& problem) {
  check_count(problem.num_tokens, "num_tokens", "Split the tokens over several calls.");
  check_count(problem.hidden_size, "hidden_size", "Use a smaller layer.");
  check_count(problem.num_experts, "num_experts", "Use fewer experts.");
  if (problem.hidden_size == 0 || problem.num_experts == 0)
    fail({"router_weight",
          "(" + std::to_string(problem.num_experts) + ", " + std::to_string(problem.hidden_size) +
              ")",
          "at least one expert and one hidden feature", "Leave out a layer of no size."});
}

TensorSpec logits_spec(std::string_view name, const RouterProblem& problem) {
  return {name,
          "(T, E)",
          {problem.num_tokens, problem.num_experts},
          {accumulator_of(problem.dtype), "the accumulator of x"},
          {problem.device, "x"}};
}

}  // namespace

std::string_view name_of(RouterKind kind) {
  switch (kind) {
    case RouterKind::softmax_topk:
      return "softmax_topk";
    case RouterKind::topk_softmax:
      return "topk_softmax";
    case RouterKind::topk_softmax_normalized:
      return "topk_softmax_normalized";
  }
  return "unknown";
}

int64_t router_workspace_bytes(const RouterProblem& problem, const Context& context) {
  check_router_problem(problem);
  return select_backend(problem.device, problem.dtype, context)
      .router_scratch_bytes(problem, context);
}

void router_forward(const RouterForwardArgs& args, const Context& context) {
  const TopKSizes sizes = check_top_k(args.logits, args.scores, args.ids);
  const Backend& backend = select_backend(args.logits.device, args.logits.dtype, context);
  AliasCheck aliases;
  aliases.input(args.logits, "logits");
  aliases.output(args.scores, "scores");
  aliases.output(args.ids, "ids");
  aliases.run();
  if (sizes.num_tokens > 0) backend.router_forward(args, context);
}

void router_backward(const RouterBackwardArgs& given, const Context& context) {
  RouterBackwardArgs args = given;
  // The gradient of a softmax over the chosen reads no logit: dlogits stands in for their shape.
  const bool shape_only = !given.logits.present() && given.kind == RouterKind::softmax_topk;
  if (shape_only) args.logits = given.dlogits;
  const TopKSizes sizes = check_top_k(args.logits, args.scores, args.ids);
  const DeviceRule device{args.logits.device, "logits"};
  const DTypeRule dtype{args.logits.dtype, "logits"};
  check_tensor(args.dscores, {"dscores", "(T, K)", {sizes.num_tokens, sizes.top_k}, dtype, device});
  check_tensor(args.dlogits,
               {"dlogits", "(T, E)", {sizes.num_tokens, sizes.num_experts}, dtype, device});
  const Backend& backend = select_backend(args.logits.device, args.logits.dtype, context);
  AliasCheck aliases;
  if (!shape_only) aliases.input(args.logits, "logits");
  aliases.input(args.scores, "scores");
  aliases.input(args.ids, "ids");
  aliases.input(args.dscores, "dscores");
  aliases.output(args.dlogits, "dlogits");
  aliases.run();
  if (sizes.num_tokens > 0) backend.router_backward(args, context);
}

void router_logits(const RouterLogitsArgs& args, const Context& context) {
  const RouterProblem problem = check_products(args.x, args.router_weight);
  check_router_problem(problem);
  check_tensor(args.logits, logits_spec("logits", problem));
  const Backend& backend = select_backend(problem.device, problem.dtype, context);
  const int64_t needed = backend.router_scratch_bytes(problem, context);
  check_workspace(args.workspace, needed, "router_workspace_bytes");
  AliasCheck aliases;
  aliases.input(args.x, "x");
  aliases.input(args.router_weight, "router_weight");
  aliases.output(args.logits, "logits");
  aliases.workspace(args.workspace, needed);
  aliases.run();
  if (problem.num_tokens > 0) backend.router_logits(args, context);
}

void router_logits_backward(const RouterLogitsBackwardArgs& args, const Context& context) {
  const RouterProblem problem = check_products(args.x, args.router_weight);
  check_router_problem(problem);
  check_tensor(args.dlogits, logits_spec("dlogits", problem));
  const DeviceRule device{problem.device, "x"};
  const DTypeRule dtype{problem.dtype, "x"};
  if (args.dx.present())
    check_tensor(args.dx,
                 {"dx", "(T, d)", {problem.num_tokens, problem.hidden_size}, dtype, device});
  if (args.drouter_weight.present()) {
    const bool wider =
        args.drouter_weight.dtype == DType::float32 && problem.dtype != DType::float64;
    check_tensor(args.drouter_weight, {"drouter_weight",
                                       "(E, d)",
                                       {problem.num_experts, problem.hidden_size},
                                       wider ? DTypeRule{DType::float32} : dtype,
                                       device});
  }
  const Backend& backend = select_backend(problem.device, problem.dtype, context);
  const int64_t needed = backend.router_scratch_bytes(problem, context);
  check_workspace(args.workspace, needed, "router_workspace_bytes");
  AliasCheck aliases;
  aliases.input(args.dlogits, "dlogits");
  aliases.input(args.x, "x");
  aliases.input(args.router_weight, "router_weight");
  aliases.output(args.dx, "dx");
  aliases.output(args.drouter_weight, "drouter_weight");
  aliases.workspace(args.workspace, needed);
  aliases.run();
  if (args.dx.present() || args.drouter_weight.present())
    backend.router_logits_backward(args, context);
}

}  // namespace penstock
