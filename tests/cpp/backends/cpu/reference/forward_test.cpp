// SPDX-License-Identifier: Apache-2.0
//
// Up projection, down projection, combine and row scaling in every storage dtype, gate layout and
// weight order, against sums in double over the inputs as stored.
#include <gtest/gtest.h>

#include "backends/cpu/common/activation.h"
#include "support.h"

namespace penstock::cpu::reference_test {
namespace {

// More columns than one chunk of the backend's sums, and not a multiple of anything.
constexpr int64_t kHidden = 261;
constexpr int64_t kInner = 35;

template <typename T>
class ForwardTest : public ::testing::Test {};
TYPED_TEST_SUITE(ForwardTest, StorageTypes);

struct Variant {
  Activation activation;
  Layout layout;
  Order order;
};

constexpr Variant kVariants[] = {
    {Activation::swiglu, Layout::concatenated, Order::output_major},
    {Activation::swiglu, Layout::interleaved, Order::output_major},
    {Activation::geglu, Layout::concatenated, Order::input_major},
    {Activation::swiglu_clamped, Layout::interleaved, Order::input_major},
    {Activation::reglu, Layout::separate, Order::output_major},
    {Activation::swiglu, Layout::separate, Order::input_major},
    {Activation::gelu, Layout::concatenated, Order::output_major},
    {Activation::relu_squared, Layout::concatenated, Order::input_major},
};

template <typename T>
struct UpInputs {
  UpInputs(const Variant& variant, int64_t inner, int64_t hidden, int64_t num_experts)
      : halves(is_gated(variant.activation) ? 2 : 1),
        w(num_experts, halves, inner, hidden, variant.layout, variant.order),
        b(num_experts, halves, inner, 1, variant.layout, Order::output_major) {
    w.randomize(1.7 / std::sqrt(static_cast<double>(hidden)), 3);
    b.randomize(0.5, 4);
  }

  UpWeights weights() const { return {w.matrix, b.vectors(), static_cast<int32_t>(halves)}; }

  int64_t halves;
  Grouped<T> w;
  Grouped<T> b;
};

// H of the plan's rows, in double.
template <typename T>
std::vector<std::vector<double>> stated_h(RoutedRows& rows, const Array<T>& x,
                                          const UpWeights& weights, int64_t inner) {
  auto expected = zeros(rows.num_rows(), weights.halves * inner);
  for (int64_t r = 0; r < rows.num_rows(); ++r)
    for (int64_t half = 0; half < weights.halves; ++half)
      for (int64_t j = 0; j < inner; ++j) {
        const size_t index = static_cast<size_t>(half);
        const int64_t e = rows.expert(r);
        double sum = weights.b[index].present() ? at<T>(weights.b[index], e, j) : 0.0;
        for (int64_t k = 0; k < x.cols(); ++k)
          sum += x(rows.token(r), k) * at<T>(weights.w[index], e, j, k);
        expected[static_cast<size_t>(r)][static_cast<size_t>(half * inner + j)] = sum;
      }
  return expected;
}

TYPED_TEST(ForwardTest, UpProjection) {
  using T = TypeParam;
  for (const Variant& variant : kVariants) {
    SCOPED_TRACE(testing::Message() << "activation " << static_cast<int>(variant.activation));
    RoutedRows rows(13, 3, 5, 77);
    UpInputs<T> inputs(variant, kInner, kHidden, 5);
    auto x = Array<T>::random(13, kHidden, 1.0, 9, 4);
    Array<T> h(rows.capacity(), inputs.halves * kInner);
    Array<T> a(rows.capacity(), kInner);
    UpProjectionArgs args = {
        rows.groups(), {variant.activation}, x.view(), inputs.weights(), h.view(), a.view(), {}};
    backend().up_projection(args, kContext);
    expect_stage(h, stated_h<T>(rows, x, args.weights, kInner), stage_tolerance<T>());

    // A is the activation of H as stored, to the bit.
    for (int64_t r = 0; r < rows.num_rows(); ++r)
      for (int64_t j = 0; j < kInner; ++j) {
        const auto up = inputs.halves == 2 ? load(h.at(r, kInner + j)) : Accumulator<T>(0);
        T expected;
        store(expected, activate(args.activation, load(h.at(r, j)), up));
        EXPECT_EQ(a(r, j), get(expected));
      }

    // One output alone has the bits that it has beside the other; rows past the end stay.
    Array<T> h_alone(rows.capacity(), inputs.halves * kInner);
    Array<T> a_alone(rows.capacity(), kInner);
    args.a = {};
    args.h = h_alone.view();
    backend().up_projection(args, kContext);
    args.h = {};
    args.a = a_alone.view();
    backend().up_projection(args, kContext);
    EXPECT_TRUE(h.same_bits(h_alone));
    EXPECT_TRUE(a.same_bits(a_alone));
    for (int64_t r = rows.num_rows(); r < rows.capacity(); ++r) EXPECT_TRUE(std::isnan(a(r, 0)));
  }
}

TYPED_TEST(ForwardTest, UpProjectionOfManyColumnsWithoutBias) {
  using T = TypeParam;
  RoutedRows rows(5, 2, 3, 78);
  const Variant variant = {Activation::swiglu, Layout::interleaved, Order::input_major};
  UpInputs<T> inputs(variant, 517, 12, 3);
  UpWeights weights = inputs.weights();
  weights.b = {};
  auto x = Array<T>::random(5, 12, 1.0, 9);
  Array<T> h(rows.capacity(), 2 * 517);
  backend().up_projection(
      {rows.groups(), {variant.activation}, x.view(), weights, h.view(), {}, {}}, kContext);
  expect_stage(h, stated_h<T>(rows, x, weights, 517), stage_tolerance<T>());
}

TYPED_TEST(ForwardTest, StridesDoNotReachTheBits) {
  using T = TypeParam;
  RoutedRows rows(6, 2, 3, 79);
  auto x = Array<T>::random(6, 300, 1.0, 9);
  const Variant plain = {Activation::swiglu, Layout::concatenated, Order::output_major};
  UpInputs<T> first(plain, 20, 300, 3);
  Array<T> h(rows.capacity(), 40);
  backend().up_projection(
      {rows.groups(), {Activation::swiglu}, x.view(), first.weights(), h.view(), {}, {}}, kContext);
  for (const Variant& variant : kVariants) {
    if (!is_gated(variant.activation)) continue;
    UpInputs<T> second(variant, 20, 300, 3);
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t e = 0; e < 3; ++e)
        for (int64_t i = 0; i < 20; ++i) {
          const size_t index = static_cast<size_t>(half);
          const GroupedMatrix& to = second.w.matrix[index];
          for (int64_t k = 0; k < 300; ++k)
            put(static_cast<T*>(
                    to.data)[e * to.expert_stride + i * to.row_stride + k * to.col_stride],
                at<T>(first.w.matrix[index], e, i, k));
          const GroupedVector bias = second.b.vectors()[index];
          put(static_cast<T*>(bias.data)[e * bias.expert_stride + i * bias.stride],
              at<T>(first.b.vectors()[index], e, i));
        }
    Array<T> again(rows.capacity(), 40);
    backend().up_projection(
        {rows.groups(), {Activation::swiglu}, x.view(), second.weights(), again.view(), {}, {}},
        kContext);
    EXPECT_TRUE(h.same_bits(again));
  }
}

TYPED_TEST(ForwardTest, DownProjection) {
  using T = TypeParam;
  for (Order order : {Order::output_major, Order::input_major}) {
    RoutedRows rows(11, 2, 4, 80);
    Grouped<T> w(4, 1, kHidden, kInner, Layout::concatenated, order);
    Grouped<T> b(4, 1, kHidden, 1, Layout::concatenated, Order::output_major);
    w.randomize(0.3, 5);
    b.randomize(0.5, 6);
    auto a = Array<T>::random(rows.capacity(), kInner, 1.0, 7, 1);
    for (bool biased : {true, false}) {
      Array<T> y(rows.capacity(), kHidden);
      const DownWeights weights = {w.matrix[0], biased ? b.vectors()[0] : GroupedVector{}};
      backend().down_projection({rows.groups(), a.view(), weights, y.view(), {}}, kContext);
      auto expected = zeros(rows.num_rows(), kHidden);
      for (int64_t r = 0; r < rows.num_rows(); ++r)
        for (int64_t i = 0; i < kHidden; ++i) {
          double sum = biased ? at<T>(weights.b, rows.expert(r), i) : 0.0;
          for (int64_t j = 0; j < kInner; ++j)
            sum += a(r, j) * at<T>(weights.w, rows.expert(r), i, j);
          expected[static_cast<size_t>(r)][static_cast<size_t>(i)] = sum;
        }
      expect_stage(y, expected, stage_tolerance<T>());
    }
  }
}

TYPED_TEST(ForwardTest, Combine) {
  using T = TypeParam;
  using Acc = Accumulator<T>;
  RoutedRows rows(12, 3, 5, 81);
  auto y = Array<T>::random(rows.capacity(), kHidden, 1.0, 8);
  auto scores = Array<Acc>::random(1, rows.num_slots(), 1.0, 9);
  for (bool scored : {true, false}) {
    Array<T> output(12, kHidden, 3);
    backend().combine(
        {rows.plan(), y.view(), scored ? scores.view1() : TensorView{}, output.view()}, kContext);
    auto expected = zeros(12, kHidden);
    for (int64_t slot = 0; slot < rows.num_slots(); ++slot) {
      const int64_t row = rows.slot_to_row.at(0, slot);
      for (int64_t i = 0; i < kHidden && row >= 0; ++i)
        expected[static_cast<size_t>(slot / 3)][static_cast<size_t>(i)] +=
            (scored ? scores(slot) : 1.0) * y(row, i);
    }
    expect_stage(output, expected, stage_tolerance<T>());
  }
}

TYPED_TEST(ForwardTest, CombineWithTokenOffsetsAndWithoutRows) {
  using T = TypeParam;
  auto y = Array<T>::integers(3, 5, 3, 8);
  Array<int32_t> slot_to_row(1, 5), token_offsets(1, 5);
  const int32_t rows_of_slots[] = {2, -1, 0, 1, -1};
  const int32_t offsets[] = {0, 0, 3, 4, 5};  // tokens with 0, 3, 1 and 1 slots
  std::copy_n(rows_of_slots, 5, slot_to_row.data().begin());
  std::copy_n(offsets, 5, token_offsets.data().begin());
  RoutingPlan plan;
  plan.slot_to_row = slot_to_row.view1();
  plan.token_offsets = token_offsets.view1();
  Array<T> output(4, 5);
  backend().combine({plan, y.view(), {}, output.view()}, kContext);
  for (int64_t i = 0; i < 5; ++i) {
    EXPECT_EQ(output(0, i), 0.0);
    EXPECT_EQ(output(1, i), y(2, i) + y(0, i));
    EXPECT_EQ(output(2, i), y(1, i));
    EXPECT_EQ(output(3, i), 0.0);
  }
}

TYPED_TEST(ForwardTest, ScaleRowsOfAPaddedBuffer) {
  using T = TypeParam;
  using Acc = Accumulator<T>;
  // Two experts with 2 and 1 rows in slots of three, and counts that reach past the capacity.
  Array<int32_t> counts(1, 3), offsets(1, 4);
  const int32_t stated_counts[] = {2, 1, 9};
  const int32_t stated_offsets[] = {0, 3, 6, 8};
  std::copy_n(stated_counts, 3, counts.data().begin());
  std::copy_n(stated_offsets, 4, offsets.data().begin());
  const RowGroups groups = {counts.view1(), offsets.view1(), {}, {}, 7};
  auto input = Array<T>::random(8, 5, 1.0, 8);
  auto scores = Array<Acc>::random(1, 8, 1.0, 9);
  Array<T> output(8, 5);
  backend().scale_rows({groups, scores.view1(), input.view(), output.view()}, kContext);
  Array<T> in_place = input;
  backend().scale_rows({groups, scores.view1(), in_place.view(), in_place.view()}, kContext);
  for (int64_t r = 0; r < 8; ++r) {
    const bool live = r == 0 || r == 1 || r == 3 || r == 6;
    for (int64_t i = 0; i < 5; ++i) {
      T expected = input.at(r, i);
      if (live) store(expected, load(scores.at(0, r)) * load(input.at(r, i)));
      EXPECT_EQ(in_place(r, i), get(expected)) << r;
      EXPECT_EQ(std::isnan(output(r, i)), !live) << r;
      if (live) {
        EXPECT_EQ(output(r, i), get(expected));
      }
    }
  }
}

TYPED_TEST(ForwardTest, SmallIntegersAreExact) {
  using T = TypeParam;
  RoutedRows rows(9, 2, 4, 82);
  auto x = Array<T>::integers(9, 10, 2, 9);
  Grouped<T> w(4, 2, 6, 10, Layout::interleaved, Order::output_major);
  w.randomize_integers(1, 10);
  Array<T> h(rows.capacity(), 12), a(rows.capacity(), 6);
  const UpWeights weights = {w.matrix, {}, 2};
  backend().up_projection(
      {rows.groups(), {Activation::reglu}, x.view(), weights, h.view(), a.view(), {}}, kContext);
  const auto expected = stated_h<T>(rows, x, weights, 6);
  for (int64_t r = 0; r < rows.num_rows(); ++r)
    for (int64_t j = 0; j < 6; ++j) {
      const auto& row = expected[static_cast<size_t>(r)];
      const double gate = row[static_cast<size_t>(j)];
      const double up = row[static_cast<size_t>(6 + j)];
      EXPECT_EQ(h(r, j), gate);
      EXPECT_EQ(h(r, 6 + j), up);
      // |gate up| stays below 2^8 for bf16 to hold it: 8 significant bits.
      if (std::abs(gate * up) <= 256) {
        EXPECT_EQ(a(r, j), std::max(gate, 0.0) * up);
      }
    }
}

}  // namespace
}  // namespace penstock::cpu::reference_test
