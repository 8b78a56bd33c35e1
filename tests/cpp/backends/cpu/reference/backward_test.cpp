// SPDX-License-Identifier: Apache-2.0
//
// Down backward, score gradient and up backward in every storage dtype, against sums in double over
// the inputs as stored.
#include <gtest/gtest.h>

#include "backends/cpu/common/activation.h"
#include "support.h"

namespace penstock::cpu::reference_test {
namespace {

constexpr int64_t kHidden = 45;
constexpr int64_t kInner = 263;  // more than one chunk

constexpr Activation kActivations[] = {
    Activation::swiglu,         Activation::geglu, Activation::reglu,
    Activation::swiglu_clamped, Activation::silu,  Activation::gelu,
    Activation::gelu_tanh,      Activation::relu,  Activation::relu_squared};

template <typename T>
class BackwardTest : public ::testing::Test {};
TYPED_TEST_SUITE(BackwardTest, StorageTypes);

// Inputs and outputs of one down_backward.
template <typename T>
struct DownCase {
  using Acc = Accumulator<T>;

  DownCase(Activation activation, Order order, int64_t inner = kInner)
      : kind(activation),
        halves(is_gated(activation) ? 2 : 1),
        n(inner),
        rows(11, 3, 5, 90),
        w(5, 1, kHidden, inner, Layout::concatenated, order),
        d_output(Array<T>::random(11, kHidden, 1.0, 91, 2)),
        scores(Array<Acc>::random(1, rows.num_slots(), 1.0, 92)),
        h(Array<T>::random(rows.capacity(), halves * inner, 2.5, 93)),
        dh(rows.capacity(), halves * inner),
        a_scaled(rows.capacity(), inner),
        partials(rows.capacity(), 1) {
    w.randomize(0.2, 94);
    put(scores.at(0, rows.slot(0)), 0.0);  // dS must be right where the score is 0
  }

  DownBackwardArgs args() {
    return {rows.groups(), {kind},    d_output.view(), {w.matrix[0], {}}, scores.view1(),
            h.view(),      dh.view(), a_scaled.view(), partials.view(),   {}};
  }

  double g(int64_t r, int64_t j) const {
    double sum = 0.0;
    for (int64_t i = 0; i < kHidden; ++i)
      sum += d_output(rows.token(r), i) * at<T>(w.matrix[0], rows.expert(r), i, j);
    return sum;
  }

  void expect_outputs() const {
    auto expected_dh = zeros(rows.num_rows(), halves * n);
    auto expected_a = zeros(rows.num_rows(), n);
    auto expected_partials = zeros(rows.num_rows(), 1);
    const ActivationSpec spec = {kind};
    for (int64_t r = 0; r < rows.num_rows(); ++r)
      for (int64_t j = 0; j < n; ++j) {
        const size_t row = static_cast<size_t>(r);
        const double s = scores(rows.slot(r));
        const double up = halves == 2 ? h(r, n + j) : 0.0;
        const double a = activate(spec, h(r, j), up);
        const double gradient = g(r, j);
        const auto pair = activation_gradient(spec, h(r, j), up, s * gradient);
        expected_dh[row][static_cast<size_t>(j)] = pair.gate;
        if (halves == 2) expected_dh[row][static_cast<size_t>(n + j)] = pair.up;
        expected_a[row][static_cast<size_t>(j)] = s * a;
        expected_partials[row][0] += gradient * a;
      }
    expect_stage(dh, expected_dh, stage_tolerance<T>());
    expect_stage(a_scaled, expected_a, stage_tolerance<T>());
    Distance scores_distance;
    for (int64_t r = 0; r < rows.num_rows(); ++r)
      scores_distance.add(partials(r, 0), expected_partials[static_cast<size_t>(r)][0]);
    EXPECT_TRUE(scores_distance.within(score_tolerance(dtype_of<T>())))
        << std::sqrt(scores_distance.error / scores_distance.norm);
  }

  Activation kind;
  int64_t halves;
  int64_t n;
  RoutedRows rows;
  Grouped<T> w;
  Array<T> d_output;
  Array<Acc> scores;
  Array<T> h, dh, a_scaled;
  Array<Acc> partials;
};

TYPED_TEST(BackwardTest, DownBackward) {
  for (Activation activation : kActivations) {
    SCOPED_TRACE(static_cast<int>(activation));
    for (Order order : {Order::output_major, Order::input_major}) {
      DownCase<TypeParam> state(activation, order);
      backend().down_backward(state.args(), kContext);
      state.expect_outputs();
    }
  }
}

TYPED_TEST(BackwardTest, DownBackwardMayWriteOverH) {
  for (Activation activation : kActivations) {
    DownCase<TypeParam> apart(activation, Order::output_major);
    backend().down_backward(apart.args(), kContext);
    DownCase<TypeParam> over(activation, Order::output_major);
    DownBackwardArgs args = over.args();
    args.dh = args.h;
    backend().down_backward(args, kContext);
    EXPECT_TRUE(over.a_scaled.same_bits(apart.a_scaled));
    EXPECT_TRUE(over.partials.same_bits(apart.partials));
    for (int64_t r = 0; r < apart.rows.capacity(); ++r)
      for (int64_t j = 0; j < apart.dh.cols(); ++j) {
        // Rows past the end keep their H.
        const double expected = r < apart.rows.num_rows() ? apart.dh(r, j) : apart.h(r, j);
        ASSERT_EQ(over.h(r, j), expected);
      }
  }
}

TYPED_TEST(BackwardTest, DownBackwardWithoutScoresOrPartials) {
  using Acc = Accumulator<TypeParam>;
  DownCase<TypeParam> state(Activation::swiglu, Order::output_major, 20);
  DownBackwardArgs args = state.args();
  args.scores = {};
  args.partials = {};
  backend().down_backward(args, kContext);
  for (int64_t r = 0; r < state.rows.capacity(); ++r) EXPECT_TRUE(std::isnan(state.partials(r, 0)));
  std::fill(state.scores.data().begin(), state.scores.data().end(), Acc(1));
  Array<TypeParam> dh = state.dh;
  backend().down_backward(state.args(), kContext);
  EXPECT_TRUE(dh.same_bits(state.dh));
}

TYPED_TEST(BackwardTest, ScoreGradient) {
  using T = TypeParam;
  using Acc = Accumulator<T>;
  RoutedRows rows(10, 3, 4, 95);
  auto partials = Array<Acc>::random(rows.capacity(), 3, 1.0, 96);
  auto d_output = Array<T>::random(10, kHidden, 1.0, 97);
  Grouped<T> b(4, 1, kHidden, 1, Layout::concatenated, Order::output_major);
  b.randomize(0.5, 98);
  for (bool biased : {true, false}) {
    Array<Acc> dscores(1, rows.num_slots());
    const GroupedVector b2 = biased ? b.vectors()[0] : GroupedVector{};
    backend().score_gradient({rows.groups(), partials.view(), d_output.view(), b2, dscores.view1()},
                             kContext);
    Distance distance;
    for (int64_t slot = 0; slot < rows.num_slots(); ++slot) {
      const int64_t row = rows.slot_to_row.at(0, slot);
      double expected = 0.0;
      if (row >= 0) expected = partials(row, 0) + partials(row, 1) + partials(row, 2);
      for (int64_t i = 0; i < kHidden && row >= 0 && biased; ++i)
        expected += d_output(rows.token(row), i) * at<T>(b2, rows.expert(row), i);
      if (row < 0) {
        EXPECT_EQ(dscores(slot), 0.0);
      }
      distance.add(dscores(slot), expected);
    }
    EXPECT_TRUE(distance.within(score_tolerance(dtype_of<Acc>())));
  }
}

TYPED_TEST(BackwardTest, UpBackward) {
  using T = TypeParam;
  for (int64_t halves : {1, 2}) {
    for (Layout layout : {Layout::concatenated, Layout::interleaved, Layout::separate}) {
      for (Order order : {Order::output_major, Order::input_major}) {
        RoutedRows rows(8, 2, 4, 99);
        Grouped<T> w(4, halves, 31, 270, layout, order);
        w.randomize(0.2, 100);
        auto dh = Array<T>::random(rows.capacity(), halves * 31, 1.0, 101);
        Array<T> dx(rows.capacity(), 270);
        const UpWeights weights = {w.matrix, {}, static_cast<int32_t>(halves)};
        backend().up_backward({rows.groups(), dh.view(), weights, dx.view(), {}}, kContext);
        auto expected = zeros(rows.num_rows(), 270);
        for (int64_t r = 0; r < rows.num_rows(); ++r)
          for (int64_t half = 0; half < halves; ++half)
            for (int64_t j = 0; j < 31; ++j)
              for (int64_t k = 0; k < 270; ++k)
                expected[static_cast<size_t>(r)][static_cast<size_t>(k)] +=
                    dh(r, half * 31 + j) *
                    at<T>(w.matrix[static_cast<size_t>(half)], rows.expert(r), j, k);
        expect_stage(dx, expected, stage_tolerance<T>());
      }
    }
  }
}

TYPED_TEST(BackwardTest, DispatchedRowsReadTheirOwnRow) {
  using T = TypeParam;
  using Acc = Accumulator<T>;
  DownCase<T> routed(Activation::swiglu, Order::output_major, 20);
  backend().down_backward(routed.args(), kContext);

  // The same rows brought in row order, with a score each.
  DownCase<T> state(Activation::swiglu, Order::output_major, 20);
  Array<T> d_rows(state.rows.capacity(), kHidden);
  Array<Acc> row_scores(1, state.rows.capacity());
  for (int64_t r = 0; r < state.rows.num_rows(); ++r) {
    row_scores.at(0, r) = state.scores.at(0, state.rows.slot(r));
    for (int64_t i = 0; i < kHidden; ++i)
      d_rows.at(r, i) = state.d_output.at(state.rows.token(r), i);
  }
  DownBackwardArgs args = state.args();
  args.rows.row_to_token = {};
  args.rows.row_to_slot = {};
  args.d_output = d_rows.view();
  args.scores = row_scores.view1();
  backend().down_backward(args, kContext);
  EXPECT_TRUE(state.dh.same_bits(routed.dh));
  EXPECT_TRUE(state.a_scaled.same_bits(routed.a_scaled));
  EXPECT_TRUE(state.partials.same_bits(routed.partials));

  Array<Acc> dscores(1, state.rows.capacity());
  backend().score_gradient({args.rows, state.partials.view(), d_rows.view(), {}, dscores.view1()},
                           kContext);
  for (int64_t r = 0; r < state.rows.capacity(); ++r) {
    if (r < state.rows.num_rows()) {
      EXPECT_EQ(dscores(r), state.partials(r, 0));
    }
    if (r >= state.rows.num_rows()) {
      EXPECT_TRUE(std::isnan(dscores(r)));
    }
  }
}

TYPED_TEST(BackwardTest, ANanRowStaysItsOwn) {
  using T = TypeParam;
  DownCase<T> clean(Activation::geglu, Order::output_major, 20);
  backend().down_backward(clean.args(), kContext);
  DownCase<T> dirty(Activation::geglu, Order::output_major, 20);
  put(dirty.d_output.at(4, 1), std::numeric_limits<double>::quiet_NaN());
  backend().down_backward(dirty.args(), kContext);
  for (int64_t r = 0; r < clean.rows.num_rows(); ++r)
    for (int64_t j = 0; j < 40; ++j) {
      if (clean.rows.token(r) == 4) {
        EXPECT_TRUE(std::isnan(dirty.dh(r, j)));
      }
      if (clean.rows.token(r) != 4) {
        EXPECT_EQ(dirty.dh(r, j), clean.dh(r, j));
      }
    }
}

}  // namespace
}  // namespace penstock::cpu::reference_test
