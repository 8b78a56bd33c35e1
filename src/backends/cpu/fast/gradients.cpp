// SPDX-License-Identifier: Apache-2.0
//
// What reduces over an expert's rows: gradients of weights (products whose k is the rows) and of
// biases (column sums, in blocks of rows like the products' blocks of k).
#include <algorithm>
#include <array>

#include "backends/cpu/common/rows.h"
#include "backends/cpu/fast/operands.h"
#include "backends/cpu/fast/operations.h"
#include "backends/cpu/fast/thread_team.h"

namespace penstock::cpu::fast {
namespace {

// The product runs left x right, or right x left where that makes the output's contiguous axis
// the columns of the sums. `rows_are_left` says which.
enum class Orientation : uint8_t { rows_are_left, rows_are_right };

bool keeps_gradient(GradMode mode, const TensorView& trainable, int64_t expert, int64_t num_rows) {
  if (!is_trainable(trainable, expert)) return true;
  return num_rows == 0 && mode == GradMode::accumulate;
}

class StoreGradient final : public Epilogue {
 public:
  StoreGradient(const RowKernels& kernels, const WeightGradientArgs& args, Orientation orientation)
      : kernels_(kernels),
        args_(args),
        orientation_(orientation),
        half_size_(args.left.size(1) / args.halves) {}

  bool skips(int64_t expert, int64_t k) const override {
    return keeps_gradient(args_.mode, args_.trainable, expert, k);
  }

  void apply(const Chunk& chunk) const override {
    for (int64_t i = 0; i < chunk.rows; ++i) {
      const int64_t row = chunk.row_begin + i;
      if (orientation_ == Orientation::rows_are_left) {
        const int64_t half = row / half_size_;
        const GroupedMatrix& out = args_.out[static_cast<size_t>(half)];
        write(out, at(out, chunk.expert, row - half * half_size_, chunk.col_begin), out.col_stride,
              {chunk.row(i), chunk.cols});
      } else {
        apply_columns(chunk, i);
      }
    }
  }

  SumRows destination(const Chunk& block) const override {
    if (args_.mode == GradMode::accumulate || orientation_ == Orientation::rows_are_right)
      return {};
    const int64_t half = block.row_begin / half_size_;
    const GroupedMatrix& out = args_.out[static_cast<size_t>(half)];
    if (out.col_stride != 1) return {};
    const int64_t row = block.row_begin - half * half_size_;
    if (row + block.rows > half_size_ && !halves_are_one_matrix()) return {};
    return {at(out, block.expert, row, block.col_begin), element_of(out.dtype), out.row_stride,
            NextUse::distant};
  }

 private:
  // Whether the second half's rows follow the first's in memory.
  bool halves_are_one_matrix() const {
    const GroupedMatrix& first = args_.out[0];
    const GroupedMatrix& second = args_.out[1];
    return second.data == at(first, 0, half_size_, 0) && second.row_stride == first.row_stride &&
           second.expert_stride == first.expert_stride;
  }

  struct Values {
    float* data;
    int64_t count;
  };

  // Columns of the sums are columns of left: they may belong to both halves.
  void apply_columns(const Chunk& chunk, int64_t i) const {
    const int64_t end = chunk.col_begin + chunk.cols;
    for (int64_t col = chunk.col_begin; col < end;) {
      const int64_t half = col / half_size_;
      const int64_t count = std::min(end, (half + 1) * half_size_) - col;
      const GroupedMatrix& out = args_.out[static_cast<size_t>(half)];
      write(out, at(out, chunk.expert, col - half * half_size_, chunk.row_begin + i),
            out.row_stride, {chunk.row(i) + (col - chunk.col_begin), count});
      col += count;
    }
  }

  static void* at(const GroupedMatrix& out, int64_t expert, int64_t row, int64_t col) {
    const int64_t offset = expert * out.expert_stride + row * out.row_stride + col * out.col_stride;
    return static_cast<char*>(out.data) + offset * size_of(out.dtype);
  }
  void write(const GroupedMatrix& out, void* to, int64_t stride, Values values) const {
    write_strided(kernels_, {to, out.dtype, stride}, args_.mode, values.data, values.count);
  }

  const RowKernels& kernels_;
  const WeightGradientArgs& args_;
  Orientation orientation_;
  int64_t half_size_;
};

// Column sums of one expert, for one block of columns of one half.
struct BiasTask {
  int64_t expert;
  int32_t half;
  int64_t begin;  // within the half
  int64_t count;
};

void sum_columns(const BiasGradientArgs& args, const RowKernels& kernels, const BiasTask& task) {
  constexpr int64_t kRowsPerBlock = 256;
  const RowRange rows = rows_of(args.rows, task.expert);
  const int64_t num_rows = std::max<int64_t>(0, rows.end - rows.begin);
  if (keeps_gradient(args.mode, args.trainable, task.expert, num_rows)) return;
  const StorageRows values(args.values);
  const int32_t* gather = gather_of(args.rows, args.access);
  const int64_t col = task.half * (args.values.size(1) / args.halves) + task.begin;
  alignas(64) float total[kMaxTaskColumns] = {};
  for (int64_t begin = rows.begin; begin < rows.end; begin += kRowsPerBlock) {
    alignas(64) float block[kMaxTaskColumns] = {};
    for (int64_t row = begin; row < std::min(rows.end, begin + kRowsPerBlock); ++row) {
      const float score = score_of<float>(args.rows, args.scores, row);
      const void* from = values.at(gather != nullptr ? gather[row] : row, col);
      kernels.add_scaled(values.type(), score, from, block, task.count);
    }
    kernels.add(block, total, task.count);
  }
  const GroupedVector& out = args.out[static_cast<size_t>(task.half)];
  const int64_t offset = task.expert * out.expert_stride + task.begin * out.stride;
  void* to = static_cast<char*>(out.data) + offset * size_of(out.dtype);
  write_strided(kernels, {to, out.dtype, out.stride}, args.mode, total, task.count);
}

}  // namespace

void weight_gradient(const WeightGradientArgs& args, const Runtime& runtime) {
  const bool transpose = args.out[0].col_stride != 1 && args.out[0].row_stride == 1;
  const Orientation orientation =
      transpose ? Orientation::rows_are_right : Orientation::rows_are_left;
  Operand left = columns_operand(args.left, gather_of(args.rows, args.left_access));
  Operand right = columns_operand(args.right, gather_of(args.rows, args.right_access));
  GroupedProduct product{.rows = ExpertRows(args.rows)};
  product.m = args.left.size(1);
  product.n = args.right.size(1);
  if (orientation == Orientation::rows_are_right) {
    std::swap(left, right);
    std::swap(product.m, product.n);
  }
  product.segments[0].k = kExpertRows;
  product.segments[0].left = left;
  product.segments[0].right[0] = right;
  const StoreGradient epilogue(runtime.kernels->rows, args, orientation);
  multiply_groups(product, epilogue, args.scratch, runtime);
}

void bias_gradient(const BiasGradientArgs& args, const Runtime& runtime) {
  const int64_t half_size = args.values.size(1) / args.halves;
  const int64_t blocks = (half_size + kMaxTaskColumns - 1) / kMaxTaskColumns;
  const int64_t per_expert = args.halves * blocks;
  const int64_t work = args.rows.row_capacity * args.values.size(1);
  parallel_for(threads_worth(runtime.threads, work), args.rows.num_experts() * per_expert,
               [&](int64_t index, int32_t) {
                 const int64_t within = index % per_expert;
                 const int64_t begin = within % blocks * kMaxTaskColumns;
                 const BiasTask task = {index / per_expert, static_cast<int32_t>(within / blocks),
                                        begin, std::min(kMaxTaskColumns, half_size - begin)};
                 sum_columns(args, runtime.kernels->rows, task);
               });
}

}  // namespace penstock::cpu::fast
