// SPDX-License-Identifier: Apache-2.0
//
// Names of the routers and their options, and the range of each.
#include "routing/router_options.h"

#include <cmath>
#include <string>

#include "tensor/checks.h"

namespace penstock {
namespace {

void check_range(std::string_view what, int64_t value, int64_t low, int64_t high,
                 std::string_view remedy) {
  if (value >= low && value <= high) return;
  fail({std::string(what), std::to_string(value),
        std::to_string(low) + " to " + std::to_string(high), std::string(remedy)});
}

void check_top_k(const RouteProblem& problem) {
  if (problem.top_k >= 1 && problem.top_k <= problem.num_experts) return;
  fail({"top_k",
        std::to_string(problem.top_k) +
            (has_fixed_top_k(problem.kind) ? " (from scores)" : std::string()),
        "1 to " + std::to_string(problem.num_experts) + ", the experts of logits",
        "Choose no more experts than there are."});
}

void check_sigmoid_topk(const RouteProblem& problem) {
  const RouterOptions& options = problem.options;
  check_range("num_groups", options.num_groups, 1, problem.num_experts, "Use 1 for no groups.");
  if (problem.num_experts % options.num_groups != 0)
    fail({"num_groups", std::to_string(options.num_groups),
          "a divisor of " + std::to_string(problem.num_experts) + ", the number of experts",
          "Groups are runs of equal length."});
  check_range("top_groups", options.top_groups, 1, options.num_groups,
              "Choose among the groups that there are.");
  const int64_t choice = problem.num_experts / options.num_groups * options.top_groups;
  if (problem.top_k > choice)
    fail({"top_k", std::to_string(problem.top_k),
          "at most " + std::to_string(choice) + ", the experts of " +
              std::to_string(options.top_groups) + " groups",
          "Choose fewer experts or more groups."});
  if (!std::isfinite(options.scale))
    fail({"scale", std::to_string(options.scale), "a finite factor", "Use 1 for none."});
}

void check_token_rounding(const RouteProblem& problem) {
  if (problem.options.tile < 1)
    fail({"tile", std::to_string(problem.options.tile), "1 or more rows",
          "Pass tile_rows of the experts' problem."});
  check_count(problem.options.tile, "tile", "Use a smaller tile.");
  const int64_t needed = token_rounding_slots(problem);
  if (problem.selection == Selection::chosen && problem.num_slots != needed)
    fail({"slots", std::to_string(problem.num_slots) + " (from scores)",
          std::to_string(needed) + ", from token_rounding_slots",
          "Make scores and ids of that many slots."});
}

void check_expert_choice(const RouteProblem& problem) {
  if (problem.selection == Selection::given) return;
  const int64_t capacity = problem.num_slots / problem.num_experts;
  if (problem.num_slots % problem.num_experts == 0 && capacity <= problem.num_tokens) return;
  fail({"slots", std::to_string(problem.num_slots) + " (from scores)",
        "a multiple of " + std::to_string(problem.num_experts) + " experts, and at most " +
            std::to_string(problem.num_tokens) + " tokens for each",
        "Pass num_experts * capacity slots."});
}

void check_threshold(const RouteProblem& problem) {
  const double threshold = problem.options.threshold;
  if (threshold >= 0.0 && threshold <= 1.0) return;
  fail({"threshold", std::to_string(threshold), "0 to 1, where sigmoid scores lie",
        "Pass the least score that an expert needs."});
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
    case RouterKind::sigmoid_topk:
      return "sigmoid_topk";
    case RouterKind::token_rounding:
      return "token_rounding";
    case RouterKind::expert_choice:
      return "expert_choice";
    case RouterKind::threshold:
      return "threshold";
  }
  return "unknown";
}

std::string_view name_of(ScoreScaling scaling) {
  return scaling == ScoreScaling::normalized ? "normalized" : "plain";
}

std::string_view name_of(RoundingMode mode) {
  switch (mode) {
    case RoundingMode::nearest_count:
      return "NR-f";
    case RoundingMode::stochastic_count:
      return "SR-f";
    case RoundingMode::nearest_score:
      return "NR-s";
    case RoundingMode::balanced_count:
      return "Balance-f";
    case RoundingMode::up:
      return "UP";
    case RoundingMode::down:
      return "DOWN";
  }
  return "unknown";
}

std::string_view name_of(Selection selection) {
  return selection == Selection::chosen ? "chosen" : "given";
}

int64_t token_rounding_slots(const RouteProblem& problem) {
  const int64_t chosen =
      checked_product({problem.num_tokens, int64_t{problem.top_k}}, "slots = T * K");
  const int64_t tile = problem.options.tile;
  if (problem.num_tokens < tile || tile < 1) return chosen;
  return chosen + checked_product({problem.num_experts, tile - 1}, "slots = E * (M - 1)");
}

void check_route_problem(const RouteProblem& problem) {
  constexpr std::string_view kSplit = "Split the tokens over several calls.";
  check_count(problem.num_experts, "num_experts", "Use fewer experts.");
  check_count(problem.num_tokens, "num_tokens", kSplit);
  if (problem.num_experts == 0)
    fail({"logits", "no expert", "one logit for each expert", "Pass at least one."});
  switch (problem.kind) {
    case RouterKind::softmax_topk:
    case RouterKind::topk_softmax:
    case RouterKind::topk_softmax_normalized:
      check_top_k(problem);
      break;
    case RouterKind::sigmoid_topk:
      check_top_k(problem);
      check_sigmoid_topk(problem);
      break;
    case RouterKind::token_rounding:
      check_top_k(problem);
      check_token_rounding(problem);
      break;
    case RouterKind::expert_choice:
      check_expert_choice(problem);
      break;
    case RouterKind::threshold:
      check_threshold(problem);
      break;
  }
  check_count(problem.num_slots, has_fixed_top_k(problem.kind) ? "slots = T * K" : "slots", kSplit);
}

}  // namespace penstock
