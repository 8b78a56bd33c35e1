// SPDX-License-Identifier: Apache-2.0
//
// What the reference backend's tests share: arrays that own their storage and stand behind views,
// repeatable random numbers, weights in every layout, a random routing with holes, and comparison
// under the stage tolerances of tests/cases. Expected values are always stated in double or long
// double by the test itself, from the inputs as stored.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "backend/ops.h"
#include "backends/cpu/reference/reference_backend.h"
#include "penstock_cases.h"
#include "tensor/dispatch.h"

namespace penstock::cpu::reference_test {

template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return DType::float64;
  if constexpr (std::is_same_v<T, float>) return DType::float32;
  if constexpr (std::is_same_v<T, float16>) return DType::float16;
  if constexpr (std::is_same_v<T, bfloat16>) return DType::bfloat16;
  if constexpr (std::is_same_v<T, int32_t>) return DType::int32;
  if constexpr (std::is_same_v<T, int64_t>) return DType::int64;
  if constexpr (std::is_same_v<T, uint8_t>) return DType::uint8;
}

using StorageTypes = ::testing::Types<double, float, float16, bfloat16>;
using LogitTypes = ::testing::Types<double, float>;

inline const Backend& backend() { return reference_backend(); }
inline const Context kContext = {};

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  int64_t below(int64_t bound) {
    return static_cast<int64_t>(bits() % static_cast<uint64_t>(bound));
  }

  // In (-scale, scale), mean 0.
  double symmetric(double scale) {
    return scale * (2.0 * (static_cast<double>(bits() >> 11) * 0x1p-53) - 1.0);
  }

 private:
  uint64_t state_;
};

template <typename T>
double get(const T& value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<double>(value);
  } else {
    return static_cast<double>(load(value));
  }
}

template <typename T>
void put(T& to, double value) {
  if constexpr (std::is_integral_v<T>) {
    to = static_cast<T>(value);
  } else {
    store(to, static_cast<Accumulator<T>>(value));
  }
}

// A (rows, cols) array, or a vector of `cols` elements when rows is 1 and view1() is used. Rows are
// `gap` elements further apart than they need to be; gaps and fresh arrays hold NaN.
template <typename T>
class Array {
 public:
  Array(int64_t rows, int64_t cols, int64_t gap = 0)
      : rows_(rows), cols_(cols), stride_(cols + gap) {
    T poison{};
    put(poison, std::is_integral_v<T> ? -77.0 : std::numeric_limits<double>::quiet_NaN());
    data_.assign(static_cast<size_t>(rows * stride_ + 1), poison);
  }

  static Array random(int64_t rows, int64_t cols, double scale, uint64_t seed, int64_t gap = 0) {
    Array array(rows, cols, gap);
    Random generator(seed);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) put(array.at(i, j), generator.symmetric(scale));
    return array;
  }

  // Whole numbers of -limit .. limit.
  static Array integers(int64_t rows, int64_t cols, int64_t limit, uint64_t seed) {
    Array array(rows, cols);
    Random generator(seed);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        put(array.at(i, j), static_cast<double>(generator.below(2 * limit + 1) - limit));
    return array;
  }

  T& at(int64_t i, int64_t j) { return data_[static_cast<size_t>(i * stride_ + j)]; }
  const T& at(int64_t i, int64_t j) const { return data_[static_cast<size_t>(i * stride_ + j)]; }
  double operator()(int64_t i, int64_t j) const { return get(at(i, j)); }
  double operator()(int64_t j) const { return get(at(0, j)); }

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }

  TensorView view() {
    TensorView view = TensorView::contiguous(data_.data(), dtype_of<T>(), {rows_, cols_});
    view.strides[0] = stride_;
    return view;
  }
  TensorView view1() { return TensorView::contiguous(data_.data(), dtype_of<T>(), {cols_}); }

  // Bit for bit, gaps and the element past the end included.
  bool same_bits(const Array& other) const {
    return data_.size() == other.data_.size() &&
           std::memcmp(data_.data(), other.data_.data(), data_.size() * sizeof(T)) == 0;
  }

  std::vector<T>& data() { return data_; }
  const T* data_pointer() const { return data_.data(); }

 private:
  int64_t rows_;
  int64_t cols_;
  int64_t stride_;
  std::vector<T> data_;
};

// How the test's W1 and b1 lie in memory.
enum class Layout { concatenated, interleaved, separate };
enum class Order { output_major, input_major };

template <typename T>
double at(const GroupedMatrix& w, int64_t e, int64_t i, int64_t j) {
  return get(
      static_cast<const T*>(w.data)[e * w.expert_stride + i * w.row_stride + j * w.col_stride]);
}

template <typename T>
double at(const GroupedVector& b, int64_t e, int64_t i) {
  return get(static_cast<const T*>(b.data)[e * b.expert_stride + i * b.stride]);
}

// `halves` matrices of (rows, cols) per expert in one buffer, and where each of them is.
template <typename T>
struct Grouped {
  Grouped(int64_t num_experts, int64_t num_halves, int64_t rows, int64_t cols, Layout layout,
          Order order)
      : storage(1, num_experts * (num_halves * rows * cols + kExpertGap)) {
    const int64_t size = rows * cols;
    for (int64_t half = 0; half < num_halves; ++half) {
      GroupedMatrix& w = matrix[static_cast<size_t>(half)];
      w.dtype = dtype_of<T>();
      w.expert_stride = num_halves * size + kExpertGap;
      const bool by_rows = order == Order::output_major;
      int64_t offset = half * size;
      w.row_stride = by_rows ? cols : 1;
      w.col_stride = by_rows ? 1 : rows;
      if (layout == Layout::interleaved) {
        w.row_stride = num_halves * (by_rows ? cols : 1);
        w.col_stride = by_rows ? 1 : num_halves * rows;
        offset = half * (by_rows ? cols : 1);
      } else if (layout == Layout::concatenated && !by_rows) {
        w.col_stride = num_halves * rows;
        offset = half * rows;
      }
      w.data = storage.data().data() + offset;
    }
  }

  // A vector (rows) per expert and half, as matrices of one column.
  std::array<GroupedVector, 2> vectors() const {
    std::array<GroupedVector, 2> result;
    for (size_t half = 0; half < 2; ++half) {
      const GroupedMatrix& w = matrix[half];
      result[half] = {w.data, w.dtype, w.expert_stride, w.row_stride};
    }
    return result;
  }

  void randomize(double scale, uint64_t seed) {
    Random generator(seed);
    for (T& value : storage.data()) put(value, generator.symmetric(scale));
  }

  void randomize_integers(int64_t limit, uint64_t seed) {
    Random generator(seed);
    for (T& value : storage.data())
      put(value, static_cast<double>(generator.below(2 * limit + 1) - limit));
  }

  static constexpr int64_t kExpertGap = 3;  // experts may be slices of a bigger tensor
  Array<T> storage;
  std::array<GroupedMatrix, 2> matrix;
};

// Tokens' experts with skipped slots, an expert that nobody chose (the last but one, given three)
// and the plan that build_plan makes of them.
struct RoutedRows {
  RoutedRows(int64_t tokens, int32_t chosen, int64_t num_experts, uint64_t seed)
      : num_tokens(tokens),
        top_k(chosen),
        ids(1, tokens * chosen),
        counts(1, num_experts),
        offsets(1, num_experts + 1),
        row_to_token(1, tokens * chosen),
        row_to_slot(1, tokens * chosen),
        slot_to_row(1, tokens * chosen) {
    Random generator(seed);
    for (int64_t slot = 0; slot < tokens * chosen; ++slot) {
      int64_t id = generator.below(num_experts + 1) - 1;
      if (num_experts >= 3 && id == num_experts - 2) id = num_experts - 1;
      ids.at(0, slot) = static_cast<int32_t>(id);
    }
    const Routing routing = {.scores = {},
                             .ids = ids.view1(),
                             .token_offsets = {},
                             .num_tokens = tokens,
                             .top_k = top_k};
    backend().build_plan({.routing = routing, .plan = plan(), .scratch = {}}, kContext);
  }

  RoutingPlan plan() {
    RoutingPlan result;
    result.expert_counts = counts.view1();
    result.expert_offsets = offsets.view1();
    result.row_to_token = row_to_token.view1();
    result.row_to_slot = row_to_slot.view1();
    result.slot_to_row = slot_to_row.view1();
    result.top_k = top_k;
    return result;
  }

  RowGroups groups() {
    return {counts.view1(), offsets.view1(), row_to_token.view1(), row_to_slot.view1(),
            row_to_token.cols()};
  }

  int64_t num_experts() const { return counts.cols(); }
  int64_t capacity() const { return row_to_token.cols(); }
  int64_t num_rows() const { return offsets.at(0, num_experts()); }
  int64_t num_slots() const { return ids.cols(); }
  int64_t token(int64_t row) const { return row_to_token.at(0, row); }
  int64_t slot(int64_t row) const { return row_to_slot.at(0, row); }
  int64_t expert(int64_t row) const { return ids.at(0, slot(row)); }

  int64_t num_tokens;
  int32_t top_k;
  Array<int32_t> ids, counts, offsets, row_to_token, row_to_slot, slot_to_row;
};

// Adds up |actual - expected| and |expected| squared.
struct Distance {
  double error = 0.0;
  double norm = 0.0;

  void add(double actual, double expected) {
    error += (actual - expected) * (actual - expected);
    norm += expected * expected;
  }
  bool within(double tolerance) const { return error <= tolerance * tolerance * norm; }
};

// Relative L2 of the whole, of every row, and of every block of 16 columns.
template <typename T>
void expect_stage(const Array<T>& actual, const std::vector<std::vector<double>>& expected,
                  double tolerance) {
  const double loose = tolerance * cases::tolerance::block_factor;
  Distance whole;
  std::vector<Distance> blocks(static_cast<size_t>((actual.cols() + 15) / 16));
  for (size_t i = 0; i < expected.size(); ++i) {
    Distance row;
    for (size_t j = 0; j < expected[i].size(); ++j) {
      const double value = actual(static_cast<int64_t>(i), static_cast<int64_t>(j));
      for (Distance* distance : {&whole, &row, &blocks[j / 16]})
        distance->add(value, expected[i][j]);
    }
    EXPECT_TRUE(row.within(loose)) << "row " << i << ": " << std::sqrt(row.error / row.norm);
  }
  for (size_t b = 0; b < blocks.size(); ++b)
    EXPECT_TRUE(blocks[b].within(loose))
        << "columns from " << 16 * b << ": " << std::sqrt(blocks[b].error / blocks[b].norm);
  EXPECT_TRUE(whole.within(tolerance)) << std::sqrt(whole.error / whole.norm);
}

template <typename T>
double stage_tolerance() {
  return cases::tolerance::stage(dtype_of<T>());
}

inline double score_tolerance(DType dtype) { return cases::tolerance::dscores(dtype); }

inline std::vector<std::vector<double>> zeros(int64_t rows, int64_t cols) {
  return std::vector<std::vector<double>>(static_cast<size_t>(rows),
                                          std::vector<double>(static_cast<size_t>(cols), 0.0));
}

}  // namespace penstock::cpu::reference_test
