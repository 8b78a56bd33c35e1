// SPDX-License-Identifier: Apache-2.0
//
// Gradients of weights and biases: sums over an expert's rows, in row order, written in the
// weights' dtype or in float32. A frozen expert is not touched; one without rows gets exact zeros
// when overwriting, and keeps every bit of what it had when accumulating.
#include <cstdint>
#include <span>

#include "backends/cpu/common/elements.h"
#include "backends/cpu/common/rows.h"
#include "backends/cpu/reference/products.h"
#include "backends/cpu/reference/reference_ops.h"

namespace penstock::cpu::reference {
namespace {

// Whether an expert's gradient is written at all.
bool writes_gradient(const RowRange& rows, GradMode mode, const TensorView& trainable,
                     int64_t expert) {
  if (!is_trainable(trainable, expert)) return false;
  return mode == GradMode::overwrite || !rows.empty();
}

// out_j (+)= sums_j, rounded once.
template <typename Acc, typename Out>
void write_gradient(GradMode mode, std::span<const Acc> sums, Out* out, int64_t stride) {
  for (int64_t j = 0; j < static_cast<int64_t>(sums.size()); ++j) {
    Out& element = out[j * stride];
    const Acc sum = sums[static_cast<size_t>(j)];
    if (mode == GradMode::overwrite) {
      store(element, sum);
    } else {
      store(element, static_cast<Acc>(load(element)) + sum);
    }
  }
}

int64_t operand_row(const RowGroups& rows, RowAccess access, int64_t row) {
  return access == RowAccess::gathered ? token_of(rows, row) : row;
}

// Row `left_column` - half * length of one expert's gradient: the sum over its rows of one element
// of left times the row of right.
template <typename T, typename Out>
void weight_gradient_row(const WeightGradientArgs& args, int64_t expert, int64_t left_column) {
  using Acc = Accumulator<T>;
  const RowRange rows = rows_of(args.rows, expert);
  const int64_t length = args.left.size(1) / args.halves;
  const GroupedMatrix& matrix = args.out[static_cast<size_t>(left_column / length)];
  if (!matrix.present()) return;
  Out* out = static_cast<Out*>(matrix.data) + expert * matrix.expert_stride +
             (left_column % length) * matrix.row_stride;
  for_each_chunk<Acc>(args.right.size(1), [&](int64_t first, std::span<Acc> sums) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t left_row = operand_row(args.rows, args.left_access, row);
      const int64_t right_row = operand_row(args.rows, args.right_access, row);
      const Acc factor = load(row_of<const T>(args.left, left_row)[left_column]);
      const T* right = row_of<const T>(args.right, right_row) + first;
      for (size_t j = 0; j < sums.size(); ++j) sums[j] += factor * load(right[j]);
    }
    write_gradient<Acc, Out>(args.mode, sums, out + first * matrix.col_stride, matrix.col_stride);
  });
}

template <typename T, typename Out>
void bias_gradient_half(const BiasGradientArgs& args, int64_t expert, int64_t half) {
  using Acc = Accumulator<T>;
  const RowRange rows = rows_of(args.rows, expert);
  const int64_t length = args.values.size(1) / args.halves;
  const GroupedVector& vector = args.out[static_cast<size_t>(half)];
  if (!vector.present()) return;
  Out* out = static_cast<Out*>(vector.data) + expert * vector.expert_stride;
  for_each_chunk<Acc>(length, [&](int64_t first, std::span<Acc> sums) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const Acc score = score_of<Acc>(args.rows, args.scores, row);
      const int64_t value_row = operand_row(args.rows, args.access, row);
      const T* values = row_of<const T>(args.values, value_row) + half * length + first;
      for (size_t j = 0; j < sums.size(); ++j) sums[j] += score * load(values[j]);
    }
    write_gradient<Acc, Out>(args.mode, sums, out + first * vector.stride, vector.stride);
  });
}

// The dtype of the first half that is wanted: both have the same.
template <typename Half>
DType gradient_dtype(const std::array<Half, 2>& out) {
  return out[0].present() ? out[0].dtype : out[1].dtype;
}

}  // namespace

void weight_gradient(const WeightGradientArgs& args, const Context&) {
  visit_floating(args.left.dtype, [&]<typename T>(StorageTag<T>) {
    visit_gradient<T>(
        args.left.dtype, gradient_dtype(args.out), [&]<typename Out>(StorageTag<Out>) {
          for (int64_t expert = 0; expert < args.rows.num_experts(); ++expert) {
            if (!writes_gradient(rows_of(args.rows, expert), args.mode, args.trainable, expert))
              continue;
            for (int64_t column = 0; column < args.left.size(1); ++column)
              weight_gradient_row<T, Out>(args, expert, column);
          }
        });
  });
}

void bias_gradient(const BiasGradientArgs& args, const Context&) {
  visit_floating(args.values.dtype, [&]<typename T>(StorageTag<T>) {
    visit_gradient<T>(
        args.values.dtype, gradient_dtype(args.out), [&]<typename Out>(StorageTag<Out>) {
          for (int64_t expert = 0; expert < args.rows.num_experts(); ++expert) {
            if (!writes_gradient(rows_of(args.rows, expert), args.mode, args.trainable, expert))
              continue;
            for (int64_t half = 0; half < args.halves; ++half)
              bias_gradient_half<T, Out>(args, expert, half);
          }
        });
  });
}

}  // namespace penstock::cpu::reference
