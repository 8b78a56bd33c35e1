// SPDX-License-Identifier: Apache-2.0
//
// A view of memory that the caller owns: pointer, dtype, device, shape, strides in elements.
// A default-constructed view is "absent" (an optional argument that was not given). Views are
// cheap values; the library never keeps one past the call it was passed to.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>

#include "penstock/device.h"
#include "penstock/dtype.h"

namespace penstock {

inline constexpr int kMaxRank = 4;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  Device device = {};
  int32_t rank = -1;  // -1: absent
  std::array<int64_t, kMaxRank> shape = {};
  std::array<int64_t, kMaxRank> strides = {};

  // A row-major view without gaps.
  static TensorView contiguous(void* data, DType dtype, std::initializer_list<int64_t> shape,
                               Device device = {}) {
    TensorView view;
    view.data = data;
    view.dtype = dtype;
    view.device = device;
    view.rank = 0;
    for (int64_t extent : shape) view.shape[static_cast<size_t>(view.rank++)] = extent;
    int64_t stride = 1;
    for (int32_t axis = view.rank - 1; axis >= 0; --axis) {
      view.strides[static_cast<size_t>(axis)] = stride;
      stride *= view.shape[static_cast<size_t>(axis)];
    }
    return view;
  }

  bool present() const { return rank >= 0; }

  int64_t size(int32_t axis) const { return shape[static_cast<size_t>(axis)]; }
  int64_t stride(int32_t axis) const { return strides[static_cast<size_t>(axis)]; }

  int64_t numel() const {
    int64_t count = present() ? 1 : 0;
    for (int32_t axis = 0; axis < rank; ++axis) count *= size(axis);
    return count;
  }

  int64_t bytes() const { return numel() * size_of(dtype); }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int32_t axis = rank - 1; axis >= 0; --axis) {
      if (size(axis) != 1 && stride(axis) != expected) return false;
      expected *= size(axis);
    }
    return true;
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Scratch memory for one call: at least the bytes the query returns, 64-byte aligned. Contents
// are free before and undefined after; nothing past `bytes` is touched.
struct Workspace {
  void* data = nullptr;
  int64_t bytes = 0;
};

}  // namespace penstock
