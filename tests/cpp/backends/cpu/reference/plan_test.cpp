// SPDX-License-Identifier: Apache-2.0
//
// build_plan against a stable sort, with skipped slots, differing numbers of experts, too little
// capacity, and ids of both widths.
#include <gtest/gtest.h>

#include <vector>

#include "support.h"

namespace penstock::cpu::reference_test {
namespace {

// Every array of a plan, with guards that must survive.
struct PlanArrays {
  PlanArrays(int64_t num_experts, int64_t num_slots, int64_t row_capacity, int64_t num_tokens)
      : counts(1, num_experts),
        offsets(1, num_experts + 1),
        row_to_token(1, row_capacity),
        row_to_slot(1, row_capacity),
        slot_to_row(1, num_slots),
        token_offsets(1, num_tokens + 1),
        dropped(1, 1) {}

  RoutingPlan plan(int32_t top_k) {
    RoutingPlan plan;
    plan.expert_counts = counts.view1();
    plan.expert_offsets = offsets.view1();
    plan.row_to_token = row_to_token.view1();
    plan.row_to_slot = row_to_slot.view1();
    plan.slot_to_row = slot_to_row.view1();
    plan.dropped_slots = dropped.view1();
    plan.top_k = top_k;
    if (top_k == 0) plan.token_offsets = token_offsets.view1();
    return plan;
  }

  void expect_guards() {
    for (auto* array : {&counts, &offsets, &row_to_token, &row_to_slot, &slot_to_row, &dropped})
      EXPECT_EQ(array->data().back(), -77);
  }

  Array<int32_t> counts, offsets, row_to_token, row_to_slot, slot_to_row, token_offsets, dropped;
};

struct Ids {
  std::vector<int64_t> values;
  std::vector<int32_t> token_of_slot;
};

// What the plan must be: slots in order of (expert, slot), cut off at the capacity.
void expect_plan(const PlanArrays& actual, const Ids& ids, int64_t num_experts) {
  const int64_t capacity = actual.row_to_token.cols();
  std::vector<int64_t> slots;
  for (size_t slot = 0; slot < ids.values.size(); ++slot)
    if (ids.values[slot] >= 0 && ids.values[slot] < num_experts)
      slots.push_back(static_cast<int64_t>(slot));
  std::stable_sort(slots.begin(), slots.end(), [&](int64_t a, int64_t b) {
    return ids.values[static_cast<size_t>(a)] < ids.values[static_cast<size_t>(b)];
  });
  const int64_t routed = static_cast<int64_t>(slots.size());
  const int64_t rows = std::min(routed, capacity);
  EXPECT_EQ(actual.dropped.at(0, 0), routed - rows);
  EXPECT_EQ(actual.offsets.at(0, 0), 0);
  EXPECT_EQ(actual.offsets.at(0, num_experts), rows);
  std::vector<int32_t> counts(static_cast<size_t>(num_experts), 0);
  std::vector<int32_t> slot_to_row(ids.values.size(), -1);
  for (int64_t row = 0; row < rows; ++row) {
    const size_t slot = static_cast<size_t>(slots[static_cast<size_t>(row)]);
    ASSERT_EQ(actual.row_to_slot.at(0, row), static_cast<int32_t>(slot)) << "row " << row;
    ASSERT_EQ(actual.row_to_token.at(0, row), ids.token_of_slot[slot]) << "row " << row;
    ++counts[static_cast<size_t>(ids.values[slot])];
    slot_to_row[slot] = static_cast<int32_t>(row);
  }
  for (size_t slot = 0; slot < slot_to_row.size(); ++slot)
    ASSERT_EQ(actual.slot_to_row.at(0, static_cast<int64_t>(slot)), slot_to_row[slot]);
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int32_t count = counts[static_cast<size_t>(expert)];
    ASSERT_EQ(actual.counts.at(0, expert), count) << "expert " << expert;
    ASSERT_EQ(actual.offsets.at(0, expert + 1) - actual.offsets.at(0, expert), count);
  }
  for (int64_t row = rows; row < capacity; ++row) {
    ASSERT_EQ(actual.row_to_token.at(0, row), -1);
    ASSERT_EQ(actual.row_to_slot.at(0, row), -1);
  }
}

struct PlanShape {
  int64_t num_tokens;
  int32_t top_k;
  int64_t num_experts;
};

constexpr PlanShape kShapes[] = {{0, 2, 4},   {1, 1, 1},     {1, 8, 8},     {37, 3, 5},
                                 {64, 2, 64}, {300, 4, 130}, {50, 7, 4097}, {129, 1, 1}};

template <typename Id>
class PlanTest : public ::testing::Test {
 protected:
  // Ids of -1, other negatives, E and far beyond are mixed in.
  static Ids random_ids(const PlanShape& shape, uint64_t seed) {
    Random random(seed);
    Ids ids;
    for (int64_t slot = 0; slot < shape.num_tokens * shape.top_k; ++slot) {
      int64_t id = random.below(shape.num_experts);
      if (random.below(8) == 0) id = -1;
      if (random.below(16) == 0) id = -2 - random.below(1000);
      if (random.below(16) == 0) id = shape.num_experts + random.below(3);
      if (random.below(16) == 0) id = std::numeric_limits<Id>::max();
      if (sizeof(Id) == 8 && random.below(8) == 0) id = (int64_t{1} << 32) + random.below(3);
      ids.values.push_back(id);
      ids.token_of_slot.push_back(static_cast<int32_t>(slot / shape.top_k));
    }
    return ids;
  }

  static Array<Id> stored(const Ids& ids) {
    Array<Id> array(1, static_cast<int64_t>(ids.values.size()));
    for (size_t slot = 0; slot < ids.values.size(); ++slot)
      array.at(0, static_cast<int64_t>(slot)) = static_cast<Id>(ids.values[slot]);
    return array;
  }
};
using IdTypes = ::testing::Types<int32_t, int64_t>;
TYPED_TEST_SUITE(PlanTest, IdTypes);

TYPED_TEST(PlanTest, SortsSlotsByExpertUpToTheCapacity) {
  for (const PlanShape& shape : kShapes) {
    const Ids ids = this->random_ids(shape, 11);
    Array<TypeParam> stored = this->stored(ids);
    const int64_t num_slots = shape.num_tokens * shape.top_k;
    for (int64_t capacity : {num_slots, num_slots / 2, int64_t{0}, num_slots + 9}) {
      SCOPED_TRACE(testing::Message() << "T " << shape.num_tokens << " capacity " << capacity);
      PlanArrays arrays(shape.num_experts, num_slots, capacity, shape.num_tokens);
      const Routing routing = {{}, stored.view1(), {}, shape.num_tokens, shape.top_k};
      backend().build_plan({routing, arrays.plan(shape.top_k), {}}, kContext);
      expect_plan(arrays, ids, shape.num_experts);
      arrays.expect_guards();
    }
  }
}

TYPED_TEST(PlanTest, TokensWithDifferingNumbersOfExperts) {
  constexpr int64_t kExperts = 6;
  const std::vector<int32_t> lengths = {0, 3, 1, 0, 6, 2, 0};
  Array<int32_t> offsets(1, static_cast<int64_t>(lengths.size()) + 1);
  offsets.at(0, 0) = 0;
  Ids ids;
  Random random(3);
  for (size_t token = 0; token < lengths.size(); ++token) {
    const int64_t index = static_cast<int64_t>(token);
    offsets.at(0, index + 1) = offsets.at(0, index) + lengths[token];
    for (int32_t k = 0; k < lengths[token]; ++k) {
      ids.values.push_back(random.below(kExperts + 1) - 1);
      ids.token_of_slot.push_back(static_cast<int32_t>(token));
    }
  }
  Array<TypeParam> stored = this->stored(ids);
  const int64_t num_tokens = static_cast<int64_t>(lengths.size());
  PlanArrays arrays(kExperts, stored.cols(), stored.cols(), num_tokens);
  const Routing routing = {{}, stored.view1(), offsets.view1(), num_tokens, 0};
  backend().build_plan({routing, arrays.plan(0), {}}, kContext);
  expect_plan(arrays, ids, kExperts);
  EXPECT_TRUE(arrays.token_offsets.same_bits(offsets));
}

TYPED_TEST(PlanTest, SkipsEverything) {
  Ids ids{{-1, -1, 3, 4}, {0, 0, 1, 1}};
  Array<TypeParam> stored = this->stored(ids);
  PlanArrays arrays(3, 4, 4, 2);
  backend().build_plan({{{}, stored.view1(), {}, 2, 2}, arrays.plan(2), {}}, kContext);
  expect_plan(arrays, ids, 3);
}

}  // namespace
}  // namespace penstock::cpu::reference_test
