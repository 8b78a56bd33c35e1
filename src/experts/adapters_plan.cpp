// SPDX-License-Identifier: Apache-2.0
//
// See adapters_plan.h.
#include "experts/adapters_plan.h"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "backend/registry.h"
#include "experts/problem.h"
#include "experts/weight_views.h"
#include "tensor/checks.h"

namespace penstock {
namespace {

enum ForwardLaunch : int { kUpFactor, kUp, kDownFactor, kDown, kCombine };
enum BackwardLaunch : int {
  kUpFactorAgain,
  kRecompute,
  kDownFactorGradient,
  kDownBackward,
  kScoreGradient,
  kDownAdapterGradients,
  kUpFactorGradient,
  kUpAdapterGradients,
  kUpBackward,
  kCombineGradient,
};

int64_t rows_bytes(const AdaptedProblem& problem, int64_t width, DType dtype) {
  return checked_product({problem.experts.row_capacity, width, size_of(dtype)}, "workspace");
}

// Every product of the call is at most as large as one of a layer whose sizes cover the ranks.
int64_t scratch_bytes(const AdaptedProblem& problem, const Backend& backend,
                      const Context& context) {
  ExpertsProblem covering = problem.experts;
  const int64_t rank = std::max(problem.up_rank, problem.down_rank);
  covering.hidden_size = std::max(covering.hidden_size, rank);
  covering.intermediate_size = std::max(covering.intermediate_size, rank);
  return backend.scratch_bytes(covering, context);
}

bool dispatched(const AdaptedProblem& problem) {
  return problem.experts.rows == RowSource::dispatched;
}

struct Factor {
  TensorView ExpertAdapters::*member;
  std::string_view name;
  std::string_view grad_name;
  std::string_view axes;
  Extents extents;
};

std::array<Factor, 4> factors(const AdaptedProblem& problem) {
  const ExpertsProblem& experts = problem.experts;
  const int64_t num_experts = experts.num_experts;
  return {{
      {&ExpertAdapters::up_a,
       "adapters.up_a",
       "grads.up_a",
       "(E, r1, d)",
       {num_experts, problem.up_rank, experts.hidden_size}},
      {&ExpertAdapters::up_b,
       "adapters.up_b",
       "grads.up_b",
       "(E, h, r1)",
       {num_experts, experts.preactivation_size(), problem.up_rank}},
      {&ExpertAdapters::down_a,
       "adapters.down_a",
       "grads.down_a",
       "(E, r2, n)",
       {num_experts, problem.down_rank, experts.intermediate_size}},
      {&ExpertAdapters::down_b,
       "adapters.down_b",
       "grads.down_b",
       "(E, d, r2)",
       {num_experts, experts.hidden_size, problem.down_rank}},
  }};
}

void check_factor(const TensorView& view, std::string_view name, const Factor& factor,
                  const ExpertsProblem& problem) {
  check_tensor(view, {name,
                      factor.axes,
                      factor.extents,
                      {problem.dtype, "x"},
                      {problem.device, "x"},
                      Layout::matrices});
}

int64_t rank_of(const TensorView& a, const TensorView& b, std::string_view a_name,
                std::string_view b_name) {
  if (!a.present() && !b.present()) return 0;
  check_present(a, a_name);
  check_present(b, b_name);
  check_rank(a, a_name, "(E, rank, inputs)", 3);
  return a.size(1);
}

}  // namespace

AdaptedForwardWorkspace plan_adapted_forward(const AdaptedProblem& problem, const Backend& backend,
                                             const Context& context) {
  const ExpertsProblem& experts = problem.experts;
  AdaptedForwardWorkspace plan;
  plan.a.bytes = rows_bytes(problem, experts.intermediate_size, experts.dtype);
  if (!dispatched(problem)) plan.y.bytes = rows_bytes(problem, experts.hidden_size, experts.dtype);
  plan.u1.bytes = rows_bytes(problem, problem.up_rank, experts.dtype);
  plan.u2.bytes = rows_bytes(problem, problem.down_rank, experts.dtype);
  plan.scratch.bytes = scratch_bytes(problem, backend, context);
  plan.bytes = place({{&plan.a, kUp, kDown},
                      {&plan.y, kDown, kCombine},
                      {&plan.u1, kUpFactor, kUp},
                      {&plan.u2, kDownFactor, kDown},
                      {&plan.scratch, kUpFactor, kCombine}});
  return plan;
}

AdaptedBackwardWorkspace plan_adapted_backward(const AdaptedProblem& problem,
                                               const Backend& backend, const Context& context) {
  const ExpertsProblem& experts = problem.experts;
  AdaptedBackwardWorkspace plan;
  plan.dh.bytes = rows_bytes(problem, experts.preactivation_size(), experts.dtype);
  plan.a_scaled.bytes = rows_bytes(problem, experts.intermediate_size, experts.dtype);
  plan.partials.bytes =
      rows_bytes(problem, backend.score_partials(experts), accumulator_of(experts.dtype));
  if (!dispatched(problem))
    plan.dx_rows.bytes = rows_bytes(problem, experts.hidden_size, experts.dtype);
  plan.u1.bytes = plan.v1.bytes = rows_bytes(problem, problem.up_rank, experts.dtype);
  plan.u2.bytes = plan.v2.bytes = rows_bytes(problem, problem.down_rank, experts.dtype);
  plan.scratch.bytes = scratch_bytes(problem, backend, context);
  plan.bytes = place({{&plan.dh, kRecompute, kUpBackward},
                      {&plan.a_scaled, kDownBackward, kDownAdapterGradients},
                      {&plan.partials, kDownBackward, kScoreGradient},
                      {&plan.dx_rows, kUpBackward, kCombineGradient},
                      {&plan.u1, kUpFactorAgain, kUpAdapterGradients},
                      {&plan.u2, kDownAdapterGradients, kDownAdapterGradients},
                      {&plan.v1, kUpFactorGradient, kUpBackward},
                      {&plan.v2, kDownFactorGradient, kDownAdapterGradients},
                      {&plan.scratch, kUpFactorAgain, kCombineGradient}});
  return plan;
}

void check_ranks(const AdaptedProblem& problem) {
  for (const auto& [rank, name] : {std::pair{problem.up_rank, "rank of adapters.up_a"},
                                   std::pair{problem.down_rank, "rank of adapters.down_a"}})
    check_count(rank, name, "Use a smaller rank.");
  if (problem.up_rank == 0 && problem.down_rank == 0)
    fail({"adapters", "none", "an adapter on one projection at least",
          "Call experts_forward, or pass factors of rank 1 or more."});
}

AdaptedProblem adapted_problem_of(ExpertsProblem experts, const ExpertAdapters& adapters) {
  AdaptedProblem problem{experts};
  problem.up_rank = rank_of(adapters.up_a, adapters.up_b, "adapters.up_a", "adapters.up_b");
  problem.down_rank =
      rank_of(adapters.down_a, adapters.down_b, "adapters.down_a", "adapters.down_b");
  return problem;
}

void check_adapters(const ExpertAdapters& adapters, const AdaptedProblem& problem) {
  check_ranks(problem);
  for (const Factor& factor : factors(problem))
    if ((adapters.*factor.member).present())
      check_factor(adapters.*factor.member, factor.name, factor, problem.experts);
}

void check_adapter_grads(const ExpertAdapters& grads, const ExpertAdapters& adapters,
                         const AdaptedProblem& problem) {
  for (const Factor& factor : factors(problem)) {
    const TensorView& view = grads.*factor.member;
    if (!view.present()) continue;
    if (!(adapters.*factor.member).present())
      check_absent(view, factor.grad_name, std::string(factor.name) + " is absent");
    check_factor(view, factor.grad_name, factor, problem.experts);
  }
}

const Backend& select_adapted_backend(const AdaptedProblem& problem, const Context& context) {
  ExpertsProblem asked = problem.experts;
  asked.adapter_ranks = {problem.up_rank, problem.down_rank};
  return select_backend(asked, context);
}

GroupedMatrix factor_of(const TensorView& view) {
  if (!view.present()) return {};
  return {view.data, view.dtype, view.stride(0), view.stride(1), view.stride(2)};
}

GroupedMatrix transposed(const GroupedMatrix& matrix) {
  GroupedMatrix result = matrix;
  std::swap(result.row_stride, result.col_stride);
  return result;
}

UpWeights single(const GroupedMatrix& matrix) {
  UpWeights weights;
  weights.w[0] = matrix;
  return weights;
}

UpWeights halves_of(const TensorView& up_b, const ExpertsConfig& config) {
  ExpertsConfig output_major = config;
  output_major.weight_order = WeightOrder::output_major;
  ExpertWeights weights;
  weights.w1 = up_b;
  return up_weights_of(weights, output_major);
}

}  // namespace penstock
