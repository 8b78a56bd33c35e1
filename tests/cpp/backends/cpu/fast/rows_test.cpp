// SPDX-License-Identifier: Apache-2.0
//
// The row kernels of every variant: conversions bit for bit on all 16-bit patterns and every kind
// of float; activations and gradients against the scalar formulas in double, kinks, infinities and
// NaN included; tails of every length inside guard values.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "backends/cpu/common/activation.h"
#include "backends/cpu/fast/isa.h"
#include "emulated_kernels.h"
#include "tensor/half.h"

namespace penstock::cpu::fast_test {
namespace {

using fast::Element;

struct KernelSet {
  const char* name;
  const fast::IsaKernels* kernels;
};

std::vector<KernelSet> kernel_sets() {
  std::vector<KernelSet> sets = {{"portable", &fast::portable_kernels()},
                                 {"emulated", &emulated_avx512_bf16()}};
#if defined(__x86_64__)
  if (fast::is_supported(fast::Isa::avx2)) sets.push_back({"avx2", &fast::avx2_kernels()});
  if (fast::is_supported(fast::Isa::avx512)) sets.push_back({"avx512", &fast::avx512_kernels()});
#endif
  return sets;
}

class FastRows : public ::testing::TestWithParam<KernelSet> {
 protected:
  const fast::RowKernels& rows = GetParam().kernels->rows;
};

bool same(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) || (a != a && b != b);
}

TEST_P(FastRows, WidenEveryPattern) {
  std::vector<uint16_t> halves(65536);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<float> floats(halves.size());
  rows.widen(Element::bf16, halves.data(), floats.data(), 65536);
  for (size_t i = 0; i < halves.size(); ++i)
    ASSERT_TRUE(same(floats[i], to_float(bfloat16{halves[i]}))) << i;
  rows.widen(Element::f16, halves.data(), floats.data(), 65536);
  for (size_t i = 0; i < halves.size(); ++i)
    ASSERT_TRUE(same(floats[i], to_float(float16{halves[i]}))) << i;
}

// Floats around every 16-bit pattern: ties, just off ties, subnormals, overflow, NaN.
TEST_P(FastRows, NarrowRoundsToNearestEven) {
  std::vector<float> floats;
  for (uint32_t high = 0; high < 65536; ++high)
    for (uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0x1000u, 0x3000u, 0xffffu})
      floats.push_back(std::bit_cast<float>(high << 16 | low));
  const int64_t count = static_cast<int64_t>(floats.size());
  std::vector<uint16_t> halves(floats.size());
  rows.narrow(Element::bf16, floats.data(), halves.data(), count);
  for (size_t i = 0; i < floats.size(); ++i)
    ASSERT_EQ(halves[i], to_bfloat16(floats[i]).bits) << floats[i];
  rows.narrow(Element::f16, floats.data(), halves.data(), count);
  for (size_t i = 0; i < floats.size(); ++i)
    ASSERT_TRUE(same(to_float(float16{halves[i]}), to_float(to_float16(floats[i])))) << floats[i];
}

TEST_P(FastRows, TailsTouchNothingBeyond) {
  constexpr float kGuard = -123.5f;
  for (int64_t count = 0; count <= 40; ++count) {
    const size_t size = static_cast<size_t>(count);
    std::vector<float> from(size), to(size + 40, kGuard);
    std::vector<uint16_t> halves(size + 40, 0x4321);
    for (size_t i = 0; i < size; ++i) from[i] = static_cast<float>(i) + 1.0f;
    double squares = 0.0;
    for (float value : from) squares += static_cast<double>(value) * value;
    EXPECT_EQ(rows.dot(from.data(), from.data(), count), squares);
    rows.scale(2.0f, from.data(), to.data(), count);
    rows.add(from.data(), to.data(), count);
    rows.add_scaled(Element::f32, 3.0f, from.data(), to.data(), count);
    rows.narrow(Element::bf16, from.data(), halves.data(), count);
    rows.add_scaled(Element::bf16, -1.0f, halves.data(), to.data(), count);
    rows.narrow(Element::f16, from.data(), halves.data(), count);
    rows.add_scaled(Element::f16, 1.0f, halves.data(), to.data(), count);
    for (size_t i = 0; i < to.size(); ++i)
      ASSERT_EQ(to[i], i < size ? 6.0f * from[i] : kGuard) << count << " " << i;
    for (size_t i = size; i < halves.size(); ++i) ASSERT_EQ(halves[i], 0x4321);
  }
}

std::vector<float> arguments() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<float> values = {0.0f,      -0.0f,      7.0f,
                               -7.0f,     7.0000005f, 6.9999995f,
                               1e-40f,    -1e-40f,    88.0f,
                               -88.0f,    104.0f,     -104.0f,
                               1e4f,      -1e4f,      1e20f,
                               -1e20f,    3e38f,      -3e38f,
                               kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()};
  for (int i = -1300; i <= 1300; ++i) values.push_back(static_cast<float>(i) * 0.0101f);
  return values;
}

// Within a few units in the last place of `scale`; infinities and NaN alike.
void expect_close(double actual, double wanted, double scale, const std::string& what) {
  if (std::isnan(wanted)) {
    EXPECT_TRUE(std::isnan(actual)) << what << " got " << actual << " for NaN";
    return;
  }
  const double limit = std::numeric_limits<float>::max();
  if (std::abs(wanted) > limit) {
    EXPECT_GE(std::abs(actual), 0.99 * limit) << what;
    return;
  }
  constexpr double kUnits = 6e-7;
  EXPECT_LE(std::abs(actual - wanted), kUnits * scale + 1e-37)
      << what << " got " << actual << ", expected " << wanted;
}

TEST_P(FastRows, ActivationsAreTheScalarFormulas) {
  const std::vector<float> gates = arguments();
  const int64_t count = static_cast<int64_t>(gates.size());
  for (int kind = 0; kind < fast::kNumActivations; ++kind) {
    ActivationSpec spec;
    spec.kind = static_cast<Activation>(kind);
    for (float up_value : {0.75f, -7.0f, 7.5f, -8.0f}) {
      const std::vector<float> up(gates.size(), up_value), g(gates.size(), 0.5f);
      std::vector<float> a(gates.size()), a_too(a), d_gate(a), d_up(a);
      fast::ActivationRow row = {gates.data(), up.data(), count,   a.data(),
                                 nullptr,      1.0f,      nullptr, nullptr};
      const fast::ActivationParams params = {spec.clamp_alpha, spec.clamp_limit};
      rows.activate[kind](params, row);
      row.a = a_too.data();
      row.g = g.data();
      row.score = 4.0f;
      row.d_gate = d_gate.data();
      row.d_up = is_gated(spec.kind) ? d_up.data() : nullptr;
      rows.activation_gradient[kind](params, row);
      for (size_t i = 0; i < gates.size(); ++i) {
        const double gate = gates[i], x = std::abs(gate);
        const double wanted = activate<double>(spec, gate, up_value);
        const auto gradient = activation_gradient<double>(spec, gate, up_value, 2.0);
        const std::string what = std::string(name_of(spec.kind)) + " at " + std::to_string(gate);
        // Beyond |x| = 1 an argument's rounding is amplified |x| (gelu: x^2) times by exp.
        const double grown = x < 15.0 ? 1.0 + x * x : 1.0;
        expect_close(a[i], wanted, grown * std::abs(wanted), what);
        expect_close(a_too[i], wanted, grown * std::abs(wanted), what);
        expect_close(d_gate[i], gradient.gate, 3.0 * (1.0 + std::abs(gradient.gate)),
                     what + " gate");
        if (is_gated(spec.kind))
          expect_close(d_up[i], gradient.up, grown * std::abs(gradient.up), what + " up");
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, FastRows, ::testing::ValuesIn(kernel_sets()),
                         [](const auto& set) { return set.param.name; });

}  // namespace
}  // namespace penstock::cpu::fast_test
