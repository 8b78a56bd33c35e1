// SPDX-License-Identifier: Apache-2.0
//
// Checks of arguments. Each throws Error(invalid_argument) with the argument's public name, the
// value met, the values accepted and a remedy; none reads the tensor's elements. Called by routing
// and experts before anything is launched, never by a backend. Views without elements may have any
// strides and a null pointer.
#pragma once

#include <array>
#include <initializer_list>
#include <string>
#include <string_view>

#include "penstock/error.h"
#include "penstock/tensor.h"

namespace penstock {

// Which strides an argument may have.
enum class Layout : uint8_t {
  contiguous,     // row-major without gaps
  readable_rows,  // last stride 1, others >= 0: rows may be padded, overlap or repeat (stride 0)
  distinct_rows,  // last stride 1, no two elements share memory
  matrices,       // stride 1 in the last axis or the one before, no two elements share memory
};

struct Extents {
  std::array<int64_t, kMaxRank> sizes = {};
  int32_t rank = 0;

  Extents(std::initializer_list<int64_t> list) {
    for (int64_t extent : list) sizes[static_cast<size_t>(rank++)] = extent;
  }
};

// A property that an argument must share with another one, or that is fixed (`owner` empty).
struct DTypeRule {
  DType dtype;
  std::string_view owner = {};  // "x": the dtype of x
};
struct DeviceRule {
  Device device;
  std::string_view owner;
};

struct TensorSpec {
  std::string_view name;  // the argument's public name
  std::string_view axes;  // the names of its axes, "(T, d)"
  Extents extents;
  DTypeRule dtype;
  DeviceRule device;
  Layout layout = Layout::contiguous;
};

// "(4, 8)" and "float32 (4, 8) with strides (8, 1) on cpu".
std::string shape_text(const TensorView& view);
std::string describe(const TensorView& view);

[[noreturn]] void fail(Error::Details details);

void check_present(const TensorView& view, std::string_view name);
void check_absent(const TensorView& view, std::string_view name, std::string_view because);
void check_rank(const TensorView& view, std::string_view name, std::string_view axes, int32_t rank);
void check_shape(const TensorView& view, const TensorSpec& spec);
void check_dtype(const TensorView& view, std::string_view name, const DTypeRule& rule);
void check_device(const TensorView& view, std::string_view name, const DeviceRule& rule);
void check_layout(const TensorView& view, std::string_view name, Layout layout);
// Non-null and aligned to the element size.
void check_data(const TensorView& view, std::string_view name);
// Presence and all of the above.
void check_tensor(const TensorView& view, const TensorSpec& spec);

// 0 <= value <= 2^31 - 1: what int32 rows, slots, tokens and experts can count.
void check_count(int64_t value, std::string_view name, std::string_view remedy);

// Enough bytes, 64-byte aligned. Nothing is needed where `needed` is 0.
inline constexpr int64_t kWorkspaceAlignment = 64;
void check_workspace(const Workspace& workspace, int64_t needed, std::string_view query);

// a * b * c, or Error if that does not fit int64: bytes of tensors that are yet to be made.
int64_t checked_product(std::initializer_list<int64_t> factors, std::string_view name);

}  // namespace penstock
