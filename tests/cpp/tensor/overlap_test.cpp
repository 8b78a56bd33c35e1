// SPDX-License-Identifier: Apache-2.0
//
// Shared memory: random strided views against a map of every byte, and the error of AliasCheck.
#include "tensor/overlap.h"

#include <gtest/gtest.h>

#include <vector>

#include "support/compare.h"
#include "support/memory.h"

namespace penstock::test {
namespace {

// Which bytes of the memory belong to elements of the view, and how often.
std::vector<int> bytes_of(const TensorView& view, const uint8_t* memory, size_t size) {
  std::vector<int> count(size, 0);
  for (int64_t i = 0; i < view.numel(); ++i) {
    int64_t rest = i;
    int64_t offset = 0;
    for (int32_t axis = view.rank - 1; axis >= 0; --axis) {
      offset += rest % view.size(axis) * view.stride(axis);
      rest /= view.size(axis);
    }
    const auto first = static_cast<size_t>(view.as<uint8_t>() - memory) +
                       static_cast<size_t>(offset * size_of(view.dtype));
    for (size_t b = 0; b < static_cast<size_t>(size_of(view.dtype)); ++b) ++count[first + b];
  }
  return count;
}

TensorView random_view(Random& random, uint8_t* memory, int64_t span) {
  static constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float64};
  TensorView view;
  view.dtype = kDTypes[random.below(3)];
  view.rank = static_cast<int32_t>(1 + random.below(3));
  for (size_t axis = 0; axis < static_cast<size_t>(view.rank); ++axis) {
    view.shape[axis] = 1 + random.below(4);
    view.strides[axis] = random.below(axis == 0 ? 12 : 5);
  }
  view.data = memory + random.below(span) * size_of(view.dtype);
  return view;
}

TEST(Overlap, AgreesWithAMapOfBytes) {
  constexpr size_t kSize = 2048;
  std::vector<uint8_t> memory(kSize);
  Random random(3);
  int shared = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    const TensorView a = random_view(random, memory.data(), 30);
    const TensorView b = random_view(random, memory.data(), 60);
    const std::vector<int> in_a = bytes_of(a, memory.data(), kSize);
    const std::vector<int> in_b = bytes_of(b, memory.data(), kSize);
    bool expected = false;
    for (size_t i = 0; i < kSize; ++i) expected = expected || (in_a[i] > 0 && in_b[i] > 0);
    ASSERT_EQ(share_memory(a, b), expected) << "trial " << trial;
    ASSERT_EQ(share_memory(b, a), expected) << "trial " << trial;
    shared += expected ? 1 : 0;
  }
  EXPECT_GT(shared, 2000);
  EXPECT_LT(shared, 18000);
}

TEST(Overlap, NeverCallsARepeatedElementDistinct) {
  constexpr size_t kSize = 2048;
  std::vector<uint8_t> memory(kSize);
  Random random(4);
  int distinct = 0;
  for (int trial = 0; trial < 5000; ++trial) {
    const TensorView view = random_view(random, memory.data(), 10);
    if (overlaps_itself(view)) continue;
    ++distinct;
    for (int count : bytes_of(view, memory.data(), kSize)) ASSERT_LE(count, 1);
  }
  EXPECT_GT(distinct, 500);
}

TEST(Overlap, InterleavedSlicesOfOneTensorAreDistinct) {
  std::vector<float> memory(4 * 6 * 5);
  TensorView whole = TensorView::contiguous(memory.data(), DType::float32, {4, 6, 5});
  TensorView even = whole;
  even.shape[1] = 3;
  even.strides[1] = 10;
  TensorView odd = even;
  odd.data = memory.data() + 5;
  EXPECT_FALSE(share_memory(even, odd));
  EXPECT_TRUE(share_memory(even, whole));
  EXPECT_FALSE(overlaps_itself(even));
}

TEST(Overlap, OtherDevicesShareNothing) {
  std::vector<float> memory(4);
  const TensorView host = TensorView::contiguous(memory.data(), DType::float32, {4});
  TensorView device = host;
  device.device = {DeviceType::cuda, 0};
  EXPECT_FALSE(share_memory(host, device));
}

TEST(AliasCheck, NamesTheTwoArguments) {
  std::vector<float> memory(16);
  const TensorView x = TensorView::contiguous(memory.data(), DType::float32, {8});
  const TensorView output = TensorView::contiguous(memory.data() + 7, DType::float32, {8});
  AliasCheck inputs;
  inputs.input(x, "x");
  inputs.input(x, "d_output");
  EXPECT_NO_THROW(inputs.run());
  AliasCheck check;
  check.input(x, "x");
  check.output(output, "output");
  expect_invalid([&] { check.run(); }, {"output: got memory that overlaps x"});
  AliasCheck workspace;
  workspace.input(x, "x");
  workspace.workspace({memory.data() + 8, 32}, 32);
  EXPECT_NO_THROW(workspace.run());
  workspace.workspace({memory.data() + 7, 32}, 4);
  expect_invalid([&] { workspace.run(); }, {"workspace", "x"});
}

}  // namespace
}  // namespace penstock::test
