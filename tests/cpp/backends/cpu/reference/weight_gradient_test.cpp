// SPDX-License-Identifier: Apache-2.0
//
// Weight and bias gradients: every storage and output dtype, layout and access, overwriting and
// accumulating, with frozen and empty experts, against sums in double over the inputs as stored.
#include <gtest/gtest.h>

#include "support.h"

namespace penstock::cpu::reference_test {
namespace {

constexpr int64_t kExperts = 5;  // expert 3 has no rows: see RoutedRows
constexpr int64_t kEmpty = kExperts - 2;
constexpr int64_t kRight = 261;  // more than one chunk

// T is the storage dtype, Out that of the gradient.
template <typename T, typename Out>
struct Types {
  using Storage = T;
  using Gradient = Out;
};

template <typename Pair>
class WeightGradientTest : public ::testing::Test {};
using Pairs = ::testing::Types<Types<double, double>, Types<double, float>, Types<float, float>,
                               Types<float16, float16>, Types<float16, float>,
                               Types<bfloat16, bfloat16>, Types<bfloat16, float>>;
TYPED_TEST_SUITE(WeightGradientTest, Pairs);

struct Variant {
  int64_t halves;
  Layout layout;
  Order order;
  RowAccess left;
  RowAccess right;
};

constexpr Variant kVariants[] = {
    {2, Layout::concatenated, Order::output_major, RowAccess::direct, RowAccess::gathered},
    {2, Layout::interleaved, Order::output_major, RowAccess::direct, RowAccess::gathered},
    {2, Layout::interleaved, Order::input_major, RowAccess::direct, RowAccess::gathered},
    {2, Layout::separate, Order::input_major, RowAccess::direct, RowAccess::direct},
    {1, Layout::concatenated, Order::output_major, RowAccess::gathered, RowAccess::direct},
    {1, Layout::concatenated, Order::input_major, RowAccess::gathered, RowAccess::direct},
};

constexpr GradMode kModes[] = {GradMode::overwrite, GradMode::accumulate};

template <typename T, typename Out>
struct Case {
  explicit Case(const Variant& v, int64_t seed = 200)
      : variant(v),
        rows(17, 2, kExperts, 201),
        left(Array<T>::random(rows.capacity(), v.halves * 9, 1.0, static_cast<uint64_t>(seed), 1)),
        right(Array<T>::random(rows.capacity(), kRight, 1.0, static_cast<uint64_t>(seed + 1))),
        out(kExperts, v.halves, 9, kRight, v.layout, v.order),
        trainable(1, kExperts) {
    out.randomize(1.0, 203);
    std::fill(trainable.data().begin(), trainable.data().end(), uint8_t{1});
  }

  WeightGradientArgs args(GradMode mode) {
    return {rows.groups(),
            left.view(),
            variant.left,
            right.view(),
            variant.right,
            out.matrix,
            static_cast<int32_t>(variant.halves),
            mode,
            trainable.view1(),
            {}};
  }

  int64_t operand(RowAccess access, int64_t row) const {
    return access == RowAccess::gathered ? rows.token(row) : row;
  }

  double sum(int64_t expert, int64_t left_column, int64_t right_column) const {
    double total = 0.0;
    for (int64_t r = 0; r < rows.num_rows(); ++r)
      if (rows.expert(r) == expert)
        total += left(operand(variant.left, r), left_column) *
                 right(operand(variant.right, r), right_column);
    return total;
  }

  Variant variant;
  RoutedRows rows;
  Array<T> left, right;
  Grouped<Out> out;
  Array<uint8_t> trainable;
};

// Rows of all the gradient's matrices, one below the other, as stored.
template <typename Out>
Array<Out> flattened(const Grouped<Out>& out, int64_t halves) {
  Array<Out> flat(kExperts * halves * 9, kRight);
  for (int64_t e = 0; e < kExperts; ++e)
    for (int64_t half = 0; half < halves; ++half)
      for (int64_t i = 0; i < 9; ++i)
        for (int64_t k = 0; k < kRight; ++k)
          put(flat.at((e * halves + half) * 9 + i, k),
              at<Out>(out.matrix[static_cast<size_t>(half)], e, i, k));
  return flat;
}

TYPED_TEST(WeightGradientTest, MatchesTheSum) {
  using T = typename TypeParam::Storage;
  using Out = typename TypeParam::Gradient;
  for (const Variant& variant : kVariants) {
    for (GradMode mode : kModes) {
      Case<T, Out> state(variant);
      const Array<Out> before = flattened(state.out, variant.halves);
      backend().weight_gradient(state.args(mode), kContext);
      const Array<Out> after = flattened(state.out, variant.halves);
      auto expected = zeros(after.rows(), kRight);
      for (int64_t i = 0; i < after.rows(); ++i)
        for (int64_t k = 0; k < kRight; ++k) {
          const double start = mode == GradMode::accumulate ? before(i, k) : 0.0;
          expected[static_cast<size_t>(i)][static_cast<size_t>(k)] =
              start + state.sum(i / (variant.halves * 9), i % (variant.halves * 9), k);
        }
      expect_stage(after, expected, stage_tolerance<Out>());
    }
  }
}

// Elements of the buffer that belong to expert `e`, its share of the gap aside.
template <typename Out>
std::vector<Out> slice(Grouped<Out>& out, int64_t halves, int64_t e) {
  std::vector<Out> values;
  for (int64_t half = 0; half < halves; ++half) {
    const GroupedMatrix& w = out.matrix[static_cast<size_t>(half)];
    for (int64_t i = 0; i < 9; ++i)
      for (int64_t k = 0; k < kRight; ++k)
        values.push_back(static_cast<const Out*>(
            w.data)[e * w.expert_stride + i * w.row_stride + k * w.col_stride]);
  }
  return values;
}

template <typename Out>
bool same_bits(const std::vector<Out>& a, const std::vector<Out>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Out)) == 0;
}

TYPED_TEST(WeightGradientTest, EmptyAndFrozenExperts) {
  using T = typename TypeParam::Storage;
  using Out = typename TypeParam::Gradient;
  for (const Variant& variant : kVariants) {
    for (GradMode mode : kModes) {
      Case<T, Out> state(variant);
      state.trainable.at(0, 1) = 0;
      for (Out& value : state.out.storage.data()) put(value, -0.0);  // + 0 would show
      Grouped<Out>& out = state.out;
      const auto minus_zeros = slice(out, variant.halves, 1);
      backend().weight_gradient(state.args(mode), kContext);
      EXPECT_TRUE(same_bits(slice(out, variant.halves, 1), minus_zeros)) << "frozen";
      const std::vector<Out> zero(minus_zeros.size(), Out{});
      EXPECT_TRUE(same_bits(slice(out, variant.halves, kEmpty),
                            mode == GradMode::overwrite ? zero : minus_zeros));
      EXPECT_FALSE(same_bits(slice(out, variant.halves, 0), minus_zeros));
      // Between the experts nothing is written.
      const int64_t stride = out.matrix[0].expert_stride;
      for (int64_t e = 0; e < kExperts; ++e)
        for (int64_t gap = 1; gap <= Grouped<Out>::kExpertGap; ++gap)
          EXPECT_TRUE(std::signbit(out.storage((e + 1) * stride - gap)));
    }
  }
}

TYPED_TEST(WeightGradientTest, AbsentTrainableMeansAllAndAbsentHalfIsNotWritten) {
  using T = typename TypeParam::Storage;
  using Out = typename TypeParam::Gradient;
  const Variant variant = {2, Layout::separate, Order::output_major, RowAccess::direct,
                           RowAccess::gathered};
  Case<T, Out> whole(variant), half(variant);
  const auto untouched = half.out.storage;
  backend().weight_gradient(whole.args(GradMode::overwrite), kContext);
  WeightGradientArgs args = half.args(GradMode::overwrite);
  args.trainable = {};
  args.out[0] = {};
  backend().weight_gradient(args, kContext);
  for (int64_t e = 0; e < kExperts; ++e)
    for (int64_t i = 0; i < 9; ++i)
      for (int64_t k = 0; k < kRight; ++k) {
        EXPECT_EQ(at<Out>(half.out.matrix[1], e, i, k), at<Out>(whole.out.matrix[1], e, i, k));
        const GroupedMatrix& w = half.out.matrix[0];
        EXPECT_EQ(at<Out>(w, e, i, k),
                  untouched(e * w.expert_stride + i * w.row_stride + k * w.col_stride));
      }
}

TYPED_TEST(WeightGradientTest, NanReachesOnlyItsExpert) {
  using T = typename TypeParam::Storage;
  using Out = typename TypeParam::Gradient;
  Case<T, Out> state(kVariants[0]);
  put(state.left.at(0, 3), std::numeric_limits<double>::quiet_NaN());  // row 0: the first expert
  const int64_t spoiled = state.rows.expert(0);
  backend().weight_gradient(state.args(GradMode::overwrite), kContext);
  for (int64_t e = 0; e < kExperts; ++e)
    for (int64_t i = 0; i < 9; ++i)
      EXPECT_EQ(std::isnan(at<Out>(state.out.matrix[0], e, i, 0)), e == spoiled && i == 3);
}

TYPED_TEST(WeightGradientTest, SmallIntegersAreExact) {
  using T = typename TypeParam::Storage;
  using Out = typename TypeParam::Gradient;
  for (GradMode mode : kModes) {
    Case<T, Out> state(kVariants[1]);
    state.left = Array<T>::integers(state.rows.capacity(), 18, 2, 7);
    state.right = Array<T>::integers(state.rows.capacity(), kRight, 2, 8);
    state.out.randomize_integers(3, 9);
    const Array<Out> before = flattened(state.out, 2);
    backend().weight_gradient(state.args(mode), kContext);
    const Array<Out> after = flattened(state.out, 2);
    for (int64_t i = 0; i < after.rows(); ++i)
      for (int64_t k = 0; k < kRight; ++k)
        EXPECT_EQ(after(i, k), (mode == GradMode::accumulate ? before(i, k) : 0.0) +
                                   state.sum(i / 18, i % 18, k));
  }
}

template <typename T, typename Out>
void check_bias(int64_t halves, Layout layout, GradMode mode, bool scored) {
  using Acc = Accumulator<T>;
  constexpr int64_t kLength = 259;
  RoutedRows rows(17, 2, kExperts, 211);
  auto values = Array<T>::random(rows.capacity(), halves * kLength, 1.0, 212, 3);
  auto scores = Array<Acc>::random(1, rows.num_slots(), 1.0, 213);
  Grouped<Out> out(kExperts, halves, kLength, 1, layout, Order::output_major);
  out.randomize(1.0, 214);
  const std::vector<Out> before = out.storage.data();
  Array<uint8_t> trainable(1, kExperts);
  std::fill(trainable.data().begin(), trainable.data().end(), uint8_t{1});
  trainable.at(0, 0) = 0;
  const RowAccess access = halves == 1 ? RowAccess::gathered : RowAccess::direct;
  backend().bias_gradient({rows.groups(),
                           values.view(),
                           access,
                           scored ? scores.view1() : TensorView{},
                           out.vectors(),
                           static_cast<int32_t>(halves),
                           mode,
                           trainable.view1(),
                           {}},
                          kContext);
  Distance distance;
  for (int64_t e = 0; e < kExperts; ++e)
    for (int64_t half = 0; half < halves; ++half)
      for (int64_t j = 0; j < kLength; ++j) {
        const GroupedVector vector = out.vectors()[static_cast<size_t>(half)];
        const auto* first = static_cast<const Out*>(out.matrix[0].data);
        const auto* element =
            static_cast<const Out*>(vector.data) + e * vector.expert_stride + j * vector.stride;
        const double start = get(before[static_cast<size_t>(element - first)]);
        double expected = mode == GradMode::accumulate || e == 0 ? start : 0.0;
        for (int64_t r = 0; r < rows.num_rows(); ++r)
          if (rows.expert(r) == e && e != 0)
            expected +=
                (scored ? scores(rows.slot(r)) : 1.0) *
                values(access == RowAccess::gathered ? rows.token(r) : r, half * kLength + j);
        if (e == 0 || e == kEmpty) {
          EXPECT_EQ(get(*element), expected);
        }
        distance.add(get(*element), expected);
      }
  EXPECT_TRUE(distance.within(stage_tolerance<Out>())) << std::sqrt(distance.error / distance.norm);
}

TYPED_TEST(WeightGradientTest, BiasGradient) {
  for (GradMode mode : kModes)
    for (bool scored : {true, false})
      for (Layout layout : {Layout::concatenated, Layout::interleaved, Layout::separate})
        for (int64_t halves : {1, 2})
          check_bias<typename TypeParam::Storage, typename TypeParam::Gradient>(halves, layout,
                                                                                mode, scored);
}

}  // namespace
}  // namespace penstock::cpu::reference_test
