// SPDX-License-Identifier: Apache-2.0
//
// bf16 and fp16 storage: every bit pattern, every boundary between neighbours.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/compare.h"
#include "tensor/dispatch.h"

namespace penstock::test {
namespace {

template <typename T>
T of_bits(uint32_t bits) {
  T value;
  value.bits = static_cast<uint16_t>(bits);
  return value;
}

template <typename T>
class Storage : public testing::Test {};
using Types = testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(Storage, Types);

TYPED_TEST(Storage, EveryValueSurvivesARoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto value = of_bits<TypeParam>(bits);
    TypeParam back;
    store(back, load(value));
    if (std::isnan(load(value)))
      EXPECT_TRUE(std::isnan(load(back)));
    else
      ASSERT_EQ(back.bits, value.bits);
  }
}

// Between two neighbours: below the middle down, above it up, in the middle to the even one.
TYPED_TEST(Storage, StoresRoundToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7fff; ++bits) {
    const float low = load(of_bits<TypeParam>(bits));
    const float high = load(of_bits<TypeParam>(bits + 1));
    if (std::isnan(high) || std::isinf(high)) break;
    const float middle = low + (high - low) / 2;  // exact
    for (float sign : {1.0f, -1.0f}) {
      const uint32_t sign_bit = sign < 0 ? 0x8000u : 0u;
      TypeParam stored;
      store(stored, sign * std::nextafter(middle, low));
      ASSERT_EQ(stored.bits, sign_bit | bits);
      store(stored, sign * middle);
      ASSERT_EQ(stored.bits, sign_bit | (bits + bits % 2));
      store(stored, sign * std::nextafter(middle, high));
      ASSERT_EQ(stored.bits, sign_bit | (bits + 1));
    }
  }
}

TYPED_TEST(Storage, LargeValuesBecomeInfinite) {
  TypeParam stored;
  store(stored, std::numeric_limits<float>::max());
  EXPECT_TRUE(std::isinf(load(stored)));
  store(stored, -std::numeric_limits<float>::infinity());
  EXPECT_EQ(load(stored), -std::numeric_limits<float>::infinity());
}

TEST(Dispatch, VisitsTheStorageType) {
  const auto bytes = [](DType dtype) {
    return visit_floating(dtype, [](auto tag) { return sizeof(typename decltype(tag)::type); });
  };
  EXPECT_EQ(bytes(DType::float64), 8u);
  EXPECT_EQ(bytes(DType::float32), 4u);
  EXPECT_EQ(bytes(DType::bfloat16), 2u);
  expect_invalid([&] { bytes(DType::int32); }, {"int32", "float64"});
}

}  // namespace
}  // namespace penstock::test
