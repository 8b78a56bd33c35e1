// SPDX-License-Identifier: Apache-2.0
//
// Hostile case 6: tensors of more than 2^31 elements, where a 32-bit offset would wrap. Needs up
// to 16 GiB and a minute or two, so it is a program of its own, run by the target `large_tests`.
// The rows with the largest offsets are checked against float64.
#include <algorithm>
#include <cmath>

#include "call.h"

namespace penstock::hostile {
namespace {

constexpr DType kDType = DType::bfloat16;
constexpr double kBound = cases::tolerance::end_to_end(kDType);

// Values that can be recomputed from the index alone, so that no second copy is needed: small
// multiples of 1/64, exact in bf16.
double value_at(int64_t index, int64_t salt) {
  const uint64_t mixed =
      (static_cast<uint64_t>(index) + static_cast<uint64_t>(salt) * 1000003u) * 0x9E3779B97F4A7C15u;
  return (static_cast<double>(mixed >> 57) - 63.5) / 128.0;
}

struct Big {
  explicit Big(const cases::Shape& s) : shape(s) {
    const int64_t h = 2 * s.intermediate_size;
    x = filled(s.num_tokens * s.hidden_size, 1);
    w1 = filled(s.num_experts * h * s.hidden_size, 2);
    w2 = filled(s.num_experts * s.hidden_size * s.intermediate_size, 3);
    h_out = Buffer(slots() * h * 2, 0xFF);
    output = Buffer(s.num_tokens * s.hidden_size * 2, 0xFF);
    scores = Buffer(slots() * 4);
    store(std::vector<double>(static_cast<size_t>(slots()), 0.5), DType::float32, scores.data());
    ids = Buffer(slots() * 4);
    for (int64_t slot = 0; slot < slots(); ++slot)
      reinterpret_cast<int32_t*>(ids.data())[slot] = expert_of(slot);
  }

  static Buffer filled(int64_t count, int64_t salt) {
    Buffer buffer(count * 2);
    auto* bits = reinterpret_cast<uint16_t*>(buffer.data());
    for (int64_t i = 0; i < count; ++i) store({value_at(i, salt)}, kDType, bits + i);
    return buffer;
  }

  int64_t slots() const { return shape.num_tokens * shape.top_k; }
  // The last token's last choice is the last expert.
  int32_t expert_of(int64_t slot) const {
    const int64_t from_end = slots() - 1 - slot;
    return static_cast<int32_t>(shape.num_experts - 1 - from_end % shape.num_experts);
  }

  double output_at(int64_t token, int64_t column) const {
    const int64_t d = shape.hidden_size, n = shape.intermediate_size;
    double sum = 0.0;
    for (int64_t k = 0; k < shape.top_k; ++k) {
      const int64_t e = expert_of(token * shape.top_k + k);
      for (int64_t j = 0; j < n; ++j) {
        double gate = 0.0, up = 0.0;
        for (int64_t i = 0; i < d; ++i) {
          const double xi = value_at(token * d + i, 1);
          gate += xi * value_at((e * 2 * n + j) * d + i, 2);
          up += xi * value_at((e * 2 * n + n + j) * d + i, 2);
        }
        gate = rounded(gate, kDType);
        up = rounded(up, kDType);
        const double a = rounded(gate / (1.0 + std::exp(-gate)) * up, kDType);
        sum += 0.5 * a * value_at((e * d + column) * n + j, 3);
      }
    }
    return sum;
  }

  cases::Shape shape;
  Buffer x, w1, w2, h_out, output, scores, ids;
};

void run_forward(Big& big) {
  const cases::Shape& s = big.shape;
  const int64_t slots = big.slots(), h = 2 * s.intermediate_size;
  const auto ints = [](Buffer& buffer, int64_t count) {
    buffer = Buffer(count * 4);
    return TensorView::contiguous(buffer.data(), DType::int32, {count});
  };
  Buffer counts, offsets, row_to_token, row_to_slot, slot_to_row;
  const Context context;
  Routing routing;
  routing.scores = TensorView::contiguous(big.scores.data(), DType::float32, {slots});
  routing.ids = TensorView::contiguous(big.ids.data(), DType::int32, {slots});
  routing.num_tokens = s.num_tokens;
  routing.top_k = s.top_k;
  ExpertsForwardArgs args;
  args.plan.expert_counts = ints(counts, s.num_experts);
  args.plan.expert_offsets = ints(offsets, s.num_experts + 1);
  args.plan.row_to_token = ints(row_to_token, slots);
  args.plan.row_to_slot = ints(row_to_slot, slots);
  args.plan.slot_to_row = ints(slot_to_row, slots);
  args.plan.top_k = s.top_k;
  Buffer plan_space(plan_workspace_bytes(slots, s.num_experts, Device{}, context));
  build_plan(routing, args.plan, {plan_space.data(), plan_space.bytes()}, context);

  args.x = TensorView::contiguous(big.x.data(), kDType, {s.num_tokens, s.hidden_size});
  args.weights.w1 =
      TensorView::contiguous(big.w1.data(), kDType, {s.num_experts, h, s.hidden_size});
  args.weights.w2 = TensorView::contiguous(big.w2.data(), kDType,
                                           {s.num_experts, s.hidden_size, s.intermediate_size});
  args.scores = routing.scores;
  args.h = TensorView::contiguous(big.h_out.data(), kDType, {slots, h});
  args.output = TensorView::contiguous(big.output.data(), kDType, {s.num_tokens, s.hidden_size});
  Buffer space(forward_workspace_bytes(problem_of(args), context), 0xFF);
  args.workspace = {space.data(), space.bytes()};
  experts_forward(args, context);
  EXPECT_TRUE(space.guards_intact());
}

void check(const cases::Shape& shape) {
  Big big(shape);
  run_forward(big);
  const int64_t d = shape.hidden_size;
  const int64_t checked_columns = std::min<int64_t>(d, 24);
  const int64_t checked_tokens = std::min(shape.num_tokens, cases::case_6::checked_rows);
  std::vector<double> got, expected;
  for (int64_t token = shape.num_tokens - checked_tokens; token < shape.num_tokens; ++token) {
    for (int64_t column = d - checked_columns; column < d; ++column) {
      got.push_back(loaded(big.output.data() + (token * d + column) * 2, 1, kDType)[0]);
      expected.push_back(big.output_at(token, column));
    }
  }
  EXPECT_LE(relative_l2(got, expected), kBound);
  EXPECT_TRUE(big.output.guards_intact() && big.h_out.guards_intact());
}

TEST(HostileLarge, Case06_preactivations_past_2_31) {
  const cases::Shape& s = cases::case_6::h_shape;
  ASSERT_GT(s.num_tokens * s.top_k * 2 * s.intermediate_size, cases::case_6::elements);
  check(s);
}

TEST(HostileLarge, Case06_expert_outputs_past_2_31) {
  const cases::Shape& s = cases::case_6::y_shape;
  ASSERT_GT(s.num_tokens * s.top_k * s.hidden_size, cases::case_6::elements);
  check(s);
}

TEST(HostileLarge, Case06_weights_past_2_31) {
  const cases::Shape& s = cases::case_6::w1_shape;
  ASSERT_GT(s.num_experts * s.hidden_size * 2 * s.intermediate_size, cases::case_6::elements);
  check(s);
}

}  // namespace
}  // namespace penstock::hostile
