// SPDX-License-Identifier: Apache-2.0
//
// The one product of the reference backend: a row times a strided matrix, added to a row of sums.
// Both loop orders add the terms of an output in the same order, so the strides of a matrix decide
// which of its axes is walked in the inner loop and never the bits of the result. Outputs are
// produced in chunks small enough for the stack; a chunk's bounds do not reach the result either.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>

#include "backend/ops.h"
#include "backends/cpu/common/elements.h"
#include "tensor/dispatch.h"

namespace penstock::cpu::reference {

inline constexpr int64_t kChunk = 256;

template <typename Acc>
using ChunkSums = std::array<Acc, kChunk>;

// M(k, j) = data[k * reduced_stride + j * out_stride].
template <typename T>
struct MatrixSlice {
  const T* data;
  int64_t reduced_stride;
  int64_t out_stride;

  MatrixSlice from_output(int64_t first) const {
    return {data + first * out_stride, reduced_stride, out_stride};
  }
};

// An expert's matrix, summed over its columns (x times w transposed) or over its rows (x times w).
template <typename T>
MatrixSlice<T> reduce_columns(const GroupedMatrix& w, int64_t expert) {
  return {static_cast<const T*>(w.data) + expert * w.expert_stride, w.col_stride, w.row_stride};
}

template <typename T>
MatrixSlice<T> reduce_rows(const GroupedMatrix& w, int64_t expert) {
  return {static_cast<const T*>(w.data) + expert * w.expert_stride, w.row_stride, w.col_stride};
}

// sums_j += sum_k left_k M(k, j), for rising k.
template <typename Acc, typename Left, typename T>
void add_product(std::span<const Left> left, MatrixSlice<T> matrix, std::span<Acc> sums) {
  const int64_t reduced = static_cast<int64_t>(left.size());
  const int64_t length = static_cast<int64_t>(sums.size());
  if (matrix.reduced_stride == 1) {
    for (int64_t j = 0; j < length; ++j) {
      const T* column = matrix.data + j * matrix.out_stride;
      Acc sum = sums[static_cast<size_t>(j)];
      for (int64_t k = 0; k < reduced; ++k)
        sum += static_cast<Acc>(load(left[static_cast<size_t>(k)])) * load(column[k]);
      sums[static_cast<size_t>(j)] = sum;
    }
    return;
  }
  for (int64_t k = 0; k < reduced; ++k) {
    const Acc factor = static_cast<Acc>(load(left[static_cast<size_t>(k)]));
    const T* row = matrix.data + k * matrix.reduced_stride;
    for (int64_t j = 0; j < length; ++j)
      sums[static_cast<size_t>(j)] += factor * load(row[j * matrix.out_stride]);
  }
}

struct LowRankPlace {
  int64_t expert;
  int64_t row;
  int64_t half;
};

// Adds the term's outputs first .. first + sums.size() of one row, if there is a term.
template <typename Acc, typename T>
void add_low_rank(const LowRankTerm& term, const LowRankPlace& place, int64_t first,
                  std::span<Acc> sums) {
  if (!term.present()) return;
  const std::span<const T> row(row_of<const T>(term.rows, place.row),
                               static_cast<size_t>(term.rows.size(1)));
  const MatrixSlice<T> matrix =
      reduce_columns<T>(term.matrix[static_cast<size_t>(place.half)], place.expert);
  add_product<Acc, T, T>(row, matrix.from_output(first), sums);
}

// Calls function(first, sums) for [0, length) in chunks, with the sums of each chunk set to zero.
template <typename Acc, typename Function>
void for_each_chunk(int64_t length, Function&& function) {
  ChunkSums<Acc> buffer;
  for (int64_t first = 0; first < length; first += kChunk) {
    const std::span<Acc> sums(buffer.data(), static_cast<size_t>(std::min(kChunk, length - first)));
    std::fill(sums.begin(), sums.end(), Acc(0));
    function(first, sums);
  }
}

}  // namespace penstock::cpu::reference
