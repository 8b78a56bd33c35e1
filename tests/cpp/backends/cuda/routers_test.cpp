// SPDX-License-Identifier: Apache-2.0
//
// The GPU's sigmoid, token-rounding, expert-choice and threshold routers against the reference
// backend: who goes where is the same bit for bit, also on hostile logits, and a replay has the
// bits of what it replays. Needs a GPU of compute capability 9.0.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backends/cpu/reference/reference_backend.h"
#include "backends/cuda/cuda_backend.h"
#include "mirror.h"

namespace penstock::testing {
namespace {

const Backend& gpu() { return *penstock_cuda_backend(cuda::kBackendAbi); }
const Backend& cpu() { return cpu::reference_backend(); }

struct Case {
  std::string name;
  RouterKind kind;
  RouterOptions options;
};

struct Shape {
  int64_t num_tokens;
  int64_t num_experts;
  int32_t top_k;
};

RouterOptions rounding(RoundingMode mode, int64_t tile,
                       ScoreScaling scaling = ScoreScaling::normalized) {
  RouterOptions options;
  options.rounding = mode;
  options.tile = tile;
  options.scaling = scaling;
  return options;
}

RouterOptions sigmoid(int32_t num_groups, int32_t top_groups, ScoreScaling scaling, double scale) {
  RouterOptions options;
  options.num_groups = num_groups;
  options.top_groups = top_groups;
  options.scaling = scaling;
  options.scale = scale;
  return options;
}

const std::vector<Case>& pair_cases() {
  const auto kRounding = RouterKind::token_rounding;
  static const std::vector<Case> cases = {
      {"NR_f", kRounding, rounding(RoundingMode::nearest_count, 32)},
      {"NR_f_plain", kRounding, rounding(RoundingMode::nearest_count, 32, ScoreScaling::plain)},
      {"SR_f", kRounding, rounding(RoundingMode::stochastic_count, 32)},
      {"NR_s", kRounding, rounding(RoundingMode::nearest_score, 32)},
      {"Balance_f", kRounding, rounding(RoundingMode::balanced_count, 32)},
      {"UP", kRounding, rounding(RoundingMode::up, 32)},
      {"DOWN", kRounding, rounding(RoundingMode::down, 32)},
      {"expert_choice", RouterKind::expert_choice, {}},
      {"threshold", RouterKind::threshold, {}},
  };
  return cases;
}

RouteProblem problem_of(const Case& router, const Shape& shape) {
  RouteProblem problem;
  problem.kind = router.kind;
  problem.options = router.options;
  problem.num_tokens = shape.num_tokens;
  problem.num_experts = shape.num_experts;
  problem.top_k = shape.top_k;
  problem.num_slots = shape.num_tokens * shape.num_experts * 2 / 5;  // fewer than pass a threshold
  if (router.kind == RouterKind::token_rounding) problem.num_slots = token_rounding_slots(problem);
  if (router.kind == RouterKind::expert_choice)
    problem.num_slots = shape.num_experts * (shape.num_tokens / 4);
  return problem;
}

// The same call on both sides.
struct PairCall {
  PairCall(const Case& router, const Shape& shape)
      : problem(problem_of(router, shape)),
        logits(DType::float32, {shape.num_tokens, shape.num_experts}),
        scores(DType::float32, {problem.num_slots}),
        ids(DType::int32, {problem.num_slots}),
        offsets(DType::int32, {shape.num_tokens + 1}),
        report(DType::int32, {kRouterReportSize}),
        seed(DType::int64, {1}),
        expert_counts(DType::int32, {shape.num_experts}),
        expert_offsets(DType::int32, {shape.num_experts + 1}),
        row_to_token(DType::int32, {problem.num_slots}),
        row_to_slot(DType::int32, {problem.num_slots}),
        slot_to_row(DType::int32, {problem.num_slots}) {
    seed.data<int64_t>()[0] = 77;
    seed.upload();
  }

  void run(const Context& context) {
    const bool drawn = problem.options.rounding == RoundingMode::stochastic_count;
    RouterForwardArgs args{problem.kind, logits.host(), scores.host(), ids.host()};
    args.options = problem.options;
    args.top_k = problem.top_k;
    args.token_offsets = offsets.host();
    args.report = report.host();
    if (drawn) args.seed = seed.host();
    args.plan = {.expert_counts = expert_counts.host(),
                 .expert_offsets = expert_offsets.host(),
                 .row_to_token = row_to_token.host(),
                 .row_to_slot = row_to_slot.host(),
                 .slot_to_row = slot_to_row.host(),
                 .token_offsets = {},
                 .dropped_slots = {}};
    std::vector<double> scratch(
        static_cast<size_t>(cpu().route_scratch_bytes(problem, context)) / 8 + 1);
    args.workspace = {scratch.data(), static_cast<int64_t>(scratch.size()) * 8};
    cpu().router_forward(args, context);

    const int64_t bytes = gpu().route_scratch_bytes(problem, context);
    Mirror workspace(DType::uint8, {bytes});
    args.logits = logits.device();
    args.scores = scores.device();
    args.ids = ids.device();
    args.token_offsets = offsets.device();
    args.report = report.device();
    if (drawn) args.seed = seed.device();
    args.plan = {.expert_counts = expert_counts.device(),
                 .expert_offsets = expert_offsets.device(),
                 .row_to_token = row_to_token.device(),
                 .row_to_slot = row_to_slot.device(),
                 .slot_to_row = slot_to_row.device(),
                 .token_offsets = {},
                 .dropped_slots = {}};
    args.workspace = {workspace.device().data, bytes};
    gpu().router_forward(args, context);
    static_cast<void>(workspace.download());  // checks the guard bytes
  }

  std::vector<int32_t> on_device(const Mirror& mirror) const {
    const std::vector<unsigned char> bytes = mirror.download();
    std::vector<int32_t> values(bytes.size() / sizeof(int32_t));
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }

  // Who goes where is the same on both sides; rows past the last are -1 on the host, and on the
  // device as they were, which is -1 as well.
  void expect_same_routing(const std::string& name) const {
    EXPECT_TRUE(offsets.same_bits()) << name;
    EXPECT_TRUE(ids.same_bits()) << name;
    EXPECT_TRUE(report.same_bits()) << name;
    EXPECT_TRUE(expert_counts.same_bits()) << name;
    EXPECT_TRUE(expert_offsets.same_bits()) << name;
    EXPECT_TRUE(row_to_token.same_bits()) << name;
    EXPECT_TRUE(row_to_slot.same_bits()) << name;
    EXPECT_TRUE(slot_to_row.same_bits()) << name;
  }

  RouteProblem problem;
  Mirror logits, scores, ids, offsets, report, seed;
  Mirror expert_counts, expert_offsets, row_to_token, row_to_slot, slot_to_row;  // the plan
};

class CudaRouters : public ::testing::TestWithParam<Shape> {
 protected:
  void SetUp() override {
    if (const std::string reason = gpu().why_unavailable(); !reason.empty()) GTEST_SKIP() << reason;
  }
  std::mt19937 random{20240602};
  Context context;
};

TEST_P(CudaRouters, PairsAreTheReferences) {
  for (const Case& router : pair_cases()) {
    PairCall call(router, GetParam());
    call.logits.normal(random);
    call.run(context);
    call.expect_same_routing(router.name);
    EXPECT_LE(call.scores.relative_error(), 1e-6) << router.name;
    Mirror replayed(DType::float32, {call.problem.num_slots});
    RouterForwardArgs again{router.kind, call.logits.device(), replayed.device(),
                            call.ids.device()};
    again.options = router.options;
    again.top_k = GetParam().top_k;
    again.token_offsets = call.offsets.device();
    again.selection = Selection::given;
    gpu().router_forward(again, context);
    EXPECT_EQ(replayed.download(), call.scores.download()) << router.name;
    if (GetParam().num_tokens == 0) continue;

    call.scores.upload();
    Mirror dscores(DType::float32, {call.problem.num_slots});
    Mirror dlogits(DType::float32, {GetParam().num_tokens, GetParam().num_experts});
    dscores.normal(random);
    RouterBackwardArgs args{router.kind,     call.logits.host(), call.scores.host(),
                            call.ids.host(), dscores.host(),     dlogits.host()};
    args.options = router.options;
    args.top_k = GetParam().top_k;
    args.token_offsets = call.offsets.host();
    RouteProblem replay = call.problem;
    replay.selection = Selection::given;
    std::vector<double> scratch(
        static_cast<size_t>(cpu().route_scratch_bytes(replay, context)) / 8 + 1);
    args.workspace = {scratch.data(), static_cast<int64_t>(scratch.size()) * 8};
    cpu().router_backward(args, context);
    args.logits = call.logits.device();
    args.scores = call.scores.device();
    args.ids = call.ids.device();
    args.dscores = dscores.device();
    args.dlogits = dlogits.device();
    args.token_offsets = call.offsets.device();
    args.workspace = {};
    gpu().router_backward(args, context);
    EXPECT_LE(dlogits.relative_error(), 4e-6) << router.name;
  }
}

TEST_P(CudaRouters, HostileLogitsStillGiveARouting) {
  const Shape shape = GetParam();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  std::uniform_int_distribution<int> small(-2, 2);  // many ties
  for (const Case& router : pair_cases()) {
    PairCall call(router, shape);
    float* row = call.logits.data<float>();
    for (int64_t t = 0; t < shape.num_tokens; ++t, row += shape.num_experts) {
      for (int64_t e = 0; e < shape.num_experts; ++e) row[e] = static_cast<float>(small(random));
      if (t % 7 == 1) std::fill(row, row + shape.num_experts, nan);
      if (t % 7 == 2) std::fill(row, row + shape.num_experts, -inf);
      if (t % 7 == 3) std::fill(row, row + shape.num_experts, 0.5f);
      if (t % 7 == 4) row[shape.num_experts - 1] = nan;
      if (t % 7 == 5) row[0] = inf;
    }
    call.logits.upload();
    call.run(context);
    call.expect_same_routing(router.name);
    const std::vector<int32_t> offsets = call.on_device(call.offsets);
    const std::vector<int32_t> ids = call.on_device(call.ids);
    std::vector<int64_t> counts(static_cast<size_t>(shape.num_experts), 0);
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      std::vector<bool> seen(static_cast<size_t>(shape.num_experts), false);
      for (int32_t slot = offsets[static_cast<size_t>(t)];
           slot < offsets[static_cast<size_t>(t) + 1]; ++slot) {
        const int32_t id = ids[static_cast<size_t>(slot)];
        ASSERT_TRUE(id >= 0 && id < shape.num_experts) << router.name << " token " << t;
        ASSERT_FALSE(seen[static_cast<size_t>(id)]) << router.name << " token " << t;
        seen[static_cast<size_t>(id)] = true;
        ++counts[static_cast<size_t>(id)];
      }
    }
    for (size_t slot = static_cast<size_t>(offsets.back()); slot < ids.size(); ++slot)
      ASSERT_EQ(ids[slot], -1) << router.name;
    if (router.kind != RouterKind::token_rounding) continue;
    if (shape.num_tokens < router.options.tile) continue;
    for (const int64_t count : counts) EXPECT_EQ(count % router.options.tile, 0) << router.name;
  }
}

TEST_P(CudaRouters, SigmoidTopKIsTheReferences) {
  const Shape shape = GetParam();
  if (shape.num_tokens == 0) return;
  const auto kKind = RouterKind::sigmoid_topk;
  const std::vector<RouterOptions> every = {sigmoid(1, 1, ScoreScaling::normalized, 1.0),
                                            sigmoid(4, 3, ScoreScaling::normalized, 2.5),
                                            sigmoid(8, 5, ScoreScaling::plain, 1.5)};
  for (const RouterOptions& options : every) {
    Mirror logits(DType::float32, {shape.num_tokens, shape.num_experts});
    Mirror bias(DType::float32, {shape.num_experts});
    Mirror scores(DType::float32, {shape.num_tokens, shape.top_k});
    Mirror ids(DType::int32, {shape.num_tokens, shape.top_k});
    logits.normal(random);
    bias.normal(random, 0.1f);
    if (options.num_groups == 4) {  // near ties everywhere
      for (int64_t i = 0; i < logits.numel(); ++i) logits.data<float>()[i] *= 1e-5f;
      for (int64_t e = 0; e < shape.num_experts; ++e) bias.data<float>()[e] *= 1e-5f;
      logits.upload();
      bias.upload();
    }
    RouteProblem problem;
    problem.kind = kKind;
    problem.options = options;
    problem.num_tokens = shape.num_tokens;
    problem.num_experts = shape.num_experts;
    std::vector<double> scratch(
        static_cast<size_t>(cpu().route_scratch_bytes(problem, context)) / 8 + 1);
    RouterForwardArgs args{kKind, logits.host(), scores.host(), ids.host()};
    args.options = options;
    args.bias = bias.host();
    args.workspace = {scratch.data(), static_cast<int64_t>(scratch.size()) * 8};
    cpu().router_forward(args, context);
    args.logits = logits.device();
    args.scores = scores.device();
    args.ids = ids.device();
    args.bias = bias.device();
    args.workspace = {};
    gpu().router_forward(args, context);
    EXPECT_TRUE(ids.same_bits());
    EXPECT_LE(scores.relative_error(), 1e-6);
    Mirror replayed(DType::float32, {shape.num_tokens, shape.top_k});
    args.scores = replayed.device();
    args.bias = {};
    args.selection = Selection::given;
    gpu().router_forward(args, context);
    EXPECT_EQ(replayed.download(), scores.download());

    Mirror dscores(DType::float32, {shape.num_tokens, shape.top_k});
    Mirror dlogits(DType::float32, {shape.num_tokens, shape.num_experts});
    dscores.normal(random);
    scores.upload();
    ids.upload();
    RouterBackwardArgs back{kKind,      logits.host(),  scores.host(),
                            ids.host(), dscores.host(), dlogits.host()};
    back.options = options;
    cpu().router_backward(back, context);
    back.logits = logits.device();
    back.scores = scores.device();
    back.ids = ids.device();
    back.dscores = dscores.device();
    back.dlogits = dlogits.device();
    gpu().router_backward(back, context);
    EXPECT_LE(dlogits.relative_error(), 4e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaRouters,
                         ::testing::Values(Shape{300, 24, 3}, Shape{1000, 64, 8},
                                           Shape{129, 200, 5}, Shape{2048, 128, 8},
                                           Shape{600, 1024, 4}, Shape{16384, 64, 4}, Shape{5, 8, 2},
                                           Shape{0, 8, 2}, Shape{16700, 152, 2}, Shape{16400, 8, 2},
                                           Shape{200, 64, 40}),
                         [](const auto& test) {
                           return "T" + std::to_string(test.param.num_tokens) + "_E" +
                                  std::to_string(test.param.num_experts);
                         });

}  // namespace
}  // namespace penstock::testing
