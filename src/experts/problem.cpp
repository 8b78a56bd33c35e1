// SPDX-License-Identifier: Apache-2.0
//
// Sizes: from a call's tensors (problem_of), their limits, and the bytes kept for backward.
#include "experts/problem.h"

#include <cmath>
#include <string>

#include "tensor/checks.h"

namespace penstock {
namespace {

struct SizeSources {
  const TensorView& x;
  const ExpertWeights& weights;
  const RoutingPlan& plan;
};

ExpertsProblem problem_from(const ExpertsConfig& config, const SizeSources& from) {
  check_rank(from.x, "x", "(T, d)", 2);
  check_rank(from.weights.w1, "weights.w1", "(E, h, d)", 3);
  check_rank(from.weights.w2, "weights.w2", "(E, d, n)", 3);
  check_rank(from.plan.expert_counts, "plan.expert_counts", "(E)", 1);
  ExpertsProblem problem;
  problem.config = config;
  problem.num_tokens = from.x.size(0);
  problem.hidden_size = from.x.size(1);
  problem.intermediate_size =
      from.weights.w2.size(config.weight_order == WeightOrder::output_major ? 2 : 1);
  problem.num_experts = from.plan.num_experts();
  problem.dtype = from.x.dtype;
  problem.device = from.x.device;
  if (from.plan.dispatched()) {
    problem.rows = RowSource::dispatched;
    problem.row_capacity = problem.num_tokens;
    return problem;
  }
  check_rank(from.plan.row_to_token, "plan.row_to_token", "(R_cap)", 1);
  check_rank(from.plan.slot_to_row, "plan.slot_to_row", "(slots)", 1);
  problem.row_capacity = from.plan.row_to_token.numel();
  problem.num_slots = from.plan.slot_to_row.numel();
  return problem;
}

void check_at_least_one(int64_t value, std::string_view name) {
  check_count(value, name, "Split the layer.");
  if (value == 0) fail({std::string(name), "0", "1 or more", "Leave out a layer of no size."});
}

}  // namespace

ExpertsProblem problem_of(const ExpertsForwardArgs& args) {
  return problem_from(args.config, {args.x, args.weights, args.plan});
}

ExpertsProblem problem_of(const ExpertsBackwardArgs& args) {
  return problem_from(args.config, {args.x, args.weights, args.plan});
}

void check_problem(const ExpertsProblem& problem) {
  constexpr std::string_view kSplit = "Split the tokens over several calls.";
  check_at_least_one(problem.hidden_size, "hidden_size");
  check_at_least_one(problem.intermediate_size, "intermediate_size");
  check_at_least_one(problem.num_experts, "num_experts");
  check_count(problem.num_tokens, "num_tokens", kSplit);
  check_count(problem.num_slots, "num_slots", kSplit);
  check_count(problem.row_capacity, "row_capacity", kSplit);
  if (!is_floating(problem.dtype))
    fail({"dtype", std::string(name_of(problem.dtype)),
          "float64, float32, float16 or bfloat16 (from x)", "Convert x and the weights."});
  if (problem.rows == RowSource::dispatched &&
      (problem.num_slots != 0 || problem.num_tokens != problem.row_capacity))
    fail({"problem",
          std::to_string(problem.num_slots) + " slots and " + std::to_string(problem.num_tokens) +
              " tokens",
          "no slots and as many tokens as rows, because rows are dispatched",
          "Set num_slots to 0 and num_tokens to row_capacity."});
  const ExpertsConfig& config = problem.config;
  if (config.activation == Activation::swiglu_clamped &&
      !(config.clamp_limit > 0 && std::isfinite(config.clamp_alpha)))
    fail({"clamp_limit, clamp_alpha",
          std::to_string(config.clamp_limit) + ", " + std::to_string(config.clamp_alpha),
          "a positive limit and a finite alpha", "gpt-oss uses 7 and 1.702."});
}

void check_backward_possible(const ExpertsConfig& config) {
  if (config.save != SavePolicy::nothing) return;
  fail({"save", std::string(name_of(config.save)), "preactivation or input",
        "Run forward with a policy that keeps what backward needs."});
}

int64_t saved_bytes(const ExpertsProblem& problem) {
  check_problem(problem);
  if (problem.config.save == SavePolicy::nothing) return 0;
  constexpr int64_t kIndex = size_of(DType::int32);
  const int64_t score = size_of(accumulator_of(problem.dtype));
  int64_t bytes = (2 * problem.num_experts + 1) * kIndex;
  if (problem.config.save == SavePolicy::preactivation)
    bytes += checked_product(
        {problem.row_capacity, problem.preactivation_size(), size_of(problem.dtype)}, "h");
  if (problem.rows == RowSource::dispatched) return bytes + problem.row_capacity * score;
  return bytes + problem.num_slots * (score + 2 * kIndex) + problem.row_capacity * 2 * kIndex;
}

std::string_view name_of(Activation activation) {
  switch (activation) {
    case Activation::swiglu:
      return "swiglu";
    case Activation::geglu:
      return "geglu";
    case Activation::reglu:
      return "reglu";
    case Activation::swiglu_clamped:
      return "swiglu_clamped";
    case Activation::silu:
      return "silu";
    case Activation::gelu:
      return "gelu";
    case Activation::gelu_tanh:
      return "gelu_tanh";
    case Activation::relu:
      return "relu";
    case Activation::relu_squared:
      return "relu_squared";
  }
  return "unknown";
}

std::string_view name_of(GateLayout layout) {
  return layout == GateLayout::concatenated ? "concatenated" : "interleaved";
}

std::string_view name_of(WeightOrder order) {
  return order == WeightOrder::output_major ? "output_major" : "input_major";
}

std::string_view name_of(SavePolicy policy) {
  switch (policy) {
    case SavePolicy::preactivation:
      return "preactivation";
    case SavePolicy::input:
      return "input";
    case SavePolicy::nothing:
      return "nothing";
  }
  return "unknown";
}

std::string_view name_of(LaunchOrder order) {
  return order == LaunchOrder::fast ? "fast" : "low_memory";
}

std::string_view name_of(KeptH kept) {
  return kept == KeptH::preserved ? "preserved" : "overwritten";
}

}  // namespace penstock
