// SPDX-License-Identifier: Apache-2.0
//
// The router's products (logits from X, their backward), and the routers that the CPU backends
// share, run in one loop.
#include "backends/cpu/common/routers/router.h"

#include <cstdint>
#include <span>

#include "backends/cpu/common/elements.h"
#include "backends/cpu/reference/products.h"
#include "backends/cpu/reference/reference_ops.h"

namespace penstock::cpu::reference {
namespace {

template <typename T>
std::span<const T> row_span(const TensorView& matrix, int64_t row) {
  return {row_of<const T>(matrix, row), static_cast<size_t>(matrix.size(1))};
}

// dX_t = sum_e dlogits_{t,e} Wr_e + addend_t.
template <typename T, typename Logit>
void logits_backward_input(const RouterLogitsBackwardArgs& args) {
  using Acc = Accumulator<T>;
  const TensorView& w = args.router_weight;
  const MatrixSlice<T> matrix{w.as<const T>(), w.stride(0), w.stride(1)};
  for (int64_t token = 0; token < args.dx.size(0); ++token) {
    for_each_chunk<Acc>(args.dx.size(1), [&](int64_t first, std::span<Acc> sums) {
      add_product<Acc, Logit, T>(row_span<Logit>(args.dlogits, token), matrix.from_output(first),
                                 sums);
      if (args.addend.present()) {
        const T* addend = row_of<const T>(args.addend, token) + first;
        for (size_t j = 0; j < sums.size(); ++j) sums[j] += load(addend[j]);
      }
      T* dx = row_of<T>(args.dx, token) + first;
      for (size_t j = 0; j < sums.size(); ++j) store(dx[j], sums[j]);
    });
  }
}

// dWr_e = sum_t dlogits_{t,e} X_t.
template <typename T, typename Logit, typename Out>
void logits_backward_weight(const RouterLogitsBackwardArgs& args) {
  using Acc = Accumulator<T>;
  for (int64_t expert = 0; expert < args.drouter_weight.size(0); ++expert) {
    for_each_chunk<Acc>(args.x.size(1), [&](int64_t first, std::span<Acc> sums) {
      for (int64_t token = 0; token < args.x.size(0); ++token) {
        const Acc factor = static_cast<Acc>(row_of<const Logit>(args.dlogits, token)[expert]);
        const T* x = row_of<const T>(args.x, token) + first;
        for (size_t j = 0; j < sums.size(); ++j) sums[j] += factor * load(x[j]);
      }
      Out* out = row_of<Out>(args.drouter_weight, expert) + first;
      for (size_t j = 0; j < sums.size(); ++j) store(out[j], sums[j]);
    });
  }
}

}  // namespace

void router_logits(const RouterLogitsArgs& args, const Context&) {
  visit_floating(args.x.dtype, [&]<typename T>(StorageTag<T>) {
    using Acc = Accumulator<T>;
    const TensorView& w = args.router_weight;
    const MatrixSlice<T> matrix{w.as<const T>(), w.stride(1), w.stride(0)};
    for (int64_t token = 0; token < args.x.size(0); ++token) {
      for_each_chunk<Acc>(w.size(0), [&](int64_t first, std::span<Acc> sums) {
        add_product<Acc, T, T>(row_span<T>(args.x, token), matrix.from_output(first), sums);
        Acc* logits = row_of<Acc>(args.logits, token) + first;
        for (size_t j = 0; j < sums.size(); ++j) logits[j] = sums[j];
      });
    }
  });
}

void router_logits_backward(const RouterLogitsBackwardArgs& args, const Context&) {
  visit_floating(args.x.dtype, [&]<typename T>(StorageTag<T>) {
    visit_accumulator(args.dlogits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
      if (args.dx.present()) logits_backward_input<T, Logit>(args);
      if (!args.drouter_weight.present()) return;
      visit_gradient<T>(
          args.x.dtype, args.drouter_weight.dtype,
          [&]<typename Out>(StorageTag<Out>) { logits_backward_weight<T, Logit, Out>(args); });
    });
  });
}

void router_forward(const RouterForwardArgs& args, const Context&) {
  route_forward(args, SerialLoop());
}

void router_backward(const RouterBackwardArgs& args, const Context&) {
  router_of(args.kind).backward(args, SerialLoop());
}

}  // namespace penstock::cpu::reference
