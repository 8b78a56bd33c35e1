// SPDX-License-Identifier: Apache-2.0
//
// The experts' forward operations: up projection with activation, down projection, combine, and
// the scaling that stands for a combine when rows are already dispatched.
#include <cstdint>
#include <span>

#include "backends/cpu/common/activation.h"
#include "backends/cpu/common/elements.h"
#include "backends/cpu/common/rows.h"
#include "backends/cpu/reference/products.h"
#include "backends/cpu/reference/reference_ops.h"

namespace penstock::cpu::reference {
namespace {

template <typename Acc, typename T>
void add_bias(const GroupedVector& bias, int64_t expert, int64_t first, std::span<Acc> sums) {
  if (!bias.present()) return;
  const T* values = static_cast<const T*>(bias.data) + expert * bias.expert_stride;
  for (size_t j = 0; j < sums.size(); ++j)
    sums[j] += load(values[(first + static_cast<int64_t>(j)) * bias.stride]);
}

// What the value becomes once it is stored: backward reads H, so A is made from nothing else.
template <typename T>
Accumulator<T> as_stored(Accumulator<T> value) {
  T stored;
  store(stored, value);
  return load(stored);
}

// Columns [first, first + gate.size()) of one row of A, from the same columns of H's halves.
template <typename T>
void activate_chunk(const UpProjectionArgs& args, int64_t row, int64_t first,
                    std::span<const Accumulator<T>> gate, std::span<const Accumulator<T>> up) {
  T* a = row_of<T>(args.a, row) + first;
  const bool gated = args.weights.halves == 2;
  for (size_t j = 0; j < gate.size(); ++j)
    store(a[j], activate(args.activation, gate[j], gated ? up[j] : Accumulator<T>(0)));
}

template <typename T>
void up_projection_row(const UpProjectionArgs& args, int64_t expert, int64_t row) {
  using Acc = Accumulator<T>;
  const int64_t halves = args.weights.halves;
  const int64_t n = args.a.present() ? args.a.size(1) : args.h.size(1) / halves;
  const std::span<const T> x(row_of<const T>(args.x, token_of(args.rows, row)),
                             static_cast<size_t>(args.x.size(1)));
  ChunkSums<Acc> up_buffer{};
  for_each_chunk<Acc>(n, [&](int64_t first, std::span<Acc> gate) {
    const std::span<Acc> up(up_buffer.data(), gate.size());
    std::fill(up.begin(), up.end(), Acc(0));
    for (int64_t half = 0; half < halves; ++half) {
      const size_t index = static_cast<size_t>(half);
      const std::span<Acc> sums = half == 0 ? gate : up;
      const MatrixSlice<T> w = reduce_columns<T>(args.weights.w[index], expert);
      add_product<Acc, T, T>(x, w.from_output(first), sums);
      add_low_rank<Acc, T>(args.low_rank, {expert, row, half}, first, sums);
      add_bias<Acc, T>(args.weights.b[index], expert, first, sums);
      for (Acc& value : sums) value = as_stored<T>(value);
      if (!args.h.present()) continue;
      T* h = row_of<T>(args.h, row) + half * n + first;
      for (size_t j = 0; j < sums.size(); ++j) store(h[j], sums[j]);
    }
    if (args.a.present()) activate_chunk<T>(args, row, first, gate, up);
  });
}

template <typename T>
void down_projection_row(const DownProjectionArgs& args, int64_t expert, int64_t row) {
  using Acc = Accumulator<T>;
  const std::span<const T> a(row_of<const T>(args.a, row), static_cast<size_t>(args.a.size(1)));
  const MatrixSlice<T> w = reduce_columns<T>(args.weights.w, expert);
  for_each_chunk<Acc>(args.y.size(1), [&](int64_t first, std::span<Acc> sums) {
    add_product<Acc, T, T>(a, w.from_output(first), sums);
    add_low_rank<Acc, T>(args.low_rank, {expert, row, 0}, first, sums);
    add_bias<Acc, T>(args.weights.b, expert, first, sums);
    T* y = row_of<T>(args.y, row) + first;
    for (size_t j = 0; j < sums.size(); ++j) store(y[j], sums[j]);
  });
}

template <typename T>
void combine_token(const CombineArgs& args, int64_t token) {
  using Acc = Accumulator<T>;
  const int32_t* slot_to_row = args.plan.slot_to_row.as<const int32_t>();
  const RowRange slots = slots_of(args.plan.token_offsets, args.plan.top_k, token);
  for_each_chunk<Acc>(args.output.size(1), [&](int64_t first, std::span<Acc> sums) {
    for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
      const int64_t row = slot_to_row[slot];
      if (row < 0) continue;
      const Acc score = args.scores.present() ? value_at<Acc>(args.scores, slot) : Acc(1);
      const T* values = row_of<const T>(args.rows, row) + first;
      for (size_t j = 0; j < sums.size(); ++j) sums[j] += score * load(values[j]);
    }
    T* output = row_of<T>(args.output, token) + first;
    for (size_t j = 0; j < sums.size(); ++j) store(output[j], sums[j]);
  });
}

}  // namespace

void up_projection(const UpProjectionArgs& args, const Context&) {
  visit_floating(args.x.dtype, [&]<typename T>(StorageTag<T>) {
    for_each_row(args.rows,
                 [&](int64_t expert, int64_t row) { up_projection_row<T>(args, expert, row); });
  });
}

void down_projection(const DownProjectionArgs& args, const Context&) {
  visit_floating(args.a.dtype, [&]<typename T>(StorageTag<T>) {
    for_each_row(args.rows,
                 [&](int64_t expert, int64_t row) { down_projection_row<T>(args, expert, row); });
  });
}

void combine(const CombineArgs& args, const Context&) {
  visit_floating(args.rows.dtype, [&]<typename T>(StorageTag<T>) {
    for (int64_t token = 0; token < args.output.size(0); ++token) combine_token<T>(args, token);
  });
}

void scale_rows(const ScaleRowsArgs& args, const Context&) {
  visit_floating(args.input.dtype, [&]<typename T>(StorageTag<T>) {
    for_each_row(args.rows, [&](int64_t, int64_t row) {
      const Accumulator<T> score = score_of<Accumulator<T>>(args.rows, args.scores, row);
      const T* input = row_of<const T>(args.input, row);
      T* output = row_of<T>(args.output, row);
      for (int64_t j = 0; j < args.input.size(1); ++j) store(output[j], score * load(input[j]));
    });
  });
}

}  // namespace penstock::cpu::reference
