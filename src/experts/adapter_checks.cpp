// SPDX-License-Identifier: Apache-2.0
//
// See adapter_checks.h.
#include "experts/adapter_checks.h"

#include <array>
#include <string>
#include <utility>

#include "tensor/checks.h"

namespace penstock {
namespace {

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

void check_adapter_rows(const AdapterRows& rows, const AdaptedProblem& problem) {
  const ExpertsProblem& experts = problem.experts;
  struct Expected {
    const TensorView& view;
    std::string_view name;
    std::string_view axes;
    int64_t rank;
  };
  for (const Expected& expected :
       {Expected{rows.up, "rows.up", "(R_cap, r1)", problem.up_rank},
        Expected{rows.down, "rows.down", "(R_cap, r2)", problem.down_rank}}) {
    if (experts.config.save == SavePolicy::nothing) {
      check_absent(expected.view, expected.name, "save is nothing");
    } else if (expected.rank == 0) {
      check_absent(expected.view, expected.name, "the projection has no adapter");
    } else {
      check_tensor(expected.view, {expected.name,
                                   expected.axes,
                                   {experts.row_capacity, expected.rank},
                                   {experts.dtype, "x"},
                                   {experts.device, "x"}});
    }
  }
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

ExpertsProblem with_ranks(const AdaptedProblem& problem) {
  ExpertsProblem asked = problem.experts;
  asked.adapter_ranks = {problem.up_rank, problem.down_rank};
  asked.config.order = LaunchOrder::fast;
  asked.config.kept_h = KeptH::preserved;
  return asked;
}

}  // namespace penstock
