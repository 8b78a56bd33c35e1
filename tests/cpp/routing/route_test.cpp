// SPDX-License-Identifier: Apache-2.0
//
// Every router through the public calls on every CPU backend: exact workspaces whose content does
// not matter, tokens without a fixed number of experts, replays, and what is refused. What a router
// chooses is tested against its paper's equations in tests/python/test_routers.py.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "penstock/penstock.h"
#include "support/backends.h"
#include "support/compare.h"
#include "support/memory.h"

namespace penstock::test {
namespace {

constexpr int64_t kTokens = 40, kExperts = 12, kTopK = 3, kTile = 8;
constexpr RouterKind kEveryKind[] = {
    RouterKind::softmax_topk, RouterKind::topk_softmax,   RouterKind::topk_softmax_normalized,
    RouterKind::sigmoid_topk, RouterKind::token_rounding, RouterKind::expert_choice,
    RouterKind::threshold};

RouteProblem problem_of(RouterKind kind, DType dtype) {
  RouteProblem problem;
  problem.kind = kind;
  problem.options.num_groups = 4;
  problem.options.top_groups = 2;
  problem.options.tile = kTile;
  problem.num_tokens = kTokens;
  problem.num_experts = kExperts;
  problem.top_k = kTopK;
  problem.dtype = dtype;
  problem.num_slots = kTokens * kTopK;
  if (kind == RouterKind::token_rounding) problem.num_slots = token_rounding_slots(problem);
  if (kind == RouterKind::expert_choice) problem.num_slots = kExperts * 10;
  if (kind == RouterKind::threshold) problem.num_slots = kTokens * kExperts;
  return problem;
}

// A call of a router with all that it writes.
struct RouteCall {
  explicit RouteCall(const RouteProblem& route_problem, uint8_t scratch_fill = kPoison)
      : problem(route_problem), logits(problem.dtype, {kTokens, kExperts}) {
    Random random(11);
    for (int64_t t = 0; t < kTokens; ++t)
      for (int64_t e = 0; e < kExperts; ++e) set(logits.view(), {t, e}, random.value());
    const bool fixed = has_fixed_top_k(problem.kind);
    scores = fixed ? Tensor(problem.dtype, {kTokens, kTopK})
                   : Tensor(problem.dtype, {problem.num_slots});
    ids =
        fixed ? Tensor(DType::int32, {kTokens, kTopK}) : Tensor(DType::int32, {problem.num_slots});
    args = {problem.kind, logits.view(), scores.view(), ids.view()};
    args.options = problem.options;
    if (!fixed) {
      offsets = Tensor(DType::int32, {kTokens + 1});
      report = Tensor(DType::int32, {kRouterReportSize});
      args.token_offsets = offsets.view();
      args.report = report.view();
      args.top_k = kTopK;
    }
    fill = scratch_fill;
  }

  void run(const Context& context) {
    args.workspace = {};
    RouteProblem asked = problem;
    asked.selection = args.selection;
    const int64_t bytes = route_workspace_bytes(asked, context);
    scratch = Block(bytes, fill);
    args.workspace = {scratch.data(), bytes};
    router_forward(args, context);
    EXPECT_TRUE(scratch.guards_intact() && scores.block().guards_intact() &&
                ids.block().guards_intact() && offsets.block().guards_intact() &&
                report.block().guards_intact());
  }

  int64_t reported(RouterReport which) const {
    return static_cast<int64_t>(get(report.view(), {static_cast<int64_t>(which)}));
  }

  RouteProblem problem;
  Tensor logits, scores, ids, offsets, report;
  Block scratch;
  RouterForwardArgs args;
  uint8_t fill = kPoison;
};

class RouteTest : public testing::TestWithParam<Run> {
 protected:
  DType wide() const { return accumulator_of(GetParam().dtype); }
  Context context() const { return context_of(GetParam().backend); }
};

TEST_P(RouteTest, WhatIsInTheWorkspaceDoesNotMatter) {
  for (RouterKind kind : kEveryKind) {
    RouteCall first(problem_of(kind, wide()), 0x00), second(problem_of(kind, wide()), 0xFF);
    first.run(context());
    second.run(context());
    EXPECT_EQ(first.ids.block().contents(), second.ids.block().contents()) << name_of(kind);
    EXPECT_EQ(first.scores.block().contents(), second.scores.block().contents()) << name_of(kind);
    EXPECT_EQ(first.offsets.block().contents(), second.offsets.block().contents());
    EXPECT_EQ(first.report.block().contents(), second.report.block().contents());
  }
}

TEST_P(RouteTest, AWorkspaceOneByteShortIsRefused) {
  for (RouterKind kind : kEveryKind) {
    RouteCall call(problem_of(kind, wide()));
    call.run(context());
    if (call.args.workspace.bytes == 0) continue;
    --call.args.workspace.bytes;
    expect_invalid([&] { router_forward(call.args, context()); },
                   {"workspace", "route_workspace_bytes"});
  }
}

TEST_P(RouteTest, BackwardNeedsTheWorkspaceOfAReplay) {
  for (RouterKind kind : kEveryKind) {
    RouteCall call(problem_of(kind, wide()));
    call.run(context());
    RouteProblem replay = call.problem;
    replay.selection = Selection::given;
    Block scratch(route_workspace_bytes(replay, context()));
    Tensor dlogits(wide(), {kTokens, kExperts});
    RouterBackwardArgs args{
        kind,          call.logits.view(), call.scores.view(), call.ids.view(), call.scores.view(),
        dlogits.view()};
    args.options = call.args.options;
    args.top_k = call.args.top_k;
    args.token_offsets = call.args.token_offsets;
    args.workspace = {scratch.data(), scratch.bytes()};
    router_backward(args, context());
    for (int64_t t = 0; t < kTokens; ++t)
      for (int64_t e = 0; e < kExperts; ++e)
        ASSERT_FALSE(std::isnan(get(dlogits.view(), {t, e}))) << name_of(kind);
    EXPECT_TRUE(dlogits.block().guards_intact() && scratch.guards_intact());
  }
}

TEST_P(RouteTest, AReplayScoresTheGivenIdsWithTheSameBits) {
  for (RouterKind kind : kEveryKind) {
    RouteCall chosen(problem_of(kind, wide())), replayed(problem_of(kind, wide()));
    chosen.run(context());
    replayed.args.ids = chosen.ids.view();
    if (!has_fixed_top_k(kind)) replayed.args.token_offsets = chosen.offsets.view();
    replayed.args.selection = Selection::given;
    replayed.run(context());
    EXPECT_EQ(chosen.scores.block().contents(), replayed.scores.block().contents())
        << name_of(kind);
  }
}

TEST_P(RouteTest, AReplayChecksTheOffsetsThatItIsGiven) {
  RouteCall call(problem_of(RouterKind::expert_choice, wide()));
  call.run(context());
  call.args.selection = Selection::given;
  call.offsets.view().as<int32_t>()[kTokens] += 1;
  expect_invalid([&] { call.run(context()); }, {"token_offsets", "at most 120"});
  call.offsets.view().as<int32_t>()[kTokens] -= 2;
  expect_invalid([&] { call.run(context()); }, {"ids", "slot 119", "-1"});
}

TEST_P(RouteTest, RoundedCountsAreWholeTilesAndReported) {
  RouteCall call(problem_of(RouterKind::token_rounding, wide()));
  call.run(context());
  std::vector<int64_t> counts(kExperts, 0);
  const int64_t pairs = call.reported(RouterReport::pairs);
  for (int64_t slot = 0; slot < pairs; ++slot)
    ++counts[static_cast<size_t>(get(call.ids.view(), {slot}))];
  for (int64_t count : counts) EXPECT_EQ(count % kTile, 0);
  for (int64_t slot = pairs; slot < call.problem.num_slots; ++slot) {
    EXPECT_EQ(get(call.ids.view(), {slot}), -1);
    EXPECT_EQ(get(call.scores.view(), {slot}), 0);
  }
  EXPECT_EQ(pairs, kTokens * kTopK + call.reported(RouterReport::added) -
                       call.reported(RouterReport::dropped));
  EXPECT_EQ(call.reported(RouterReport::rounded), 1);
}

// A plan's arrays for a problem, filled by whoever gets the views.
struct PlanArrays {
  explicit PlanArrays(const RouteProblem& problem)
      : counts(DType::int32, {problem.num_experts}),
        offsets(DType::int32, {problem.num_experts + 1}),
        row_to_token(DType::int32, {problem.num_slots}),
        row_to_slot(DType::int32, {problem.num_slots}),
        slot_to_row(DType::int32, {problem.num_slots}) {}

  RoutingPlan views() const {
    return {.expert_counts = counts.view(),
            .expert_offsets = offsets.view(),
            .row_to_token = row_to_token.view(),
            .row_to_slot = row_to_slot.view(),
            .slot_to_row = slot_to_row.view(),
            .token_offsets = {},
            .dropped_slots = {}};
  }

  Tensor counts, offsets, row_to_token, row_to_slot, slot_to_row;
};

TEST_P(RouteTest, HandsOverThePlanThatBuildPlanMakes) {
  for (RouterKind kind : kEveryKind) {
    if (has_fixed_top_k(kind)) continue;
    RouteCall call(problem_of(kind, wide()));
    const PlanArrays handed(call.problem), built(call.problem);
    call.args.plan = handed.views();
    call.run(context());
    RoutingPlan plan = built.views();
    plan.token_offsets = call.offsets.view();
    Block scratch(plan_workspace_bytes(call.problem.num_slots, kExperts, {}, context()));
    build_plan({.scores = {},
                .ids = call.ids.view(),
                .token_offsets = call.offsets.view(),
                .num_tokens = kTokens},
               plan, {scratch.data(), scratch.bytes()}, context());
    EXPECT_EQ(handed.counts.block().contents(), built.counts.block().contents()) << name_of(kind);
    EXPECT_EQ(handed.offsets.block().contents(), built.offsets.block().contents());
    EXPECT_EQ(handed.row_to_token.block().contents(), built.row_to_token.block().contents());
    EXPECT_EQ(handed.row_to_slot.block().contents(), built.row_to_slot.block().contents());
    EXPECT_EQ(handed.slot_to_row.block().contents(), built.slot_to_row.block().contents());
  }
}

TEST_P(RouteTest, RefusesAPlanThatItCannotHandOver) {
  const RouteProblem problem = problem_of(RouterKind::token_rounding, wide());
  const PlanArrays arrays(problem);
  const auto refuse = [&](auto bend, std::initializer_list<const char*> words) {
    RouteCall call(problem);
    call.args.plan = arrays.views();
    call.run(context());
    bend(call.args);
    expect_invalid([&] { router_forward(call.args, context()); }, words);
  };
  using Args = RouterForwardArgs;
  refuse([](Args& a) { a.selection = Selection::given; }, {"plan.expert_counts", "that chooses"});
  refuse([](Args& a) { a.plan.row_to_slot = {}; }, {"plan.row_to_slot"});
  refuse([](Args& a) { a.plan.slot_to_row.shape[0] -= 1; }, {"plan.slot_to_row"});
  refuse([](Args& a) { a.plan.dropped_slots = a.report; }, {"plan.dropped_slots", "every slot"});
  refuse([](Args& a) { a.plan.token_offsets = a.plan.expert_counts; }, {"plan.token_offsets"});
  refuse([](Args& a) { a.plan.slot_to_row = a.ids; }, {"plan.slot_to_row", "ids"});
  refuse([](Args& a) { a.plan.top_k = 3; }, {"plan.top_k"});
  refuse(
      [](Args& a) {
        a.plan.expert_counts.shape[0] -= 1;
        a.plan.expert_offsets.shape[0] -= 1;
      },
      {"plan.expert_counts", "as the logits have"});
  refuse(
      [](Args& a) {
        a.plan.row_to_token.shape[0] -= 1;
        a.plan.row_to_slot.shape[0] -= 1;
      },
      {"plan.row_to_token", "one for each slot"});
  RouteCall fixed(problem_of(RouterKind::softmax_topk, wide()));
  fixed.args.plan = arrays.views();
  expect_invalid([&] { fixed.run(context()); }, {"plan.expert_counts", "without a fixed K"});
}

TEST_P(RouteTest, RefusesOptionsOutOfRange) {
  const auto refuse = [&](RouterKind kind, auto bend, std::initializer_list<const char*> words) {
    RouteCall call(problem_of(kind, wide()));
    call.run(context());
    const std::vector<uint8_t> before = call.ids.block().contents();
    bend(call.args);
    expect_invalid([&] { router_forward(call.args, context()); }, words);
    EXPECT_EQ(call.ids.block().contents(), before);
  };
  using Args = RouterForwardArgs;
  const RouterKind sigmoid = RouterKind::sigmoid_topk;
  const RouterKind rounding = RouterKind::token_rounding;
  refuse(sigmoid, [](Args& a) { a.options.num_groups = 5; }, {"num_groups", "a divisor of 12"});
  refuse(sigmoid, [](Args& a) { a.options.num_groups = 0; }, {"num_groups", "1 to 12"});
  refuse(sigmoid, [](Args& a) { a.options.top_groups = 5; }, {"top_groups", "1 to 4"});
  refuse(sigmoid, [](Args& a) { a.options = {.num_groups = 12, .top_groups = 2}; },
         {"top_k", "at most 2", "2 groups"});
  refuse(sigmoid, [](Args& a) { a.options.scale = INFINITY; }, {"scale", "finite"});
  refuse(sigmoid, [](Args& a) { a.bias = a.scores; }, {"bias", "(E)"});
  refuse(sigmoid, [](Args& a) { a.token_offsets = a.ids; }, {"token_offsets", "K slots"});
  refuse(rounding, [](Args& a) { a.options.tile = 0; }, {"tile", "1 or more"});
  refuse(rounding, [](Args& a) { a.options.tile = 9; }, {"slots", "token_rounding_slots"});
  refuse(rounding, [](Args& a) { a.top_k = 13; }, {"top_k", "1 to 12"});
  refuse(rounding, [](Args& a) { a.options.rounding = RoundingMode::stochastic_count; }, {"seed"});
  refuse(rounding, [](Args& a) { a.seed = a.ids; }, {"seed", "random"});
  refuse(rounding, [](Args& a) { a.report.shape[0] = 4; }, {"report", "(5,)"});
  refuse(rounding, [](Args& a) { a.token_offsets = {}; }, {"token_offsets"});
  refuse(RouterKind::expert_choice, [](Args& a) { a.scores.shape[0] = a.ids.shape[0] = 119; },
         {"slots", "a multiple of 12"});
  refuse(RouterKind::threshold, [](Args& a) { a.options.threshold = NAN; }, {"threshold"});
  refuse(RouterKind::threshold, [](Args& a) { a.options.threshold = 1.5; }, {"threshold", "0 to"});
  refuse(RouterKind::softmax_topk, [](Args& a) { a.bias = a.scores; },
         {"bias", "only sigmoid_topk"});
}

TEST_P(RouteTest, TheTileIsTheBackends) {
  ExpertsProblem problem;
  problem.num_tokens = problem.num_slots = problem.row_capacity = 64;
  problem.hidden_size = problem.intermediate_size = 16;
  problem.num_experts = 4;
  problem.dtype = GetParam().dtype;
  const int64_t rows = tile_rows(problem, context());
  if (GetParam().backend == "reference") {
    EXPECT_EQ(rows, 1);
  } else {
    EXPECT_GT(rows, 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, RouteTest, testing::ValuesIn(cpu_runs()),
                         [](const auto& test) { return text_of(test.param); });

}  // namespace
}  // namespace penstock::test
