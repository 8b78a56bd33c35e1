// SPDX-License-Identifier: Apache-2.0
//
// The products whose rows are routed rows: up and down projection, and their backward passes with
// respect to data. Each is a GroupedProduct and an epilogue over finished rows of sums.
#include <algorithm>

#include "backends/cpu/common/rows.h"
#include "backends/cpu/fast/operands.h"
#include "backends/cpu/fast/operations.h"

namespace penstock::cpu::fast {
namespace {

// Sums, with a bias if there is one, rounded into rows of a tensor.
class StoreRows final : public Epilogue {
 public:
  StoreRows(const RowKernels& kernels, const TensorView& output, const GroupedVector& bias)
      : kernels_(kernels), output_(output), bias_(bias) {}

  void apply(const Chunk& chunk) const override {
    alignas(64) float bias[kMaxTaskColumns];
    if (bias_.present()) read_vector(bias_, chunk.expert, chunk.col_begin, chunk.cols, bias);
    for (int64_t i = 0; i < chunk.rows; ++i) {
      if (bias_.present()) kernels_.add(bias, chunk.row(i), chunk.cols);
      void* to = output_.at(chunk.row_begin + i, chunk.col_begin);
      kernels_.narrow(output_.type(), chunk.row(i), to, chunk.cols);
    }
  }

  SumRows destination(const Chunk& block) const override {
    if (bias_.present()) return {};
    return {output_.at(block.row_begin, block.col_begin), output_.type(), output_.row_stride()};
  }

 private:
  const RowKernels& kernels_;
  StorageRows output_;
  GroupedVector bias_;
};

// H = sums + bias, rounded and stored; A = act(H as stored).
class ActivateRows final : public Epilogue {
 public:
  ActivateRows(const RowKernels& kernels, const UpProjectionArgs& args, int64_t intermediate_size)
      : kernels_(kernels),
        args_(args),
        h_(args.h),
        a_(args.a),
        type_(element_of(args.x.dtype)),
        intermediate_size_(intermediate_size),
        activate_(kernels.activate[static_cast<int>(args.activation.kind)]) {}

  void apply(const Chunk& chunk) const override {
    alignas(64) float bias[2][kMaxTaskColumns];
    for (int32_t half = 0; half < args_.weights.halves; ++half) {
      const GroupedVector& b = args_.weights.b[static_cast<size_t>(half)];
      if (b.present()) read_vector(b, chunk.expert, chunk.col_begin, chunk.cols, bias[half]);
    }
    for (int64_t i = 0; i < chunk.rows; ++i) {
      for (int32_t half = 0; half < args_.weights.halves; ++half) {
        const GroupedVector& b = args_.weights.b[static_cast<size_t>(half)];
        if (b.present()) kernels_.add(bias[half], chunk.row(i, half), chunk.cols);
        round_and_store(chunk, i, half);
      }
      if (a_.present()) activate(chunk, i);
    }
  }

  void list_touched(const Chunk& block, Touched& touched) const override {
    touched.bytes = block.cols * size_of(args_.x.dtype);
    for (int64_t row = block.row_begin; row < block.row_begin + block.rows; ++row) {
      for (int32_t half = 0; h_.present() && half < args_.weights.halves; ++half)
        touched.add(h_.at(row, half * intermediate_size_ + block.col_begin));
      if (a_.present()) touched.add(a_.at(row, block.col_begin));
    }
  }

 private:
  void round_and_store(const Chunk& chunk, int64_t i, int32_t half) const {
    float* const sums = chunk.row(i, half);
    alignas(64) uint16_t rounded[kMaxTaskColumns];
    if (h_.present()) {
      const int64_t col = half * intermediate_size_ + chunk.col_begin;
      void* const h = h_.at(chunk.row_begin + i, col);
      kernels_.narrow(type_, sums, h, chunk.cols);
      if (type_ != Element::f32) kernels_.widen(type_, h, sums, chunk.cols);
    } else if (type_ != Element::f32) {
      kernels_.narrow(type_, sums, rounded, chunk.cols);
      kernels_.widen(type_, rounded, sums, chunk.cols);
    }
  }

  void activate(const Chunk& chunk, int64_t i) const {
    alignas(64) float buffer[kMaxTaskColumns];
    void* const a = a_.at(chunk.row_begin + i, chunk.col_begin);
    ActivationRow row = {};
    row.gate = chunk.row(i, 0);
    row.up = args_.weights.halves == 2 ? chunk.row(i, 1) : nullptr;
    row.count = chunk.cols;
    row.a = type_ == Element::f32 ? static_cast<float*>(a) : buffer;
    activate_({args_.activation.clamp_alpha, args_.activation.clamp_limit}, row);
    if (type_ != Element::f32) kernels_.narrow(type_, buffer, a, chunk.cols);
  }

  const RowKernels& kernels_;
  const UpProjectionArgs& args_;
  StorageRows h_;
  StorageRows a_;
  Element type_;
  int64_t intermediate_size_;
  void (*activate_)(const ActivationParams&, const ActivationRow&);
};

// Sums are rows of G = dO W2: partials of <G, A>, dH, A'. G and A are not rounded.
class DownBackwardRows final : public Epilogue {
 public:
  DownBackwardRows(const RowKernels& kernels, const DownBackwardArgs& args)
      : kernels_(kernels),
        args_(args),
        h_(args.h),
        dh_(args.dh),
        a_scaled_(args.a_scaled),
        gradient_(kernels.activation_gradient[static_cast<int>(args.activation.kind)]) {}

  void apply(const Chunk& chunk) const override {
    for (int64_t i = 0; i < chunk.rows; ++i) apply_row(chunk, i);
  }

  void list_touched(const Chunk& block, Touched& touched) const override {
    touched.bytes = block.cols * size_of(args_.h.dtype);
    const bool gated = is_gated(args_.activation.kind);
    const int64_t up_begin = args_.a_scaled.size(1) + block.col_begin;
    for (int64_t row = block.row_begin; row < block.row_begin + block.rows; ++row) {
      for (const StorageRows* rows : {&h_, &dh_}) {
        touched.add(rows->at(row, block.col_begin));
        if (gated) touched.add(rows->at(row, up_begin));
      }
      touched.add(a_scaled_.at(row, block.col_begin));
    }
  }

 private:
  struct Buffers {
    alignas(64) float half[2][kMaxTaskColumns];
    alignas(64) float d_half[2][kMaxTaskColumns];
    alignas(64) float a[kMaxTaskColumns];
  };

  void apply_row(const Chunk& chunk, int64_t i) const {
    const int64_t row = chunk.row_begin + i;
    const int64_t intermediate_size = args_.a_scaled.size(1);
    const bool gated = is_gated(args_.activation.kind);
    Buffers buffers;
    // All of H is read before any dH is written: they may be the same memory.
    for (int32_t half = 0; half <= (gated ? 1 : 0); ++half) {
      const int64_t col = half * intermediate_size + chunk.col_begin;
      kernels_.widen(h_.type(), h_.at(row, col), buffers.half[half], chunk.cols);
    }
    ActivationRow act = {};
    act.gate = buffers.half[0];
    act.up = gated ? buffers.half[1] : nullptr;
    act.count = chunk.cols;
    act.a = buffers.a;
    act.g = chunk.row(i);
    act.score = score_of<float>(args_.rows, args_.scores, row);
    act.d_gate = buffers.d_half[0];
    act.d_up = gated ? buffers.d_half[1] : nullptr;
    gradient_({args_.activation.clamp_alpha, args_.activation.clamp_limit}, act);

    if (args_.partials.present()) store_partials(chunk, i, buffers.a);
    for (int32_t half = 0; half <= (gated ? 1 : 0); ++half) {
      const int64_t col = half * intermediate_size + chunk.col_begin;
      kernels_.narrow(dh_.type(), buffers.d_half[half], dh_.at(row, col), chunk.cols);
    }
    kernels_.scale(act.score, buffers.a, buffers.a, chunk.cols);
    void* const a_scaled = a_scaled_.at(row, chunk.col_begin);
    kernels_.narrow(a_scaled_.type(), buffers.a, a_scaled, chunk.cols);
  }

  void store_partials(const Chunk& chunk, int64_t i, const float* a) const {
    const int64_t row = chunk.row_begin + i;
    float* const partials = args_.partials.as<float>() + row * args_.partials.stride(0);
    for (int64_t col = 0; col < chunk.cols; col += kColumnUnit) {
      const int64_t count = std::min(kColumnUnit, chunk.cols - col);
      partials[((chunk.col_begin + col) / kColumnUnit) * args_.partials.stride(1)] =
          kernels_.dot(chunk.row(i) + col, a + col, count);
    }
  }

  const RowKernels& kernels_;
  const DownBackwardArgs& args_;
  StorageRows h_;
  StorageRows dh_;
  StorageRows a_scaled_;
  void (*gradient_)(const ActivationParams&, const ActivationRow&);
};

// The term of low rank as one more segment of the product, if there is a term.
void add_low_rank(const LowRankTerm& term, GroupedProduct& product) {
  if (!term.present()) return;
  GroupedProduct::Segment& segment = product.segments[static_cast<size_t>(product.num_segments++)];
  segment.k = term.rows.size(1);
  segment.left = rows_operand(term.rows, nullptr);
  for (size_t band = 0; band < static_cast<size_t>(product.num_bands); ++band)
    segment.right[band] = matrix_operand(term.matrix[band]);
}

}  // namespace

void up_projection(const UpProjectionArgs& args, const Runtime& runtime) {
  const int32_t halves = args.weights.halves;
  GroupedProduct product{.rows = ExpertRows(args.rows)};
  product.n = (args.h.present() ? args.h.size(1) / halves : args.a.size(1));
  product.num_bands = halves;
  GroupedProduct::Segment& segment = product.segments[0];
  segment.k = args.x.size(1);
  segment.left = rows_operand(args.x, gather_of(args.rows));
  for (size_t half = 0; half < static_cast<size_t>(halves); ++half)
    segment.right[half] = matrix_operand(args.weights.w[half]);
  add_low_rank(args.low_rank, product);
  const ActivateRows epilogue(runtime.kernels->rows, args, product.n);
  multiply_groups(product, epilogue, args.scratch, runtime);
}

void down_projection(const DownProjectionArgs& args, const Runtime& runtime) {
  GroupedProduct product{.rows = ExpertRows(args.rows)};
  product.n = args.y.size(1);
  product.segments[0].k = args.a.size(1);
  product.segments[0].left = rows_operand(args.a, nullptr);
  product.segments[0].right[0] = matrix_operand(args.weights.w);
  add_low_rank(args.low_rank, product);
  const StoreRows epilogue(runtime.kernels->rows, args.y, args.weights.b);
  multiply_groups(product, epilogue, args.scratch, runtime);
}

void down_backward(const DownBackwardArgs& args, const Runtime& runtime) {
  GroupedProduct product{.rows = ExpertRows(args.rows)};
  product.n = args.a_scaled.size(1);
  product.segments[0].k = args.d_output.size(1);
  product.segments[0].left = rows_operand(args.d_output, gather_of(args.rows));
  product.segments[0].right[0] = transposed(matrix_operand(args.weights.w));
  add_low_rank(args.low_rank, product);
  const DownBackwardRows epilogue(runtime.kernels->rows, args);
  multiply_groups(product, epilogue, args.scratch, runtime);
}

void up_backward(const UpBackwardArgs& args, const Runtime& runtime) {
  GroupedProduct product{.rows = ExpertRows(args.rows)};
  product.n = args.dx_rows.size(1);
  product.num_segments = args.weights.halves;
  const int64_t intermediate_size = args.dh.size(1) / args.weights.halves;
  for (int32_t half = 0; half < args.weights.halves; ++half) {
    GroupedProduct::Segment& segment = product.segments[static_cast<size_t>(half)];
    segment.k = intermediate_size;
    segment.left = rows_operand(args.dh, nullptr, half * intermediate_size);
    segment.right[0] = transposed(matrix_operand(args.weights.w[static_cast<size_t>(half)]));
  }
  add_low_rank(args.low_rank, product);
  const StoreRows epilogue(runtime.kernels->rows, args.dx_rows, {});
  multiply_groups(product, epilogue, args.scratch, runtime);
}

}  // namespace penstock::cpu::fast
