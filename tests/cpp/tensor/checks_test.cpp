// SPDX-License-Identifier: Apache-2.0
//
// Each check: what it accepts, and what its error says.
#include "tensor/checks.h"

#include <gtest/gtest.h>

#include <array>

#include "support/compare.h"

namespace penstock::test {
namespace {

alignas(64) std::array<float, 64> memory;

TensorView floats(std::initializer_list<int64_t> shape) {
  return TensorView::contiguous(memory.data(), DType::float32, shape);
}

TensorSpec spec(Layout layout = Layout::contiguous) {
  return {"weights.w2", "(T, d)", {2, 3}, {DType::float32, "x"}, {Device{}, "x"}, layout};
}

TEST(Checks, AcceptAMatchingTensor) { EXPECT_NO_THROW(check_tensor(floats({2, 3}), spec())); }

TEST(Checks, NameAnAbsentTensor) {
  expect_invalid([] { check_tensor({}, spec()); }, {"weights.w2", "absent"});
  expect_invalid(
      [] {
        check_absent(floats({2, 3}), "h", "save is input");
      },
      {"h: got float32 (2, 3) with strides (3, 1) on cpu", "save is input"});
}

TEST(Checks, NameBothShapes) {
  expect_invalid([] { check_tensor(floats({2, 4}), spec()); }, {"(2, 4)", "(2, 3) = (T, d)"});
  expect_invalid([] { check_tensor(floats({6}), spec()); }, {"(6,)", "(2, 3)"});
}

TEST(Checks, NameBothDTypesAndTheirOwner) {
  TensorView view = floats({2, 3});
  view.dtype = DType::bfloat16;
  expect_invalid([&] { check_tensor(view, spec()); },
                 {"weights.w2: got bfloat16, expected float32 (from x)", "Convert"});
}

TEST(Checks, NameBothDevices) {
  TensorView view = floats({2, 3});
  view.device = {DeviceType::cuda, 1};
  expect_invalid([&] { check_tensor(view, spec()); }, {"cuda:1", "cpu (the device of x)", "Move"});
}

TEST(Checks, RefuseNullAndMisalignedData) {
  TensorView view = floats({2, 3});
  view.data = nullptr;
  expect_invalid([&] { check_tensor(view, spec()); }, {"null pointer"});
  view.data = reinterpret_cast<char*>(memory.data()) + 2;
  expect_invalid([&] { check_tensor(view, spec()); }, {"2 bytes past alignment", "4 bytes"});
  view = floats({0, 3});
  view.data = nullptr;
  TensorSpec empty = spec();
  empty.extents = {0, 3};
  EXPECT_NO_THROW(check_tensor(view, empty));
}

TEST(Checks, LayoutsOfRows) {
  TensorView padded = floats({2, 3});
  padded.strides = {8, 1};
  EXPECT_NO_THROW(check_layout(padded, "x", Layout::readable_rows));
  EXPECT_NO_THROW(check_layout(padded, "x", Layout::distinct_rows));
  expect_invalid([&] { check_layout(padded, "output", Layout::contiguous); },
                 {"output", "strides (8, 1)", "contiguous"});
  TensorView expanded = floats({2, 3});
  expanded.strides = {0, 1};
  EXPECT_NO_THROW(check_layout(expanded, "x", Layout::readable_rows));
  expect_invalid([&] { check_layout(expanded, "b1", Layout::distinct_rows); }, {"strides (0, 1)"});
  TensorView strided = floats({2, 3});
  strided.strides = {6, 2};
  expect_invalid([&] { check_layout(strided, "x", Layout::readable_rows); }, {"stride 1"});
  TensorView reversed = floats({2, 3});
  reversed.strides = {-3, 1};
  expect_invalid([&] { check_layout(reversed, "x", Layout::readable_rows); }, {"negative"});
}

TEST(Checks, LayoutsOfMatrices) {
  TensorView weights = floats({2, 3, 4});
  EXPECT_NO_THROW(check_layout(weights, "w1", Layout::matrices));
  weights.strides = {12, 1, 3};  // transposed
  EXPECT_NO_THROW(check_layout(weights, "w1", Layout::matrices));
  weights.strides = {100, 8, 1};  // slices of a bigger tensor
  EXPECT_NO_THROW(check_layout(weights, "w1", Layout::matrices));
  weights.strides = {4, 8, 1};  // experts inside rows
  EXPECT_NO_THROW(check_layout(weights, "w1", Layout::matrices));
  for (const std::array<int64_t, kMaxRank> strides :
       {std::array<int64_t, kMaxRank>{24, 8, 2}, {11, 4, 1}, {0, 4, 1}, {12, 0, 1}, {12, 3, 1}}) {
    weights.strides = strides;
    expect_invalid([&] { check_layout(weights, "w1", Layout::matrices); }, {"w1", "expert stride"});
  }
  weights.shape[0] = 1;  // the stride of a single expert does not matter
  weights.strides = {0, 4, 1};
  EXPECT_NO_THROW(check_layout(weights, "w1", Layout::matrices));
}

TEST(Checks, CountsFitInt32) {
  EXPECT_NO_THROW(check_count((int64_t{1} << 31) - 1, "slots", ""));
  expect_invalid([] { check_count(int64_t{1} << 31, "slots", "Split."); },
                 {"slots", "2147483648", "2147483647", "Split."});
  expect_invalid([] { check_count(-1, "num_tokens", "Split."); }, {"num_tokens", "-1"});
}

TEST(Checks, WorkspacesNameTheBytes) {
  const auto check = [](void* data, int64_t bytes) {
    check_workspace({data, bytes}, 100, "forward_workspace_bytes");
  };
  EXPECT_NO_THROW(check(memory.data(), 100));
  EXPECT_NO_THROW(check_workspace({}, 0, "forward_workspace_bytes"));
  expect_invalid([&] { check(memory.data(), 99); }, {"99 bytes", "100", "forward_workspace_bytes"});
  expect_invalid([&] { check(nullptr, 100); }, {"null", "100"});
  expect_invalid([&] { check(memory.data() + 1, 100); }, {"4 bytes past alignment", "64-byte"});
}

TEST(Checks, ProductsThatDoNotFitAreRefused) {
  EXPECT_EQ(checked_product({3, 5, 7}, "h"), 105);
  expect_invalid([] { checked_product({int64_t{1} << 32, int64_t{1} << 32}, "h"); }, {"h"});
}

}  // namespace
}  // namespace penstock::test
