// SPDX-License-Identifier: Apache-2.0
//
// The product of packed blocks: a tile of kMr x kNr accumulators stays in registers over all of a
// block's k, one multiply-add per accumulator and word. A tile with fewer rows is the same code
// with fewer accumulators; there are no tiles with fewer columns (padding is multiplied too), so
// an element's chain of operations is the same wherever it sits. `Product` says what a word is.
// Included by the files that fill an IsaKernels.
#pragma once

#include "backends/cpu/fast/isa/kernels.h"
#include "backends/cpu/fast/isa/pack.h"

namespace penstock::cpu::fast {
namespace {

template <typename V>
struct FloatProduct {
  using F = typename V::F;
  static constexpr int kPerWord = 1;
  static F multiply_add(F a, F b, F c) { return V::fma(a, b, c); }
};

template <typename V, typename Product, int kMr, int kVectors>
struct Gemm {
  using F = typename V::F;
  static constexpr int kNr = kVectors * V::kWidth;

  struct Tile {
    const float* a;
    const float* b;
    int64_t words;
    float* c;
    int64_t ldc;
    TileMode mode;
  };

  template <int kRows>
  static void multiply_tile(const Tile& tile) {
    // Every loop over rows and vectors must be unrolled, or the sums would live in memory.
    F sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = V::zero();
      __builtin_prefetch(tile.c + i * tile.ldc, 1);
    }
    const float* a = tile.a;
    const float* b = tile.b;
#pragma GCC unroll 4
    for (int64_t w = 0; w < tile.words; ++w) {
      F columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = V::load(b + v * V::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const F row = V::broadcast(a[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          sums[i][v] = Product::multiply_add(row, columns[v], sums[i][v]);
      }
      a += kMr;
      b += kNr;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* c = tile.c + i * tile.ldc + v * V::kWidth;
        V::store(c, tile.mode == TileMode::add ? V::load(c) + sums[i][v] : sums[i][v]);
      }
    }
  }

  // Calls multiply_tile<rows>, 1 <= rows <= kRows.
  template <int kRows>
  static void multiply_rows(const Tile& tile, int64_t rows) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return multiply_rows<kRows - 1>(tile, rows);
    }
    multiply_tile<kRows>(tile);
  }

  static void multiply(const BlockArgs& args) {
    const uint32_t* b = args.b;
    for (int64_t j = 0; j < args.cols; j += kNr, b += args.b_panel_stride) {
      const uint32_t* a = args.a;
      for (int64_t i = 0; i < args.rows; i += kMr, a += args.a_panel_stride) {
        const Tile tile = {reinterpret_cast<const float*>(a),
                           reinterpret_cast<const float*>(b),
                           args.words,
                           args.c + i * args.ldc + j,
                           args.ldc,
                           args.mode};
        const int64_t rows = args.rows - i;
        if (rows >= kMr) {
          multiply_tile<kMr>(tile);
        } else {
          multiply_rows<kMr>(tile, rows);
        }
      }
    }
  }

  static constexpr GemmKernels kernels() {
    GemmKernels result = {};
    result.mr = kMr;
    result.nr = kNr;
    result.k_block = 256 * Product::kPerWord;
    result.k_per_word = Product::kPerWord;
    result.a_panel_spill = (8 - kMr % 8) % 8;
    result.b_panel_spill = (8 - kNr % 8) % 8;
    if constexpr (Product::kPerWord == 1) {
      result.pack_a = pack_floats<V, kMr>;
      result.pack_b = pack_floats<V, kNr>;
    } else {
      result.pack_a = pack_pairs<V, kMr>;
      result.pack_b = pack_pairs<V, kNr>;
    }
    result.multiply = multiply;
    return result;
  }
};

}  // namespace
}  // namespace penstock::cpu::fast
