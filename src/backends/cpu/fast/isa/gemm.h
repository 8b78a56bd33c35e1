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

// Fetches a ReadNext in `turns` even turns.
class Fetcher {
 public:
  Fetcher(const ReadNext& next, int64_t turns)
      : at_(next.at), end_(next.at + next.count), bytes_(next.bytes) {
    const int64_t lines = next.count * ((next.bytes + kLine - 1) / kLine);
    lines_a_turn_ = turns > 0 ? (lines + turns - 1) / turns : 0;
  }

  void fetch() {
    for (int64_t line = 0; line < lines_a_turn_ && at_ != end_; ++line) {
      constexpr int kSecondCache = 2;
      __builtin_prefetch(static_cast<const char*>(*at_) + begin_, 0, kSecondCache);
      begin_ += kLine;
      if (begin_ < bytes_) continue;
      begin_ = 0;
      ++at_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes

  const void* const* at_;
  const void* const* end_;
  int64_t bytes_;
  int64_t begin_ = 0;
  int64_t lines_a_turn_ = 0;
};

template <typename V, typename Product, int kMr, int kVectors>
struct Gemm {
  using F = typename V::F;
  static constexpr int kNr = kVectors * V::kWidth;

  static F broadcast_word(const void* from) {
    float word;
    __builtin_memcpy(&word, from, sizeof word);
    return V::broadcast(word);
  }

  // Words of k that are multiplied between two rounds of prefetches: a cache line of them.
  static constexpr int64_t kLineWords = 16;

  // Rows of the left operand with their words a fixed step apart, packed or in place. Rows that are
  // read in place come from memory once: a line of each is fetched ahead for every line in use.
  template <int kRows>
  struct LeftRows {
    const char* row[kRows];
    const char* ahead[kRows];  // rows that will be wanted next
    int64_t step;              // bytes from a word to the next
    int64_t at = 0;

    LeftRows(const BlockArgs& args, int64_t i) {
      if (args.a_rows != nullptr) {
        step = sizeof(uint32_t);
        for (int64_t r = 0; r < kRows; ++r) {
          const bool inside = i + r + kMr < args.rows;
          row[r] = static_cast<const char*>(args.a_rows[i + r]);
          ahead[r] = static_cast<const char*>(args.a_rows[inside ? i + r + kMr : 0]);
        }
      } else {
        step = kMr * sizeof(uint32_t);
        const uint32_t* const panel = args.a + i / kMr * args.a_panel_stride;
        for (int64_t r = 0; r < kRows; ++r)
          row[r] = ahead[r] = reinterpret_cast<const char*>(panel + r);
      }
    }
    void fetch(int64_t word) const {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(ahead[i] + word * 4);
    }
    F word_of(int i) const { return broadcast_word(row[i] + at); }
    void advance() { at += step; }
  };

  // Columns of the left operand, in place.
  template <int kRows>
  struct LeftColumns {
    const void* const* column;
    int64_t offset;

    LeftColumns(const BlockArgs& args, int64_t i)
        : column(args.a_columns), offset(i * static_cast<int64_t>(sizeof(uint32_t))) {}
    void fetch(int64_t) const {}
    F word_of(int i) const {
      return broadcast_word(static_cast<const char*>(*column) + offset + 4 * i);
    }
    void advance() { ++column; }
  };

  struct RightPanel {
    const float* words;

    F vector(int v) const { return V::load(words + v * V::kWidth); }
    void advance() { words += kNr; }
  };

  // The first tile to use a panel packs it on the way.
  struct RightColumns {
    const void* const* column;
    float* panel;

    F vector(int v) const {
      const F words = V::load(static_cast<const float*>(*column) + v * V::kWidth);
      V::store(panel + v * V::kWidth, words);
      return words;
    }
    void advance() {
      ++column;
      panel += kNr;
    }
  };

  // Where a tile's sums go, and what is fetched meanwhile.
  struct Tile {
    int64_t words;
    SumTarget sums;
    Fetcher* fetcher;
  };

  template <int kRows, int kCols, typename Left, typename Right>
  static void multiply_tile(const Tile& tile, Left left, Right right) {
    // Every loop over rows and vectors must be unrolled, or the sums would live in memory.
    F sums[kRows][kCols];
    const SumTarget& target = tile.sums;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kCols; ++v) sums[i][v] = V::zero();
      if (target.mode == TileMode::store || target.mode == TileMode::add)
        __builtin_prefetch(static_cast<float*>(target.c) + i * target.ldc, 1);
    }
    for (int64_t begin = 0; begin < tile.words; begin += kLineWords) {
      left.fetch(begin);
      tile.fetcher->fetch();
      const int64_t words = tile.words - begin < kLineWords ? tile.words - begin : kLineWords;
#pragma GCC unroll 4
      for (int64_t w = 0; w < words; ++w) {
        F columns[kCols];
#pragma GCC unroll 4
        for (int v = 0; v < kCols; ++v) columns[v] = right.vector(v);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const F row = left.word_of(i);
#pragma GCC unroll 4
          for (int v = 0; v < kCols; ++v)
            sums[i][v] = Product::multiply_add(row, columns[v], sums[i][v]);
        }
        left.advance();
        right.advance();
      }
    }
    put_sums<V>(target, sums);
  }

  // Rows i .. i + kRows of the left operand, however they are given.
  template <int kRows, int kCols, typename Right>
  static void multiply_tile_at(const BlockArgs& args, int64_t i, const Tile& tile, Right right) {
    if constexpr (Product::kPerWord == 1) {
      if (args.a_columns != nullptr)
        return multiply_tile<kRows, kCols>(tile, LeftColumns<kRows>(args, i), right);
    }
    multiply_tile<kRows, kCols>(tile, LeftRows<kRows>(args, i), right);
  }

  // Calls multiply_tile_at<rows, kCols>, 1 <= rows <= kRows.
  template <int kRows, int kCols, typename Right>
  static void multiply_rows(const BlockArgs& args, int64_t i, const Tile& tile, Right right) {
    if constexpr (kRows > 1) {
      if (args.rows - i < kRows) return multiply_rows<kRows - 1, kCols>(args, i, tile, right);
    }
    multiply_tile_at<kRows, kCols>(args, i, tile, right);
  }

  // One panel of columns, of which kCols vectors are wanted.
  template <int kCols>
  static void multiply_panel(const BlockArgs& args, uint32_t* b, int64_t j, Fetcher& fetcher) {
    float* const panel = reinterpret_cast<float*>(b);
    for (int64_t i = 0; i < args.rows; i += kMr) {
      char* const c = static_cast<char*>(args.c) + (i * args.ldc + j) * bytes_of_sum(args.mode);
      const Tile tile = {args.words, {c, args.ldc, args.mode}, &fetcher};
      if constexpr (Product::kPerWord == 1 && kCols == kVectors) {
        if (i == 0 && args.b_columns != nullptr) {
          multiply_rows<kMr, kCols>(args, i, tile, RightColumns{args.b_columns, panel});
          continue;
        }
      }
      multiply_rows<kMr, kCols>(args, i, tile, RightPanel{panel});
    }
  }

  // Calls multiply_panel<vectors>, 1 <= vectors <= kCols.
  template <int kCols>
  static void multiply_vectors(const BlockArgs& args, uint32_t* b, int64_t j, Fetcher& fetcher) {
    if constexpr (kCols > 1) {
      if (args.cols - j <= (kCols - 1) * V::kWidth)
        return multiply_vectors<kCols - 1>(args, b, j, fetcher);
    }
    multiply_panel<kCols>(args, b, j, fetcher);
  }

  static void multiply(const BlockArgs& args) {
    const int64_t tiles = (args.rows + kMr - 1) / kMr * ((args.cols + kNr - 1) / kNr);
    Fetcher fetcher(args.next, tiles * ((args.words + kLineWords - 1) / kLineWords));
    uint32_t* b = args.b;
    for (int64_t j = 0; j < args.cols; j += kNr, b += args.b_panel_stride)
      multiply_vectors<kVectors>(args, b, j, fetcher);
    V::order_stores();
  }

  static constexpr GemmKernels kernels() {
    GemmKernels result = {};
    result.mr = kMr;
    result.nr = kNr;
    result.k_block = 512 * Product::kPerWord;
    static_assert(512 * Product::kPerWord <= kMaxBlockK, "callers' tables would be too short");
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
    result.left_rows = Taken::packed_or_in_place;
    result.columns = Product::kPerWord == 1 ? Taken::packed_or_in_place : Taken::packed;
    result.multiply = multiply;
    return result;
  }
};

}  // namespace
}  // namespace penstock::cpu::fast
