// SPDX-License-Identifier: Apache-2.0
//
// What becomes of a tile's sums (TileMode). Included by isa/gemm.h and isa/amx.h.
#pragma once

#include "backends/cpu/fast/isa/kernels.h"

namespace penstock::cpu::fast {
namespace {

constexpr int64_t bytes_of_sum(TileMode mode) {
  const bool rounds =
      mode == TileMode::round_to_bf16 || mode == TileMode::round_to_bf16_past_caches;
  return rounds ? sizeof(uint16_t) : sizeof(float);
}

struct SumTarget {
  void* c;
  int64_t ldc;
  TileMode mode;
};

// Calls store(address, sum) for every vector of sums; addresses are of Elem. Unrolled whole, or
// the sums would live in memory.
template <typename V, typename Elem, int kRows, int kCols, typename Store>
void put_each(const SumTarget& target, const typename V::F (&sums)[kRows][kCols],
              const Store& store) {
  Elem* const c = static_cast<Elem*>(target.c);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kCols; ++v) store(c + i * target.ldc + v * V::kWidth, sums[i][v]);
  }
}

template <typename V, int kRows, int kCols>
void put_sums(const SumTarget& target, const typename V::F (&sums)[kRows][kCols]) {
  using F = typename V::F;
  switch (target.mode) {
    case TileMode::store:
      return put_each<V, float>(target, sums, [](float* c, F sum) { V::store(c, sum); });
    case TileMode::add:
      return put_each<V, float>(target, sums,
                                [](float* c, F sum) { V::store(c, V::load(c) + sum); });
    case TileMode::store_past_caches:
      return put_each<V, float>(target, sums,
                                [](float* c, F sum) { V::store_past_caches(c, sum); });
    case TileMode::round_to_bf16:
      return put_each<V, uint16_t>(target, sums, [](uint16_t* c, F sum) { V::store_bf16(c, sum); });
    case TileMode::round_to_bf16_past_caches:
      return put_each<V, uint16_t>(target, sums,
                                   [](uint16_t* c, F sum) { V::store_bf16_past_caches(c, sum); });
  }
}

}  // namespace
}  // namespace penstock::cpu::fast
