// SPDX-License-Identifier: Apache-2.0
//
// The product of packed bf16 blocks on a processor with matrix tiles: 32 x 32 sums in four tiles
// of 16 x 16, two tiles of each operand, 16 words (32 elements of k) a step. `Tiles` holds the
// eight tile registers; the tests run the same code on an emulation of them.
//
// The left operand's panels are row-major inside a step, [step][row][16 words], as the hardware
// wants them; the right one's are the pair panels of isa/pack.h. Both are filled up with zeros to
// whole steps. An element's chain of operations is the same wherever it sits, as in isa/gemm.h.
#pragma once

#include "backends/cpu/fast/isa/kernels.h"
#include "backends/cpu/fast/isa/pack.h"
#include "backends/cpu/fast/isa/sums.h"

namespace penstock::cpu::fast {
namespace {

inline constexpr int kTileSide = 16;                          // rows, columns and words of a tile
inline constexpr int kAmxPanel = 2 * kTileSide;               // rows or columns of a panel
inline constexpr int64_t kStepWords = kAmxPanel * kTileSide;  // of a panel, in one step of k

constexpr int64_t whole_steps(int64_t words) {
  return (words + kTileSide - 1) / kTileSide * kTileSide;
}

// Packs left operands.
template <typename V>
struct RowPacker {
  using Pairs = Packer<V, WordsBf16Pairs<V>, kAmxPanel>;
  using Padded = typename Pairs::Padded;
  using Octet = typename V::Octet;

  // Eight words of row `o` from word `w`.
  static uint32_t* at(uint32_t* panel, int64_t o, int64_t w) {
    return panel + w / kTileSide * kStepWords + o * kTileSide + w % kTileSide;
  }

  static void pack_along_k(const PackArgs& args, int64_t words) {
    for (int64_t o = 0; o < args.outer_count; ++o) {
      uint32_t* panel = args.panels + o / kAmxPanel * args.panel_stride;
      const uint16_t* row = Pairs::outer_at(args, o);
      for (int64_t w = 0; w < words; w += 8) {
        const int64_t left = args.k_count - 2 * w;
        uint32_t* to = at(panel, o % kAmxPanel, w);
        if (left >= 16 && args.k_stride == 1) {
          V::put(to, V::octet_words(row + 2 * w));
        } else {
          const int64_t count = left < 0 ? 0 : (left < 16 ? left : 16);
          const Padded padded(row + 2 * w * args.k_stride, args.k_stride, count);
          V::put(to, V::octet_words(padded.element));
        }
      }
    }
  }

  // Word w of rows o .. o + 8; zeros past the end of k.
  static Octet fetch_across(const PackArgs& args, int64_t o, int64_t w) {
    static constexpr uint16_t kZeros[8] = {};
    const int64_t left = args.outer_count - o;
    const int64_t count = left < 8 ? left : 8;
    if (2 * w >= args.k_count) return V::octet_pair(kZeros, kZeros);
    const uint16_t* low = Pairs::k_at(args, 2 * w) + o * args.outer_stride;
    if (2 * w + 1 >= args.k_count) {
      return V::octet_pair(Padded(low, args.outer_stride, count).element, kZeros);
    }
    const uint16_t* high = Pairs::k_at(args, 2 * w + 1) + o * args.outer_stride;
    if (count == 8 && args.outer_stride == 1) return V::octet_pair(low, high);
    const Padded padded_low(low, args.outer_stride, count);
    const Padded padded_high(high, args.outer_stride, count);
    return V::octet_pair(padded_low.element, padded_high.element);
  }

  static void pack_across(const PackArgs& args, int64_t words) {
    for (int64_t w = 0; w < words; w += 8) {
      for (int64_t o = 0; o < args.outer_count; o += 8) {
        Octet octets[8];
        for (int i = 0; i < 8; ++i) octets[i] = fetch_across(args, o, w + i);
        V::transpose(octets);
        uint32_t* panel = args.panels + o / kAmxPanel * args.panel_stride;
        for (int i = 0; i < 8; ++i) V::put(at(panel, o % kAmxPanel + i, w), octets[i]);
      }
    }
  }

  static void pack(const PackArgs& args) {
    const int64_t words = whole_steps((args.k_count + 1) / 2);
    if (Pairs::runs_along_k(args)) {
      pack_along_k(args, words);
    } else {
      pack_across(args, words);
    }
  }
};

// Packs right operands.
template <typename V>
void pack_whole_steps(const PackArgs& args) {
  pack_pairs<V, kAmxPanel>(args);
  const int64_t words = (args.k_count + 1) / 2;
  const int64_t missing = (whole_steps(words) - words) * kAmxPanel;
  uint32_t* panel = args.panels + words * kAmxPanel;
  for (int64_t o = 0; o < args.outer_count; o += kAmxPanel, panel += args.panel_stride)
    for (int64_t i = 0; i < missing; ++i) panel[i] = 0;
}

template <typename V, typename Tiles>
struct AmxGemm {
  using F = typename V::F;

  struct Panel {  // one panel of rows times one of columns
    const uint32_t* a;
    const uint32_t* b;
    int64_t words;
    int64_t rows;
    void* c;
    int64_t ldc;
    TileMode mode;
  };

  static void multiply_panel(const Panel& panel) {
    alignas(64) float sums[kAmxPanel * kAmxPanel];
    const uint32_t* a = panel.a;
    const uint32_t* b = panel.b;
    Tiles::zero();
    if (panel.rows > kTileSide) {
      for (int64_t w = 0; w < panel.words; w += kTileSide, a += kStepWords, b += kStepWords)
        Tiles::multiply_both(a, b);
      Tiles::store_both(sums);
    } else {
      for (int64_t w = 0; w < panel.words; w += kTileSide, a += kStepWords, b += kStepWords)
        Tiles::multiply_upper(a, b);
      Tiles::store_upper(sums);
    }
    for (int64_t i = 0; i < panel.rows; ++i) {
      for (int64_t j = 0; j < kAmxPanel; j += V::kWidth) {
        const F sum[1][1] = {{V::load(sums + i * kAmxPanel + j)}};
        char* const c = static_cast<char*>(panel.c);
        put_sums<V>({c + (i * panel.ldc + j) * bytes_of_sum(panel.mode), 0, panel.mode}, sum);
      }
    }
  }

  static void multiply(const BlockArgs& args) {
    Tiles::begin();
    const uint32_t* b = args.b;
    for (int64_t j = 0; j < args.cols; j += kAmxPanel, b += args.b_panel_stride) {
      const uint32_t* a = args.a;
      for (int64_t i = 0; i < args.rows; i += kAmxPanel, a += args.a_panel_stride) {
        const int64_t left = args.rows - i;
        const int64_t rows = left < kAmxPanel ? left : kAmxPanel;
        char* const c = static_cast<char*>(args.c) + (i * args.ldc + j) * bytes_of_sum(args.mode);
        multiply_panel({a, b, args.words, rows, c, args.ldc, args.mode});
      }
    }
    Tiles::end();
    V::order_stores();
  }

  static constexpr GemmKernels kernels() {
    GemmKernels result = {};
    result.mr = kAmxPanel;
    result.nr = kAmxPanel;
    result.k_block = 512;
    result.k_per_word = 2;
    result.word_unit = kTileSide;
    result.left_rows = Taken::packed;
    result.columns = Taken::packed;
    result.pack_a = RowPacker<V>::pack;
    result.pack_b = pack_whole_steps<V>;
    result.multiply = multiply;
    return result;
  }
};

}  // namespace
}  // namespace penstock::cpu::fast
