// SPDX-License-Identifier: Apache-2.0
//
// The choice of a backend: by name it is never replaced, without one the device's order decides,
// and every refusal says why.
#include "backend/registry.h"

#include <gtest/gtest.h>

#include "support/backends.h"
#include "support/compare.h"

namespace penstock::test {
namespace {

ExpertsProblem problem_in(DType dtype, Device device = {}) {
  ExpertsProblem problem;
  problem.num_tokens = problem.num_slots = problem.row_capacity = 4;
  problem.hidden_size = problem.intermediate_size = problem.num_experts = 2;
  problem.dtype = dtype;
  problem.device = device;
  return problem;
}

TEST(Registry, ListsTheReferenceWithEveryOperation) {
  bool found = false;
  for (const BackendInfo& info : list_backends()) {
    EXPECT_EQ(info.available, info.reason.empty());
    EXPECT_FALSE(info.description.empty());
    if (info.name != "reference") continue;
    found = true;
    EXPECT_TRUE(info.available);
    EXPECT_EQ(info.operations.size(), 14u);
  }
  EXPECT_TRUE(found);
}

TEST(Registry, WithoutANameTheFirstThatCanRunIsChosen) {
  for (DType dtype : {DType::float64, DType::float32, DType::bfloat16, DType::float16}) {
    const ExpertsProblem problem = problem_in(dtype);
    std::string first;
    for (const BackendInfo& info : list_backends())
      if (first.empty() && why_not(info.name, problem).empty()) first = info.name;
    EXPECT_EQ(chosen_backend(problem, {}), first);
  }
}

TEST(Registry, ANamedBackendIsNeverReplaced) {
  for (const BackendInfo& info : list_backends()) {
    const ExpertsProblem problem = problem_in(DType::float64);
    const std::string reason = why_not(info.name, problem);
    if (reason.empty())
      EXPECT_EQ(chosen_backend(problem, context_of(info.name)), info.name);
    else
      expect_error([&] { chosen_backend(problem, context_of(info.name)); }, ErrorCode::unsupported,
                   {info.name.c_str(), reason.c_str(), "float64"});
  }
}

TEST(Registry, AnUnknownNameListsTheKnownOnes) {
  expect_invalid([] { chosen_backend(problem_in(DType::float32), context_of("warp")); },
                 {"'warp'", "reference"});
  expect_invalid([] { why_not("warp", problem_in(DType::float32)); }, {"'warp'", "reference"});
}

TEST(Registry, TensorsElsewhereAreAReason) {
  const ExpertsProblem problem = problem_in(DType::float32, {DeviceType::cuda, 3});
  expect_contains(why_not("reference", problem), "cuda:3");
  expect_error([&] { chosen_backend(problem, context_of("reference")); }, ErrorCode::unsupported,
               {"reference", "cuda:3"});
}

TEST(Registry, ADTypeThatNoneRunsGivesEveryReason) {
  expect_error([] { select_backend(Device{}, DType::int32, {}); }, ErrorCode::unsupported,
               {"int32", "reference:"});
}

TEST(Registry, ContextsAreChecked) {
  expect_invalid([] { chosen_backend(problem_in(DType::float32), context_of("", -1)); },
                 {"threads", "-1"});
  Context context;
  context.sm_budget = -2;
  expect_invalid([&] { chosen_backend(problem_in(DType::float32), context); }, {"sm_budget"});
}

}  // namespace
}  // namespace penstock::test
