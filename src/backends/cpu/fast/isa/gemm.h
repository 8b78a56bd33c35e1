// SPDX-License-Identifier: Apache-2.0
//
// The product of packed blocks: a tile of kMr x kNr accumulators stays in registers over all of a
// block's k, one multiply-add per accumulator and word. A tile with fewer rows or fewer vectors of
// columns is the same code with fewer accumulators, so an element's chain of
// operations is the same wherever it sits. `Product` says what a word is.
// Included by the files that fill an IsaKernels.
#pragma once

#include "backends/cpu/fast/isa/kernels.h"
#include "backends/cpu/fast/isa/pack.h"
#include "backends/cpu/fast/isa/sums.h"

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
    const void* a[kMr];      // of each row, its first word
    const void* ahead[kMr];  // of rows that will be wanted next
    int64_t a_step;          // bytes from a row's word to the next
    const float* b;
    int64_t words;
    void* c;
    int64_t ldc;
    TileMode mode;
  };

  static F broadcast_word(const char* from) {
    float word;
    __builtin_memcpy(&word, from, sizeof word);
    return V::broadcast(word);
  }

  // Rows that are read in place come from memory once: a line of each is fetched ahead for every
  // line that is used.
  static constexpr int64_t kLineWords = 16;

  template <int kRows, int kCols>
  static void multiply_tile(const Tile& tile) {
    // Every loop over rows and vectors must be unrolled, or the sums would live in memory.
    F sums[kRows][kCols];
    const char* a[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kCols; ++v) sums[i][v] = V::zero();
      a[i] = static_cast<const char*>(tile.a[i]);
      if (tile.mode == TileMode::store || tile.mode == TileMode::add)
        __builtin_prefetch(static_cast<float*>(tile.c) + i * tile.ldc, 1);
    }
    const float* b = tile.b;
    int64_t at = 0;
    for (int64_t begin = 0; begin < tile.words; begin += kLineWords) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
        __builtin_prefetch(static_cast<const char*>(tile.ahead[i]) + begin * 4);
      const int64_t words = tile.words - begin < kLineWords ? tile.words - begin : kLineWords;
#pragma GCC unroll 4
      for (int64_t w = 0; w < words; ++w) {
        F columns[kCols];
#pragma GCC unroll 4
        for (int v = 0; v < kCols; ++v) columns[v] = V::load(b + v * V::kWidth);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const F row = broadcast_word(a[i] + at);
#pragma GCC unroll 4
          for (int v = 0; v < kCols; ++v)
            sums[i][v] = Product::multiply_add(row, columns[v], sums[i][v]);
        }
        at += tile.a_step;
        b += kNr;
      }
    }
    put_sums<V>({tile.c, tile.ldc, tile.mode}, sums);
  }

  // Calls multiply_tile<rows, kCols>, 1 <= rows <= kRows.
  template <int kRows, int kCols>
  static void multiply_rows(const Tile& tile, int64_t rows) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return multiply_rows<kRows - 1, kCols>(tile, rows);
    }
    multiply_tile<kRows, kCols>(tile);
  }

  // Points the tile at rows i .. i + kMr of the left operand, of which `rows` exist.
  static void point_at_rows(const BlockArgs& args, int64_t i, int64_t rows, Tile& tile) {
    if (args.a_rows != nullptr) {
      tile.a_step = sizeof(uint32_t);
      for (int64_t r = 0; r < kMr; ++r) {
        tile.a[r] = args.a_rows[i + (r < rows ? r : 0)];
        tile.ahead[r] = args.a_rows[i + (r + kMr < rows ? r + kMr : 0)];
      }
    } else {
      tile.a_step = kMr * sizeof(uint32_t);
      const uint32_t* const panel = args.a + i / kMr * args.a_panel_stride;
      for (int64_t r = 0; r < kMr; ++r) tile.a[r] = tile.ahead[r] = panel + r;
    }
  }

  // One panel of columns, of which kCols vectors are wanted.
  template <int kCols>
  static void multiply_panel(const BlockArgs& args, const uint32_t* b, int64_t j) {
    for (int64_t i = 0; i < args.rows; i += kMr) {
      const int64_t rows = args.rows - i;
      Tile tile;
      tile.b = reinterpret_cast<const float*>(b);
      tile.words = args.words;
      tile.c = static_cast<char*>(args.c) + (i * args.ldc + j) * bytes_of_sum(args.mode);
      tile.ldc = args.ldc;
      tile.mode = args.mode;
      point_at_rows(args, i, rows, tile);
      multiply_rows<kMr, kCols>(tile, rows);
    }
  }

  // Calls multiply_panel<vectors>, 1 <= vectors <= kCols.
  template <int kCols>
  static void multiply_vectors(const BlockArgs& args, const uint32_t* b, int64_t j,
                               int64_t vectors) {
    if constexpr (kCols > 1) {
      if (vectors < kCols) return multiply_vectors<kCols - 1>(args, b, j, vectors);
    }
    multiply_panel<kCols>(args, b, j);
  }

  static void multiply(const BlockArgs& args) {
    const uint32_t* b = args.b;
    for (int64_t j = 0; j < args.cols; j += kNr, b += args.b_panel_stride) {
      const int64_t vectors = (args.cols - j + V::kWidth - 1) / V::kWidth;
      multiply_vectors<kVectors>(args, b, j, vectors);
    }
    V::order_stores();
  }

  static constexpr GemmKernels kernels() {
    GemmKernels result = {};
    result.mr = kMr;
    result.nr = kNr;
    result.k_block = 512 * Product::kPerWord;
    result.k_per_word = Product::kPerWord;
    result.word_unit = 1;
    result.a_panel_spill = (8 - kMr % 8) % 8;
    result.b_panel_spill = (8 - kNr % 8) % 8;
    if constexpr (Product::kPerWord == 1) {
      result.pack_a = pack_floats<V, kMr>;
      result.pack_b = pack_floats<V, kNr>;
    } else {
      result.pack_a = pack_pairs<V, kMr>;
      result.pack_b = pack_pairs<V, kNr>;
    }
    result.left_rows = LeftRows::packed_or_in_place;
    result.multiply = multiply;
    return result;
  }
};

}  // namespace
}  // namespace penstock::cpu::fast
