// SPDX-License-Identifier: Apache-2.0
//
// What routers rank by: near the functions that it stands for, in their order, and the same on a
// GPU only by its statement, which the GPU's own tests compare.
#include "backend/ranking.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace penstock::ranking {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(Ranking, ExponentialIsNearAndRises) {
  float before = 0.0f;
  for (float x = -87.0f; x <= 88.0f; x += 0.00731f) {
    const float got = exponential(x);
    const double exact = std::exp(static_cast<double>(x));
    EXPECT_LE(std::fabs(got - exact), 2e-7 * exact) << x;
    EXPECT_GE(got, before) << x;
    before = got;
  }
  EXPECT_EQ(exponential(0.0f), 1.0f);
  EXPECT_EQ(exponential(-0.0f), 1.0f);
}

TEST(Ranking, ExponentialAtItsEnds) {
  EXPECT_EQ(exponential(-87.5f), 0.0f);
  EXPECT_EQ(exponential(-kInfinity), 0.0f);
  EXPECT_EQ(exponential(88.5f), kInfinity);
  EXPECT_EQ(exponential(kInfinity), kInfinity);
  EXPECT_TRUE(std::isnan(exponential(kNan)));
}

TEST(Ranking, SigmoidIsNearAndSettles) {
  for (float logit = -80.0f; logit <= 80.0f; logit += 0.0173f) {
    const double exact = 1.0 / (1.0 + std::exp(-static_cast<double>(logit)));
    EXPECT_LE(std::fabs(sigmoid(logit) - exact), 3e-7 * exact) << logit;
  }
  EXPECT_EQ(sigmoid(0.0f), 0.5f);
  EXPECT_EQ(sigmoid(kInfinity), 1.0f);
  EXPECT_EQ(sigmoid(-kInfinity), 0.0f);
  EXPECT_TRUE(std::isnan(sigmoid(kNan)));
}

TEST(Ranking, WeightsAddUpInAnyOrder) {
  const float shares[] = {0.7f, 1e-6f, 0.1f, 3e-9f, 0.2f};
  double forward = 0.0;
  double backward = 0.0;
  for (int i = 0; i < 5; ++i) {
    forward += weight(shares[i]);
    backward += weight(shares[4 - i]);
  }
  EXPECT_EQ(forward, backward);
  EXPECT_NEAR(forward * 0x1p-30, 1.000001003, 1e-7);
  EXPECT_TRUE(std::isnan(weight(kNan)));
}

}  // namespace
}  // namespace penstock::ranking
