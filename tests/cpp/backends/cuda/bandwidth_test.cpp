// SPDX-License-Identifier: Apache-2.0
//
// The GPU's routing, plan, combine and small gradients against the reference backend: ids and
// plans bit for bit, sums within the numbers contract. Needs a GPU of compute capability 9.0.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "backends/cpu/reference/reference_backend.h"
#include "backends/cuda/cuda_backend.h"
#include "mirror.h"

namespace penstock::testing {
namespace {

const Backend& gpu() { return *penstock_cuda_backend(cuda::kBackendAbi); }
const Backend& cpu() { return cpu::reference_backend(); }

class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = gpu().why_unavailable(); !reason.empty()) GTEST_SKIP() << reason;
  }
  std::mt19937 random{20240601};
  Context context;
};

struct RouterShape {
  int64_t num_tokens;
  int64_t num_experts;
  int64_t top_k;
};

void fill_hostile(Mirror& logits, const RouterShape& shape, std::mt19937& random) {
  std::uniform_int_distribution<int> small(-2, 2);  // many ties
  float* data = logits.data<float>();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    float* row = data + t * shape.num_experts;
    for (int64_t e = 0; e < shape.num_experts; ++e) row[e] = static_cast<float>(small(random));
    if (t % 7 == 1) std::fill(row, row + shape.num_experts, nan);
    if (t % 7 == 2) std::fill(row, row + shape.num_experts, -inf);
    if (t % 7 == 3) std::fill(row, row + shape.num_experts, 0.5f);
    if (t % 7 == 4) row[shape.num_experts - 1] = nan;
    if (t % 7 == 5) row[0] = -0.0f;
  }
  logits.upload();
}

class RouterTest : public CudaTest,
                   public ::testing::WithParamInterface<std::tuple<RouterShape, RouterKind>> {};

TEST_P(RouterTest, ChoosesAndScoresAsTheReference) {
  const auto& [shape, kind] = GetParam();
  for (const bool hostile : {false, true}) {
    Mirror logits(DType::float32, {shape.num_tokens, shape.num_experts});
    if (hostile) {
      fill_hostile(logits, shape, random);
    } else {
      logits.normal(random);
    }
    Mirror scores(DType::float32, {shape.num_tokens, shape.top_k});
    Mirror ids(DType::int32, {shape.num_tokens, shape.top_k});
    cpu().router_forward({kind, logits.host(), scores.host(), ids.host()}, context);
    gpu().router_forward({kind, logits.device(), scores.device(), ids.device()}, context);
    EXPECT_TRUE(ids.same_bits()) << "hostile " << hostile;
    EXPECT_LE(scores.relative_error(), 1e-6) << "hostile " << hostile;
    if (hostile) continue;

    Mirror dscores(DType::float32, {shape.num_tokens, shape.top_k});
    dscores.normal(random);
    scores.upload();
    Mirror dlogits(DType::float32, {shape.num_tokens, shape.num_experts});
    cpu().router_backward(
        {kind, logits.host(), scores.host(), ids.host(), dscores.host(), dlogits.host()}, context);
    gpu().router_backward(
        {kind, logits.device(), scores.device(), ids.device(), dscores.device(), dlogits.device()},
        context);
    EXPECT_LE(dlogits.relative_error(), 2e-6);
  }
}

TEST_P(RouterTest, ReplaysItsChoiceWithTheSameBits) {
  const auto& [shape, kind] = GetParam();
  Mirror logits(DType::float32, {shape.num_tokens, shape.num_experts});
  logits.normal(random);
  for (int64_t i = 0; i < logits.numel(); ++i) {
    float& logit = logits.data<float>()[i];
    logit = std::round(logit * 8.0f) / 8.0f;  // a few ties in every token
  }
  logits.upload();
  Mirror scores(DType::float32, {shape.num_tokens, shape.top_k});
  Mirror ids(DType::int32, {shape.num_tokens, shape.top_k});
  cpu().router_forward({kind, logits.host(), scores.host(), ids.host()}, context);
  gpu().router_forward({kind, logits.device(), scores.device(), ids.device()}, context);
  EXPECT_TRUE(ids.same_bits());
  Mirror replayed(DType::float32, {shape.num_tokens, shape.top_k});
  RouterForwardArgs args{kind, logits.device(), replayed.device(), ids.device()};
  args.selection = Selection::given;
  gpu().router_forward(args, context);
  EXPECT_EQ(replayed.download(), scores.download());

  // Every other slot names no expert, and some tokens have none.
  for (int64_t i = 0; i < ids.numel(); ++i) {
    if (i % 2 == 0 || i / shape.top_k % 5 == 0) {
      ids.data<int32_t>()[i] = i % 4 == 0 ? -1 : static_cast<int32_t>(shape.num_experts);
    }
  }
  ids.upload();
  args.logits = logits.host();
  args.scores = replayed.host();
  args.ids = ids.host();
  cpu().router_forward(args, context);
  args.logits = logits.device();
  args.scores = replayed.device();
  args.ids = ids.device();
  gpu().router_forward(args, context);
  EXPECT_LE(replayed.relative_error(), 1e-6);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, RouterTest,
    ::testing::Combine(::testing::Values(RouterShape{1, 1, 1}, RouterShape{33, 8, 2},
                                         RouterShape{100, 60, 4}, RouterShape{257, 128, 8},
                                         RouterShape{64, 256, 16}, RouterShape{50, 512, 10},
                                         RouterShape{20, 1000, 64}, RouterShape{9, 4097, 8},
                                         RouterShape{9, 8192, 64}, RouterShape{40, 64, 64}),
                       ::testing::Values(RouterKind::softmax_topk, RouterKind::topk_softmax,
                                         RouterKind::topk_softmax_normalized)));

struct PlanTensors {
  Mirror counts, offsets, row_to_token, row_to_slot, slot_to_row, dropped;
  int32_t top_k;

  PlanTensors(int64_t num_experts, int64_t rows, int64_t slots, int32_t k)
      : counts(DType::int32, {num_experts}),
        offsets(DType::int32, {num_experts + 1}),
        row_to_token(DType::int32, {rows}),
        row_to_slot(DType::int32, {rows}),
        slot_to_row(DType::int32, {slots}),
        dropped(DType::int32, {1}),
        top_k(k) {}

  template <typename View>
  RoutingPlan plan(View view) const {
    RoutingPlan plan;
    plan.expert_counts = view(counts);
    plan.expert_offsets = view(offsets);
    plan.row_to_token = view(row_to_token);
    plan.row_to_slot = view(row_to_slot);
    plan.slot_to_row = view(slot_to_row);
    plan.dropped_slots = view(dropped);
    plan.top_k = top_k;
    return plan;
  }
  RoutingPlan host() const {
    return plan([](const Mirror& m) { return m.host(); });
  }
  RoutingPlan device() const {
    return plan([](const Mirror& m) { return m.device(); });
  }
};

void build_both(Mirror& ids, int64_t num_tokens, PlanTensors& tensors, const Context& context) {
  const int64_t slots = ids.numel();
  const int64_t experts = tensors.counts.numel();
  const auto run = [&](const Backend& backend, const TensorView& view, const RoutingPlan& plan,
                       DeviceType device) {
    Routing routing;
    routing.ids = view;
    routing.num_tokens = num_tokens;
    routing.top_k = tensors.top_k;
    Mirror scratch(DType::uint8, {backend.plan_scratch_bytes(slots, experts, context) + 1});
    const TensorView& where = device == DeviceType::cpu ? scratch.host() : scratch.device();
    backend.build_plan({routing, plan, {where.data, where.bytes()}}, context);
    cuda_ok(cudaDeviceSynchronize());
    scratch.download();
  };
  run(cpu(), ids.host(), tensors.host(), DeviceType::cpu);
  run(gpu(), ids.device(), tensors.device(), DeviceType::cuda);
}

struct PlanShape {
  int64_t num_tokens;
  int64_t num_experts;
  int64_t top_k;
  int64_t capacity;  // rows; 0: one a slot
  DType ids;
};

class PlanTest : public CudaTest, public ::testing::WithParamInterface<PlanShape> {};

TEST_P(PlanTest, IsTheReferencePlanBitForBit) {
  const PlanShape shape = GetParam();
  const int64_t slots = shape.num_tokens * shape.top_k;
  const int64_t rows = shape.capacity == 0 ? slots : shape.capacity;
  Mirror ids(shape.ids, {slots});
  // Skewed, with skipped slots (-1), ids past the last expert and empty experts.
  std::geometric_distribution<int> skew(2.0 / static_cast<double>(shape.num_experts + 1));
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t id = i % 11 == 0 ? -1 : skew(random);
    if (shape.ids == DType::int64) {
      ids.data<int64_t>()[i] = i % 13 == 0 ? int64_t{1} << 40 : id;
    } else {
      ids.data<int32_t>()[i] = static_cast<int32_t>(id);
    }
  }
  ids.upload();
  PlanTensors tensors(shape.num_experts, rows, slots, static_cast<int32_t>(shape.top_k));
  build_both(ids, shape.num_tokens, tensors, context);
  EXPECT_TRUE(tensors.counts.same_bits());
  EXPECT_TRUE(tensors.offsets.same_bits());
  EXPECT_TRUE(tensors.slot_to_row.same_bits());
  EXPECT_TRUE(tensors.row_to_slot.same_bits());
  EXPECT_TRUE(tensors.row_to_token.same_bits());
  EXPECT_TRUE(tensors.dropped.same_bits());
}

INSTANTIATE_TEST_SUITE_P(Shapes, PlanTest,
                         ::testing::Values(PlanShape{1, 1, 1, 0, DType::int32},
                                           PlanShape{1000, 8, 2, 0, DType::int32},
                                           PlanShape{3000, 128, 8, 0, DType::int32},
                                           PlanShape{3000, 128, 8, 1500, DType::int64},
                                           PlanShape{777, 1024, 4, 0, DType::int64},
                                           PlanShape{5000, 1025, 3, 0, DType::int32},
                                           PlanShape{2000, 8192, 16, 0, DType::int32},
                                           // All that one block takes, without a count.
                                           PlanShape{256, 64, 8, 0, DType::int32},
                                           PlanShape{150, 2048, 8, 700, DType::int64},
                                           // Chunks of several blocks, and of as many as may be.
                                           PlanShape{70000, 16, 3, 0, DType::int32},
                                           PlanShape{64000, 8192, 8, 0, DType::int32}));

class CombineTest : public CudaTest, public ::testing::WithParamInterface<DType> {};

TEST_P(CombineTest, SumsInSlotOrder) {
  const DType dtype = GetParam();
  constexpr int64_t kTokens = 321;
  constexpr int64_t kExperts = 24;
  constexpr int64_t kHidden = 264;
  // Rows of a token all in flight at once, exactly and with room to spare, and in two rounds.
  for (const int32_t top_k : {1, 4, 8, 10}) {
    SCOPED_TRACE("top_k " + std::to_string(top_k));
    Mirror ids(DType::int32, {kTokens * top_k});
    std::uniform_int_distribution<int32_t> expert(-2, kExperts - 1);
    for (int64_t i = 0; i < ids.numel(); ++i) ids.data<int32_t>()[i] = expert(random);
    ids.upload();
    PlanTensors tensors(kExperts, ids.numel(), ids.numel(), top_k);
    build_both(ids, kTokens, tensors, context);
    Mirror rows(dtype, {ids.numel(), kHidden});
    Mirror scores(DType::float32, {ids.numel()});
    rows.normal(random);
    scores.normal(random);
    for (const bool scored : {true, false}) {
      Mirror output(dtype, {kTokens, kHidden});
      const TensorView none;
      cpu().combine({tensors.host(), rows.host(), scored ? scores.host() : none, output.host()},
                    context);
      gpu().combine(
          {tensors.device(), rows.device(), scored ? scores.device() : none, output.device()},
          context);
      EXPECT_LE(output.relative_error(), dtype == DType::bfloat16 ? 2e-4 : 3e-5);
    }
  }
}

TEST_P(CombineTest, ReducesScoresAndBiases) {
  const DType dtype = GetParam();
  constexpr int64_t kTokens = 200;
  constexpr int64_t kTopK = 3;
  constexpr int64_t kExperts = 10;
  constexpr int64_t kHidden = 136;
  Mirror ids(DType::int32, {kTokens * kTopK});
  std::uniform_int_distribution<int32_t> expert(-1, kExperts - 3);
  for (int64_t i = 0; i < ids.numel(); ++i) ids.data<int32_t>()[i] = expert(random);
  ids.upload();
  PlanTensors tensors(kExperts, ids.numel(), ids.numel(), kTopK);
  build_both(ids, kTokens, tensors, context);
  const auto groups = [&](const RoutingPlan& plan) {
    return RowGroups{plan.expert_counts, plan.expert_offsets, plan.row_to_token, plan.row_to_slot,
                     ids.numel()};
  };
  Mirror partials(DType::float32, {ids.numel(), 2});
  Mirror d_output(dtype, {kTokens, kHidden});
  Mirror b2(dtype, {kExperts, kHidden});
  Mirror scores(DType::float32, {ids.numel()});
  partials.normal(random);
  d_output.normal(random);
  b2.normal(random);
  scores.normal(random);
  const auto vector_of = [&](const Mirror& tensor, const TensorView& view) {
    return GroupedVector{view.data, tensor.host().dtype, kHidden, 1};
  };
  Mirror dscores(DType::float32, {ids.numel()});
  cpu().score_gradient({groups(tensors.host()), partials.host(), d_output.host(),
                        vector_of(b2, b2.host()), dscores.host()},
                       context);
  gpu().score_gradient({groups(tensors.device()), partials.device(), d_output.device(),
                        vector_of(b2, b2.device()), dscores.device()},
                       context);
  EXPECT_LE(dscores.relative_error(), 1e-5);

  Mirror trainable(DType::uint8, {kExperts});
  for (int64_t e = 0; e < kExperts; ++e) trainable.data<uint8_t>()[e] = e != 1;
  trainable.upload();
  for (const GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
    Mirror db2(DType::float32, {kExperts, kHidden});
    db2.normal(random);
    BiasGradientArgs host{groups(tensors.host()),
                          d_output.host(),
                          RowAccess::gathered,
                          scores.host(),
                          {},
                          1,
                          mode,
                          trainable.host(),
                          {}};
    host.out[0] = vector_of(db2, db2.host());
    BiasGradientArgs device{groups(tensors.device()),
                            d_output.device(),
                            RowAccess::gathered,
                            scores.device(),
                            {},
                            1,
                            mode,
                            trainable.device(),
                            {}};
    device.out[0] = vector_of(db2, db2.device());
    cpu().bias_gradient(host, context);
    gpu().bias_gradient(device, context);
    EXPECT_LE(db2.relative_error(), 2e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(Types, CombineTest, ::testing::Values(DType::bfloat16, DType::float16));

}  // namespace
}  // namespace penstock::testing
