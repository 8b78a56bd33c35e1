// SPDX-License-Identifier: Apache-2.0
//
// Where the views of weights point, for every layout and order. Element (e, row, col) of a tensor
// holds its own offset, so an address is known by its value.
#include "experts/weight_views.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

namespace penstock::test {
namespace {

constexpr int64_t kExperts = 3, kHidden = 4, kInner = 5, kExpertStride = 100;

class WeightViews : public testing::Test {
 protected:
  WeightViews() : memory_(1000) { std::iota(memory_.begin(), memory_.end(), 0.0); }

  // Experts 100 elements apart, as in a slice of a bigger tensor.
  TensorView tensor(int64_t start, int64_t rows, int64_t cols) {
    TensorView view =
        TensorView::contiguous(memory_.data() + start, DType::float64, {kExperts, rows, cols});
    view.strides[0] = kExpertStride;
    return view;
  }
  TensorView vector(int64_t start, int64_t length) {
    TensorView view =
        TensorView::contiguous(memory_.data() + start, DType::float64, {kExperts, length});
    view.strides[0] = kExpertStride;
    return view;
  }

  static double at(const GroupedMatrix& m, int64_t e, int64_t row, int64_t col) {
    return static_cast<const double*>(
        m.data)[e * m.expert_stride + row * m.row_stride + col * m.col_stride];
  }
  static double at(const GroupedVector& v, int64_t e, int64_t i) {
    return static_cast<const double*>(v.data)[e * v.expert_stride + i * v.stride];
  }

  std::vector<double> memory_;
};

TEST_F(WeightViews, BothHalvesInOneTensor) {
  for (GateLayout layout : {GateLayout::concatenated, GateLayout::interleaved}) {
    for (WeightOrder order : {WeightOrder::output_major, WeightOrder::input_major}) {
      const bool output_major = order == WeightOrder::output_major;
      ExpertsConfig config;
      config.gate_layout = layout;
      config.weight_order = order;
      ExpertWeights weights;
      weights.w1 = output_major ? tensor(7, 2 * kInner, kHidden) : tensor(7, kHidden, 2 * kInner);
      weights.b1 = vector(11, 2 * kInner);
      const UpWeights up = up_weights_of(weights, config);
      ASSERT_EQ(up.halves, 2);
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t e = 0; e < kExperts; ++e)
          for (int64_t i = 0; i < kInner; ++i) {
            const int64_t row =
                layout == GateLayout::interleaved ? 2 * i + half : half * kInner + i;
            EXPECT_EQ(at(up.b[static_cast<size_t>(half)], e, i), 11 + e * kExpertStride + row);
            for (int64_t c = 0; c < kHidden; ++c)
              EXPECT_EQ(at(up.w[static_cast<size_t>(half)], e, i, c),
                        7 + e * kExpertStride +
                            (output_major ? row * kHidden + c : c * 2 * kInner + row));
          }
    }
  }
}

TEST_F(WeightViews, SeparateHalvesIgnoreTheLayout) {
  ExpertsConfig config;
  config.gate_layout = GateLayout::interleaved;
  ExpertWeights weights;
  weights.w1 = tensor(0, kInner, kHidden);
  weights.w1_up = tensor(400, kInner, kHidden);
  weights.b1 = vector(30, kInner);
  weights.b1_up = vector(430, kInner);
  const UpWeights up = up_weights_of(weights, config);
  EXPECT_EQ(at(up.w[0], 1, 2, 3), kExpertStride + 2 * kHidden + 3);
  EXPECT_EQ(at(up.w[1], 1, 2, 3), 400 + kExpertStride + 2 * kHidden + 3);
  EXPECT_EQ(at(up.b[0], 2, 4), 30 + 2 * kExpertStride + 4);
  EXPECT_EQ(at(up.b[1], 2, 4), 430 + 2 * kExpertStride + 4);
}

TEST_F(WeightViews, WithoutAGateThereIsOneHalf) {
  ExpertsConfig config;
  config.activation = Activation::gelu;
  ExpertWeights weights;
  weights.w1 = tensor(0, kInner, kHidden);
  const UpWeights up = up_weights_of(weights, config);
  EXPECT_EQ(up.halves, 1);
  EXPECT_TRUE(up.w[0].present());
  EXPECT_FALSE(up.w[1].present() || up.b[0].present() || up.b[1].present());
}

TEST_F(WeightViews, DownProjectionInBothOrders) {
  for (WeightOrder order : {WeightOrder::output_major, WeightOrder::input_major}) {
    const bool output_major = order == WeightOrder::output_major;
    ExpertsConfig config;
    config.weight_order = order;
    ExpertWeights weights;
    weights.w2 = output_major ? tensor(0, kHidden, kInner) : tensor(0, kInner, kHidden);
    weights.b2 = vector(60, kHidden);
    const DownWeights down = down_weights_of(weights, config);
    EXPECT_EQ(at(down.w, 2, 3, 1),
              2 * kExpertStride + (output_major ? 3 * kInner + 1 : 1 * kHidden + 3));
    EXPECT_EQ(at(down.b, 1, 3), 60 + kExpertStride + 3);
  }
}

TEST_F(WeightViews, AbsentTensorsGiveAbsentParts) {
  const UpWeights up = up_weights_of({}, {});
  const DownWeights down = down_weights_of({}, {});
  for (size_t half = 0; half < 2; ++half)
    EXPECT_FALSE(up.w[half].present() || up.b[half].present());
  EXPECT_FALSE(down.w.present() || down.b.present());
}

}  // namespace
}  // namespace penstock::test
