// SPDX-License-Identifier: Apache-2.0
//
// Memory for tests: tensors that own it, start out as poison (0xFF: NaN in every float type) and
// have guard bytes on both sides, and element access in double through any strides. Values are
// rounded to the dtype on the way in, so that an oracle can be fed what is stored.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "penstock/tensor.h"
#include "tensor/dispatch.h"

namespace penstock::test {

inline constexpr int64_t kGuardBytes = 128;
inline constexpr uint8_t kGuard = 0xA5;
inline constexpr uint8_t kPoison = 0xFF;

// A 64-byte aligned block between guards.
class Block {
 public:
  explicit Block(int64_t bytes = 0, uint8_t fill = kPoison)
      : storage_(static_cast<size_t>(bytes + 2 * kGuardBytes + 64), kGuard), bytes_(bytes) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    begin_ = static_cast<size_t>(kGuardBytes) + (64 - (address + kGuardBytes) % 64) % 64;
    std::memset(data(), fill, static_cast<size_t>(bytes));
  }
  Block(Block&&) = default;
  Block& operator=(Block&&) = default;
  Block(const Block&) = delete;  // a copy would lose its alignment
  Block& operator=(const Block&) = delete;

  uint8_t* data() { return storage_.data() + begin_; }
  const uint8_t* data() const { return storage_.data() + begin_; }
  int64_t bytes() const { return bytes_; }
  std::vector<uint8_t> contents() const { return {data(), data() + bytes_}; }

  bool guards_intact() const {
    for (size_t i = 0; i < storage_.size(); ++i)
      if ((i < begin_ || i >= begin_ + static_cast<size_t>(bytes_)) && storage_[i] != kGuard)
        return false;
    return true;
  }

 private:
  std::vector<uint8_t> storage_;
  size_t begin_ = 0;
  int64_t bytes_ = 0;
};

using Index = std::initializer_list<int64_t>;

inline char* address_at(const TensorView& view, Index index) {
  int64_t offset = 0;
  int32_t axis = 0;
  for (int64_t i : index) offset += i * view.stride(axis++);
  return view.as<char>() + offset * size_of(view.dtype);
}

inline double get(const TensorView& view, Index index) {
  const void* at = address_at(view, index);
  if (view.dtype == DType::int32) return *static_cast<const int32_t*>(at);
  return visit_floating(view.dtype, [&](auto tag) {
    return static_cast<double>(load(*static_cast<const typename decltype(tag)::type*>(at)));
  });
}

inline void set(const TensorView& view, Index index, double value) {
  void* at = address_at(view, index);
  visit_floating(view.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    store(*static_cast<T*>(at), static_cast<Accumulator<T>>(value));
  });
}

// What `value` is after it was stored as `dtype`.
inline double rounded(double value, DType dtype) {
  std::array<uint8_t, 8> memory = {};
  const TensorView view = TensorView::contiguous(memory.data(), dtype, {1});
  set(view, {0}, value);
  return get(view, {0});
}

// A contiguous tensor that owns its memory.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, Index shape) {
    view_ = TensorView::contiguous(nullptr, dtype, shape);
    block_ = Block(view_.bytes());
    view_.data = block_.data();
  }

  const TensorView& view() const { return view_; }
  const Block& block() const { return block_; }
  void fill_zero() { std::memset(block_.data(), 0, static_cast<size_t>(block_.bytes())); }

 private:
  Block block_;
  TensorView view_;
};

template <typename T>
Tensor tensor_of(const std::vector<T>& values, DType dtype) {
  Tensor tensor(dtype, {static_cast<int64_t>(values.size())});
  if (!values.empty()) std::memcpy(tensor.view().data, values.data(), values.size() * sizeof(T));
  return tensor;
}

inline Tensor int32_tensor(const std::vector<int32_t>& values) {
  return tensor_of(values, DType::int32);
}

template <typename T>
std::vector<T> values_of(const TensorView& view) {
  return std::vector<T>(view.as<T>(), view.as<T>() + view.numel());
}

// The same numbers on every platform, unlike the distributions of <random>.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0xD1B54A32D192ED03u) {}

  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545F4914F6CDD1Du;
  }
  int64_t below(int64_t bound) {
    return static_cast<int64_t>((next() >> 33) % static_cast<uint64_t>(bound));
  }
  // Uniform with mean 0 and variance 1.
  double value() { return (static_cast<double>(next() >> 11) * 0x1p-52 - 1.0) * 1.7320508; }

 private:
  uint64_t state_;
};

}  // namespace penstock::test
