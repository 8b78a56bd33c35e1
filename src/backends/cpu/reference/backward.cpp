// SPDX-License-Identifier: Apache-2.0
//
// The experts' backward operations that follow the rows: dH, A' and the scores' gradient from dO,
// and dX~ from dH. The weights' gradients are in weight_gradient.cpp.
#include <cstdint>
#include <span>

#include "backends/cpu/common/activation.h"
#include "backends/cpu/common/elements.h"
#include "backends/cpu/common/rows.h"
#include "backends/cpu/reference/products.h"
#include "backends/cpu/reference/reference_ops.h"

namespace penstock::cpu::reference {
namespace {

// Columns [first, first + g.size()) of one row, with g the same columns of G. dH may be H itself:
// an element of each half is read before the same elements are written. Returns its share of
// <G, A>, added to `partial`.
template <typename T>
Accumulator<T> activation_backward(const DownBackwardArgs& args, int64_t row, int64_t first,
                                   std::span<const Accumulator<T>> g, Accumulator<T> partial) {
  using Acc = Accumulator<T>;
  const bool gated = is_gated(args.activation.kind);
  const int64_t n = args.a_scaled.size(1);
  const Acc score = score_of<Acc>(args.rows, args.scores, row);
  const T* h = row_of<const T>(args.h, row) + first;
  T* dh = row_of<T>(args.dh, row) + first;
  T* a_scaled = row_of<T>(args.a_scaled, row) + first;
  for (int64_t j = 0; j < static_cast<int64_t>(g.size()); ++j) {
    const Acc gradient = g[static_cast<size_t>(j)];
    const Acc gate = load(h[j]);
    const Acc up = gated ? load(h[n + j]) : Acc(0);
    const Acc a = activate(args.activation, gate, up);
    const HalfGradients<Acc> halves =
        activation_gradient(args.activation, gate, up, score * gradient);
    partial += gradient * a;
    store(dh[j], halves.gate);
    if (gated) store(dh[n + j], halves.up);
    store(a_scaled[j], score * a);
  }
  return partial;
}

template <typename T>
void down_backward_row(const DownBackwardArgs& args, int64_t expert, int64_t row) {
  using Acc = Accumulator<T>;
  const std::span<const T> d_output(row_of<const T>(args.d_output, token_of(args.rows, row)),
                                    static_cast<size_t>(args.d_output.size(1)));
  const MatrixSlice<T> w = reduce_rows<T>(args.weights.w, expert);
  Acc partial = Acc(0);
  for_each_chunk<Acc>(args.a_scaled.size(1), [&](int64_t first, std::span<Acc> g) {
    add_product<Acc, T, T>(d_output, w.from_output(first), g);
    add_low_rank<Acc, T>(args.low_rank, {expert, row, 0}, first, g);
    partial = activation_backward<T>(args, row, first, g, partial);
  });
  if (args.partials.present()) row_of<Acc>(args.partials, row)[0] = partial;
}

// <dO_{token(r)}, b2_e>, 0 without a bias.
template <typename T>
Accumulator<T> bias_score(const ScoreGradientArgs& args, int64_t expert, int64_t row) {
  Accumulator<T> sum = 0;
  if (!args.b2.present()) return sum;
  const T* d_output = row_of<const T>(args.d_output, token_of(args.rows, row));
  const T* b2 = static_cast<const T*>(args.b2.data) + expert * args.b2.expert_stride;
  for (int64_t j = 0; j < args.d_output.size(1); ++j)
    sum += load(d_output[j]) * load(b2[j * args.b2.stride]);
  return sum;
}

template <typename T>
void score_gradient_row(const ScoreGradientArgs& args, int64_t expert, int64_t row) {
  using Acc = Accumulator<T>;
  const Acc* partials = row_of<const Acc>(args.partials, row);
  Acc sum = Acc(0);
  for (int64_t p = 0; p < args.partials.size(1); ++p) sum += partials[p];
  set_value(args.dscores, slot_of(args.rows, row), sum + bias_score<T>(args, expert, row));
}

template <typename T>
void up_backward_row(const UpBackwardArgs& args, int64_t expert, int64_t row) {
  using Acc = Accumulator<T>;
  const int64_t n = args.dh.size(1) / args.weights.halves;
  for_each_chunk<Acc>(args.dx_rows.size(1), [&](int64_t first, std::span<Acc> sums) {
    for (int64_t half = 0; half < args.weights.halves; ++half) {
      const std::span<const T> dh(row_of<const T>(args.dh, row) + half * n, static_cast<size_t>(n));
      const MatrixSlice<T> w = reduce_rows<T>(args.weights.w[static_cast<size_t>(half)], expert);
      add_product<Acc, T, T>(dh, w.from_output(first), sums);
    }
    add_low_rank<Acc, T>(args.low_rank, {expert, row, 0}, first, sums);
    T* dx = row_of<T>(args.dx_rows, row) + first;
    for (size_t j = 0; j < sums.size(); ++j) store(dx[j], sums[j]);
  });
}

}  // namespace

void down_backward(const DownBackwardArgs& args, const Context&) {
  visit_floating(args.d_output.dtype, [&]<typename T>(StorageTag<T>) {
    for_each_row(args.rows,
                 [&](int64_t expert, int64_t row) { down_backward_row<T>(args, expert, row); });
  });
}

void score_gradient(const ScoreGradientArgs& args, const Context&) {
  // Slots may have no row; rows that are dispatched without slots have nothing else to be set.
  if (args.rows.row_to_slot.present()) {
    for (int64_t slot = 0; slot < args.dscores.numel(); ++slot) set_value(args.dscores, slot, 0.0);
  }
  visit_floating(args.d_output.dtype, [&]<typename T>(StorageTag<T>) {
    for_each_row(args.rows,
                 [&](int64_t expert, int64_t row) { score_gradient_row<T>(args, expert, row); });
  });
}

void up_backward(const UpBackwardArgs& args, const Context&) {
  visit_floating(args.dh.dtype, [&]<typename T>(StorageTag<T>) {
    for_each_row(args.rows,
                 [&](int64_t expert, int64_t row) { up_backward_row<T>(args, expert, row); });
  });
}

}  // namespace penstock::cpu::reference
