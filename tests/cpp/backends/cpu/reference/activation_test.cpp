// SPDX-License-Identifier: Apache-2.0
//
// The nine activations against the textbook formulas in long double, their gradients against
// central differences, and what happens at kinks, limits, infinities and NaN, as torch has it.
#include "backends/cpu/common/activation.h"

#include <gtest/gtest.h>

#include <vector>

#include "support.h"

namespace penstock::cpu {
namespace {

constexpr Activation kAll[] = {
    Activation::swiglu,         Activation::geglu, Activation::reglu,
    Activation::swiglu_clamped, Activation::silu,  Activation::gelu,
    Activation::gelu_tanh,      Activation::relu,  Activation::relu_squared};

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

long double plain_sigmoid(long double x) { return 1.0L / (1.0L + std::exp(-x)); }

long double plain_gelu(long double x) { return x * 0.5L * std::erfc(-x / std::sqrt(2.0L)); }

long double plain_gelu_tanh(long double x) {
  const long double pi = std::acos(-1.0L);
  return 0.5L * x * (1.0L + std::tanh(std::sqrt(2.0L / pi) * (x + 0.044715L * x * x * x)));
}

long double plain(const ActivationSpec& spec, long double gate, long double up) {
  const long double limit = spec.clamp_limit;
  switch (spec.kind) {
    case Activation::swiglu:
      return gate * plain_sigmoid(gate) * up;
    case Activation::geglu:
      return plain_gelu(gate) * up;
    case Activation::reglu:
      return std::max(gate, 0.0L) * up;
    case Activation::swiglu_clamped: {
      const long double g = std::min(gate, limit);
      const long double u = std::max(std::min(up, limit), -limit);
      return g * plain_sigmoid(static_cast<long double>(spec.clamp_alpha) * g) * (u + 1.0L);
    }
    case Activation::silu:
      return gate * plain_sigmoid(gate);
    case Activation::gelu:
      return plain_gelu(gate);
    case Activation::gelu_tanh:
      return plain_gelu_tanh(gate);
    case Activation::relu:
      return std::max(gate, 0.0L);
    case Activation::relu_squared:
      return std::max(gate, 0.0L) * std::max(gate, 0.0L);
  }
  return 0.0L;
}

template <typename T>
class ActivationTest : public ::testing::Test {};
TYPED_TEST_SUITE(ActivationTest, reference_test::LogitTypes);

TYPED_TEST(ActivationTest, ValuesFollowTheFormulas) {
  using T = TypeParam;
  const double ulp = std::numeric_limits<T>::epsilon();
  for (Activation kind : kAll) {
    for (double limit : {7.0, 2.0}) {
      const ActivationSpec spec = {kind, limit == 7.0 ? 1.702f : 0.9f, static_cast<float>(limit)};
      for (double x = -9.0; x <= 9.0; x += 0.173) {
        for (double y : {-8.5, -1.25, 0.0, 0.4, 3.0, 7.5}) {
          const T gate = static_cast<T>(x);
          const T up = static_cast<T>(y);
          const double expected = static_cast<double>(plain(spec, gate, up));
          // exp(-z) multiplies the rounding error of z by z, and |z| reaches 80 in gelu_tanh;
          // 1 + tanh cancels in the statement itself, which leaves it 4e-18 in long double.
          EXPECT_NEAR(static_cast<double>(activate(spec, gate, up)), expected,
                      90.0 * ulp * std::abs(expected) + 4e-18)
              << "activation " << static_cast<int>(kind) << " gate " << x << " up " << y;
        }
      }
    }
  }
}

TYPED_TEST(ActivationTest, GradientsInFloatFollowThoseInDouble) {
  using T = TypeParam;
  const double ulp = std::numeric_limits<T>::epsilon();
  for (Activation kind : kAll) {
    const ActivationSpec spec = {kind};
    for (double x = -12.0; x <= 12.0; x += 0.31) {
      const T gate = static_cast<T>(x);
      const auto actual = activation_gradient<T>(spec, gate, T(1.5), T(-0.75));
      const auto expected =
          activation_gradient<double>(spec, static_cast<double>(gate), 1.5, -0.75);
      EXPECT_NEAR(static_cast<double>(actual.gate), expected.gate, 8 * ulp) << x;
      EXPECT_NEAR(static_cast<double>(actual.up), expected.up, 16 * ulp * (1 + std::abs(x))) << x;
    }
  }
}

TEST(ActivationGradient, MatchesCentralDifferences) {
  constexpr long double kStep = 1e-6L;
  reference_test::Random random(5);
  for (Activation kind : kAll) {
    const ActivationSpec spec = {kind, 1.702f, 3.0f};
    for (int trial = 0; trial < 2000; ++trial) {
      const double gate = random.symmetric(5.0);
      const double up = random.symmetric(5.0);
      const double incoming = random.symmetric(2.0);
      // Away from the kinks at 0 and at the limits, where there is no derivative.
      if (std::abs(gate) < 1e-4 || std::abs(gate - 3.0) < 1e-4) continue;
      if (std::abs(std::abs(up) - 3.0) < 1e-4) continue;
      const auto along = [&](long double dg, long double du) {
        return incoming * (plain(spec, gate + dg, up + du) - plain(spec, gate - dg, up - du)) /
               (2 * kStep);
      };
      const auto actual = activation_gradient<double>(spec, gate, up, incoming);
      EXPECT_NEAR(actual.gate, static_cast<double>(along(kStep, 0)), 1e-10);
      EXPECT_NEAR(actual.up, static_cast<double>(along(0, kStep)), 1e-10);
    }
  }
}

TEST(ActivationGradient, KinksAndLimits) {
  const auto gradient = [](Activation kind, double gate, double up) {
    return activation_gradient<double>({kind, 1.702f, 7.0f}, gate, up, 1.0);
  };
  for (double zero : {0.0, -0.0}) {
    EXPECT_EQ(gradient(Activation::relu, zero, 0).gate, 0.0);
    EXPECT_EQ(gradient(Activation::relu_squared, zero, 0).gate, 0.0);
    EXPECT_EQ(gradient(Activation::reglu, zero, 3).gate, 0.0);
    EXPECT_EQ(gradient(Activation::reglu, zero, 3).up, 0.0);
  }
  const double above = std::nextafter(7.0, 8.0);
  EXPECT_NE(gradient(Activation::swiglu_clamped, 7.0, 1.0).gate, 0.0);
  EXPECT_EQ(gradient(Activation::swiglu_clamped, above, 1.0).gate, 0.0);
  EXPECT_NE(gradient(Activation::swiglu_clamped, above, 1.0).up, 0.0);
  EXPECT_NE(gradient(Activation::swiglu_clamped, -7.5, 1.0).gate, 0.0);  // not clamped from below
  for (double side : {-1.0, 1.0}) {
    EXPECT_NE(gradient(Activation::swiglu_clamped, 1.0, side * 7.0).up, 0.0);
    EXPECT_EQ(gradient(Activation::swiglu_clamped, 1.0, side * above).up, 0.0);
    EXPECT_NE(gradient(Activation::swiglu_clamped, 1.0, side * above).gate, 0.0);
  }
}

// One row of what torch 2.9 and 2.15 give in float32 for these inputs.
struct Extreme {
  Activation kind;
  double gate;
  double value;
  double derivative;
};

void expect_same(double actual, double expected, const Extreme& row) {
  if (std::isnan(expected)) {
    EXPECT_TRUE(std::isnan(actual)) << static_cast<int>(row.kind) << " at " << row.gate;
  } else {
    EXPECT_FLOAT_EQ(static_cast<float>(actual), static_cast<float>(expected))
        << static_cast<int>(row.kind) << " at " << row.gate;
  }
}

TEST(ActivationExtremes, TakeTorchsCourse) {
  const Extreme rows[] = {
      {Activation::silu, -kInf, kNan, kNan},
      {Activation::silu, kInf, kInf, kNan},
      {Activation::silu, kNan, kNan, kNan},
      {Activation::silu, -1e30, 0, 0},
      {Activation::silu, 1e30, 1e30, 1},
      {Activation::silu, -20, -4.1223072e-8, -3.9161918e-8},
      {Activation::gelu, -kInf, kNan, kNan},
      {Activation::gelu, kInf, kInf, kNan},
      {Activation::gelu, kNan, kNan, kNan},
      {Activation::gelu, -1e30, 0, 0},
      {Activation::gelu, 1e30, 1e30, 1},
      {Activation::gelu_tanh, -kInf, kNan, kNan},
      {Activation::gelu_tanh, kInf, kInf, kNan},
      {Activation::gelu_tanh, kNan, kNan, kNan},
      {Activation::gelu_tanh, 100, 100, 1},
      {Activation::gelu_tanh, -100, 0, 0},
      {Activation::relu, -kInf, 0, 0},
      {Activation::relu, kInf, kInf, 1},
      {Activation::relu, kNan, kNan, 1},
      {Activation::relu_squared, -kInf, 0, 0},
      {Activation::relu_squared, kInf, kInf, kInf},
      {Activation::relu_squared, kNan, kNan, kNan},
      {Activation::relu_squared, 7, 49, 14},
  };
  for (const Extreme& row : rows) {
    const ActivationSpec spec = {row.kind};
    const float gate = static_cast<float>(row.gate);
    expect_same(activate(spec, gate, 0.0f), row.value, row);
    expect_same(activation_gradient(spec, gate, 0.0f, 1.0f).gate, row.derivative, row);
    const double wide = row.gate;
    EXPECT_EQ(std::isnan(activate(spec, wide, 0.0)), std::isnan(row.value));
    EXPECT_EQ(std::isnan(activation_gradient(spec, wide, 0.0, 1.0).gate),
              std::isnan(row.derivative));
  }
}

TEST(ActivationExtremes, LargeFiniteInputsHaveFiniteGradients) {
  for (Activation kind : kAll) {
    if (kind == Activation::relu_squared) continue;  // grows without bound, as it should
    for (float gate : {-3e38f, -1e30f, -1e20f, -1e3f, -88.8f, 88.8f, 1e3f, 1e20f, 1e30f, 3e38f}) {
      const auto gradient = activation_gradient<float>({kind}, gate, 1.0f, 1.0f);
      EXPECT_TRUE(std::isfinite(gradient.gate)) << static_cast<int>(kind) << " at " << gate;
      EXPECT_LE(std::abs(gradient.gate), 2.5f) << static_cast<int>(kind) << " at " << gate;
      EXPECT_TRUE(std::isfinite(gradient.up)) << static_cast<int>(kind) << " at " << gate;
    }
  }
}

TEST(ActivationExtremes, ClampedSwigluTakesTorchsCourse) {
  struct Row {
    double gate, up, value, gate_gradient, up_gradient;
  };
  const Row rows[] = {
      {-kInf, 1, kNan, kNan, kNan},    {kInf, 1, 13.9999, 0, 7},
      {kNan, 1, kNan, 0, kNan},        {1, kInf, 6.7664, 8.5422, 0},
      {1, -kInf, -5.0748, -6.4067, 0}, {1, kNan, kNan, kNan, 0},
      {8, -7, -41.9997, 0, 6.99995},   {-1e30, 1, 0, 0, 0},
  };
  const auto same = [](double actual, double expected) {
    return std::isnan(expected) ? std::isnan(actual) : std::abs(actual - expected) < 2e-4;
  };
  for (const Row& row : rows) {
    const ActivationSpec spec = {Activation::swiglu_clamped};
    const float gate = static_cast<float>(row.gate);
    const float up = static_cast<float>(row.up);
    const auto gradient = activation_gradient(spec, gate, up, 1.0f);
    EXPECT_TRUE(same(activate(spec, gate, up), row.value)) << row.gate << " " << row.up;
    EXPECT_TRUE(same(gradient.gate, row.gate_gradient)) << row.gate << " " << row.up;
    EXPECT_TRUE(same(gradient.up, row.up_gradient)) << row.gate << " " << row.up;
  }
}

TEST(ActivationExtremes, AClosedReluStopsEvenNan) {
  const double nan = kNan;
  EXPECT_EQ(activation_gradient<double>({Activation::relu}, -1.0, 0.0, nan).gate, 0.0);
  EXPECT_EQ(activation_gradient<double>({Activation::relu_squared}, -1.0, 0.0, nan).gate, 0.0);
  EXPECT_EQ(activation_gradient<double>({Activation::reglu}, -1.0, 2.0, nan).gate, 0.0);
  EXPECT_TRUE(std::isnan(activation_gradient<double>({Activation::relu}, 1.0, 0.0, nan).gate));
}

}  // namespace
}  // namespace penstock::cpu
