// SPDX-License-Identifier: Apache-2.0
//
// build_plan on every CPU backend against a plan made slot by slot here, and what it refuses.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "penstock/penstock.h"
#include "support/backends.h"
#include "support/compare.h"
#include "support/memory.h"

namespace penstock::test {
namespace {

// A routing and the arrays of its plan. A test may bend `routing` and `plan` before build().
struct PlanCall {
  PlanCall(const std::vector<int64_t>& slot_ids, int64_t tokens, int32_t top_k, int64_t experts,
           int64_t row_capacity, DType id_dtype = DType::int32)
      : counts(DType::int32, {experts}),
        offsets(DType::int32, {experts + 1}),
        to_token(DType::int32, {row_capacity}),
        to_slot(DType::int32, {row_capacity}),
        to_row(DType::int32, {static_cast<int64_t>(slot_ids.size())}),
        dropped(DType::int32, {1}) {
    if (id_dtype == DType::int64)
      ids = tensor_of(slot_ids, DType::int64);
    else
      ids = int32_tensor({slot_ids.begin(), slot_ids.end()});
    routing.ids = ids.view();
    routing.num_tokens = tokens;
    routing.top_k = plan.top_k = top_k;
    plan.expert_counts = counts.view();
    plan.expert_offsets = offsets.view();
    plan.row_to_token = to_token.view();
    plan.row_to_slot = to_slot.view();
    plan.slot_to_row = to_row.view();
    plan.dropped_slots = dropped.view();
  }

  void use_token_offsets(const std::vector<int32_t>& starts) {
    token_offsets = int32_tensor(starts);
    routing.token_offsets = plan.token_offsets = token_offsets.view();
    routing.top_k = plan.top_k = 0;
  }

  void build(const Context& context) {
    const int64_t bytes =
        plan_workspace_bytes(routing.num_slots(), plan.num_experts(), Device{}, context);
    scratch = Block(bytes);
    build_plan(routing, plan, {scratch.data(), bytes}, context);
  }

  Tensor ids, counts, offsets, to_token, to_slot, to_row, dropped, token_offsets;
  Block scratch;
  Routing routing;
  RoutingPlan plan;
};

class PlanTest : public testing::TestWithParam<std::string> {
 protected:
  Context context(IdChecks checks = IdChecks::trusted) const {
    Context made = context_of(GetParam());
    made.id_checks = checks;
    return made;
  }
};

// The rows by definition: experts in order, each one's slots in order, up to the capacity.
void expect_plan(const PlanCall& call, const std::vector<int64_t>& ids,
                 const std::vector<int32_t>& token_of_slot, int64_t experts, int64_t row_capacity) {
  std::vector<int32_t> counts(static_cast<size_t>(experts), 0);
  std::vector<int32_t> rows;
  std::vector<int32_t> row_of_slot(ids.size(), -1);
  std::vector<int32_t> offsets = {0};
  int32_t dropped = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    for (size_t slot = 0; slot < ids.size(); ++slot) {
      if (ids[slot] != expert) continue;
      if (static_cast<int64_t>(rows.size()) >= row_capacity) {
        ++dropped;
        continue;
      }
      row_of_slot[slot] = static_cast<int32_t>(rows.size());
      rows.push_back(static_cast<int32_t>(slot));
      ++counts[static_cast<size_t>(expert)];
    }
    offsets.push_back(static_cast<int32_t>(rows.size()));
  }
  EXPECT_EQ(values_of<int32_t>(call.counts.view()), counts);
  EXPECT_EQ(values_of<int32_t>(call.offsets.view()), offsets);
  EXPECT_EQ(values_of<int32_t>(call.to_row.view()), row_of_slot);
  EXPECT_EQ(call.dropped.view().as<int32_t>()[0], dropped);
  for (size_t row = 0; row < rows.size(); ++row) {
    const auto slot = static_cast<size_t>(rows[row]);
    EXPECT_EQ(call.to_slot.view().as<int32_t>()[row], rows[row]) << "row " << row;
    EXPECT_EQ(call.to_token.view().as<int32_t>()[row], token_of_slot[slot]) << "row " << row;
  }
  for (const Tensor* tensor :
       {&call.counts, &call.offsets, &call.to_token, &call.to_slot, &call.to_row, &call.dropped})
    EXPECT_TRUE(tensor->block().guards_intact());
}

TEST_P(PlanTest, SortsSlotsByExpertAndKeepsTheirOrder) {
  constexpr int64_t kTokens = 200;
  constexpr int32_t kTopK = 3;
  constexpr int64_t kExperts = 17;
  for (DType dtype : {DType::int32, DType::int64}) {
    for (int64_t row_capacity : {kTokens * kTopK, int64_t{123}, kTokens * kTopK + 50}) {
      Random random(7);
      std::vector<int64_t> ids;
      std::vector<int32_t> token_of_slot;
      for (int64_t slot = 0; slot < kTokens * kTopK; ++slot) {
        ids.push_back(random.below(kExperts + 4) - 2);  // negatives and ids past E skip
        token_of_slot.push_back(static_cast<int32_t>(slot / kTopK));
      }
      PlanCall call(ids, kTokens, kTopK, kExperts, row_capacity, dtype);
      call.build(context());
      expect_plan(call, ids, token_of_slot, kExperts, row_capacity);
    }
  }
}

TEST_P(PlanTest, Int64IdsDoNotWrap) {
  const std::vector<int64_t> ids = {(int64_t{1} << 32) + 1, 1, -(int64_t{1} << 32), 0};
  PlanCall call(ids, 2, 2, 2, 4, DType::int64);
  call.build(context());
  EXPECT_EQ(values_of<int32_t>(call.to_row.view()), (std::vector<int32_t>{-1, 1, -1, 0}));
}

TEST_P(PlanTest, TokensMayHaveDifferingNumbersOfSlots) {
  const std::vector<int64_t> ids = {1, 0, 2, 1, -1, 0};
  PlanCall call(ids, 4, 0, 3, 6);
  call.use_token_offsets({0, 0, 3, 3, 6});
  call.build(context(IdChecks::checked));
  expect_plan(call, ids, {1, 1, 1, 3, 3, 3}, 3, 6);
}

TEST_P(PlanTest, NoTokens) {
  PlanCall call({}, 0, 2, 3, 0);
  call.build(context(IdChecks::checked));
  EXPECT_EQ(values_of<int32_t>(call.counts.view()), (std::vector<int32_t>{0, 0, 0}));
  EXPECT_EQ(values_of<int32_t>(call.offsets.view()), (std::vector<int32_t>{0, 0, 0, 0}));
}

TEST_P(PlanTest, CheckedIdsNameTheToken) {
  const auto refuse = [&](std::vector<int64_t> ids, DType dtype,
                          std::initializer_list<const char*> words) {
    PlanCall call(ids, 2, 2, 4, 4, dtype);
    expect_invalid([&] { call.build(context(IdChecks::checked)); }, words);
    EXPECT_EQ(call.to_row.block().contents(), std::vector<uint8_t>(16, kPoison));
    EXPECT_NO_THROW(call.build(context(IdChecks::trusted)));
  };
  for (DType dtype : {DType::int32, DType::int64}) {
    refuse({0, 1, 2, -2}, dtype, {"token 1 with ids (2, -2)"});
    refuse({3, 3, 2, 1}, dtype, {"token 0 with ids (3, 3)", "3 repeats"});
    PlanCall skips({-1, -1, 9, 9}, 2, 2, 4, 4, dtype);
    EXPECT_NO_THROW(skips.build(context(IdChecks::checked)));
  }
}

TEST_P(PlanTest, TokenOffsetsThatLeaveTheSlotsAreRefused) {
  for (const std::vector<int32_t>& starts :
       {std::vector<int32_t>{1, 2, 4}, {0, 3, 2}, {0, 2, 5}, {0, 2, 3}, {0, -1, 4}}) {
    PlanCall call({0, 1, 2, 3}, 2, 2, 4, 4);
    call.use_token_offsets(starts);
    expect_invalid([&] { call.build(context()); }, {"token_offsets"});
  }
}

TEST_P(PlanTest, SlotsPastTheLastOffsetArePadding) {
  PlanCall call({0, 1, 0, -1, -1}, 2, 0, 2, 5);
  call.use_token_offsets({0, 1, 3});
  call.build(context());
  EXPECT_EQ(values_of<int32_t>(call.counts.view()), (std::vector<int32_t>{2, 1}));
  EXPECT_EQ(values_of<int32_t>(call.to_row.view()), (std::vector<int32_t>{0, 2, 1, -1, -1}));
}

TEST_P(PlanTest, MoreSlotsOrRowsThanInt32CountsAreRefusedUnread) {
  constexpr int64_t kTooMany = int64_t{1} << 31;
  PlanCall call({0, 1, 2, 3}, 2, 2, 4, 4);
  call.routing.num_tokens = kTooMany / 2;
  expect_invalid([&] { build_plan(call.routing, call.plan, {}, context()); },
                 {"slots = T * K", "2147483648", "2147483647"});
  PlanCall flat({0, 1, 2, 3}, 2, 2, 4, 4);
  flat.routing.ids.shape[0] = kTooMany;
  expect_invalid([&] { build_plan(flat.routing, flat.plan, {}, context()); }, {"2147483648"});
  PlanCall rows({0, 1, 2, 3}, 2, 2, 4, 4);
  rows.plan.row_to_token.shape[0] = kTooMany;
  expect_invalid([&] { build_plan(rows.routing, rows.plan, {}, context()); },
                 {"row_capacity", "2147483648"});
  expect_invalid([&] { plan_workspace_bytes(kTooMany, 4, Device{}, context()); },
                 {"num_slots", "2147483648"});
}

TEST_P(PlanTest, ArraysThatDoNotFitAreRefused) {
  const auto refuse = [&](auto bend, std::initializer_list<const char*> words) {
    PlanCall call({0, 1, 2, 3}, 2, 2, 4, 4);
    bend(call);
    expect_invalid([&] { call.build(context()); }, words);
  };
  refuse([](PlanCall& c) { c.routing.ids.shape[0] = 3; }, {"ids", "(3,)", "(4,)"});
  refuse([](PlanCall& c) { c.routing.ids.dtype = DType::float32; }, {"ids", "int32 or int64"});
  refuse([](PlanCall& c) { c.routing.ids.strides[0] = 2; }, {"ids", "contiguous"});
  refuse([](PlanCall& c) { c.routing.top_k = -1; }, {"top_k", "-1"});
  refuse([](PlanCall& c) { c.plan.top_k = 1; }, {"plan.top_k"});
  refuse([](PlanCall& c) { c.plan.expert_offsets = c.plan.expert_counts; }, {"expert_offsets"});
  refuse([](PlanCall& c) { c.plan.slot_to_row = {}; }, {"plan.slot_to_row", "absent"});
  refuse([](PlanCall& c) { c.plan.row_to_slot = c.plan.row_to_token; }, {"overlaps"});
  refuse([](PlanCall& c) { c.plan.row_to_slot.dtype = DType::int64; }, {"row_to_slot", "int32"});
  refuse([](PlanCall& c) { c.plan.row_to_slot.device = {DeviceType::cuda, 0}; }, {"cuda:0", "cpu"});
  refuse([](PlanCall& c) { c.plan.token_offsets = c.plan.expert_offsets; },
         {"plan.token_offsets", "absent"});
}

INSTANTIATE_TEST_SUITE_P(Cpu, PlanTest, testing::ValuesIn(cpu_backends()),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace penstock::test
