// SPDX-License-Identifier: Apache-2.0
//
// The router's products: checks, then the backend's operation. Without tokens there is nothing to
// launch, except the router weight's gradient, which is then exact zeros.
#include <string>

#include "backend/registry.h"
#include "penstock/routing.h"
#include "tensor/checks.h"
#include "tensor/overlap.h"

namespace penstock {
namespace {

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

int64_t router_workspace_bytes(const RouterProblem& problem, const Context& context) {
  check_router_problem(problem);
  return select_backend(problem.device, problem.dtype, context)
      .router_scratch_bytes(problem, context);
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
  if (args.addend.present()) {
    if (!args.dx.present())
      fail({"addend", "a tensor without dx", "both or neither", "Ask for dx, or leave it out."});
    check_tensor(args.addend, {"addend",
                               "(T, d)",
                               {problem.num_tokens, problem.hidden_size},
                               dtype,
                               device,
                               Layout::readable_rows});
  }
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
  aliases.input(args.addend, "addend");
  aliases.output(args.dx, "dx");
  aliases.output(args.drouter_weight, "drouter_weight");
  aliases.workspace(args.workspace, needed);
  aliases.run();
  if (args.dx.present() || args.drouter_weight.present())
    backend.router_logits_backward(args, context);
}

}  // namespace penstock
