// SPDX-License-Identifier: Apache-2.0
//
// Packing: one block of an operand (see PackArgs) into panels of kPanel outer elements. Eight
// words are moved at a time along whichever axis is closer to contiguous: along k, eight outer
// elements are transposed; along the outer axis, words are copied. Gathering by an index costs
// nothing extra on either axis; neither does widening bf16 and fp16.
//
// A panel's rows are stored eight words wide whatever kPanel is: what spills over is overwritten
// by the next row of the same panel, and past the last one lies a_/b_panel_spill.
#pragma once

#include "backends/cpu/fast/isa/kernels.h"

namespace penstock::cpu::fast {
namespace {

// How eight words come from memory, for each element type and word kind.
template <typename V>
struct WordsF32 {
  using Elem = float;
  static constexpr int kPerWord = 1;
  static typename V::Octet along_k(const Elem* from) { return V::octet_words(from); }
  static typename V::Octet across(const Elem* from, const Elem*) { return V::octet_words(from); }
};

template <typename V>
struct WordsBf16Widened {
  using Elem = uint16_t;
  static constexpr int kPerWord = 1;
  static typename V::Octet along_k(const Elem* from) { return V::octet_bf16(from); }
  static typename V::Octet across(const Elem* from, const Elem*) { return V::octet_bf16(from); }
};

template <typename V>
struct WordsF16Widened {
  using Elem = uint16_t;
  static constexpr int kPerWord = 1;
  static typename V::Octet along_k(const Elem* from) { return V::octet_f16(from); }
  static typename V::Octet across(const Elem* from, const Elem*) { return V::octet_f16(from); }
};

template <typename V>
struct WordsBf16Pairs {
  using Elem = uint16_t;
  static constexpr int kPerWord = 2;
  static typename V::Octet along_k(const Elem* from) { return V::octet_words(from); }
  static typename V::Octet across(const Elem* low, const Elem* high) {
    return V::octet_pair(low, high);
  }
};

template <typename V, typename Words, int kPanel>
struct Packer {
  using Elem = typename Words::Elem;
  using Octet = typename V::Octet;
  static constexpr int kGroups = (kPanel + 7) / 8;
  static constexpr int kSpan = 8 * Words::kPerWord;  // elements of k in an octet along k
  static constexpr int64_t kLineElements = 64 / static_cast<int64_t>(sizeof(Elem));
  static constexpr int64_t kLineWords = kLineElements / Words::kPerWord;
  static constexpr Elem kZeros[1] = {};  // stands for the partner of the last k of an odd count

  static const Elem* outer_at(const PackArgs& args, int64_t o) {
    const int64_t index = args.outer_index != nullptr ? args.outer_index[o] : o;
    return static_cast<const Elem*>(args.base) + index * args.outer_stride;
  }
  static const Elem* k_at(const PackArgs& args, int64_t k) {
    const int64_t index = args.k_index != nullptr ? args.k_index[k] : k;
    return static_cast<const Elem*>(args.base) + index * args.k_stride;
  }

  // `count` elements at `stride`, padded with zeros to a whole octet.
  struct Padded {
    Elem element[16] = {};
    Padded(const Elem* from, int64_t stride, int64_t count) {
      for (int64_t i = 0; i < count; ++i) element[i] = from[i * stride];
    }
  };

  // Words w .. w + 8 of eight rows, the last ones perhaps short, into `to` and its next rows.
  static void transpose_ragged(const PackArgs& args, const Elem* const* rows, int64_t w,
                               uint32_t* to) {
    const int64_t left = args.k_count - w * Words::kPerWord;
    const int64_t count = left < kSpan ? left : kSpan;
    const int64_t words = (count + Words::kPerWord - 1) / Words::kPerWord;
    Octet octets[8];
    for (int i = 0; i < 8; ++i) {
      const Elem* from = rows[i] + w * Words::kPerWord * args.k_stride;
      octets[i] = Words::along_k(Padded(from, args.k_stride, count).element);
    }
    V::transpose(octets);
    for (int64_t step = 0; step < words; ++step) V::put(to + step * kPanel, octets[step]);
  }

  static void transpose_full(const Elem* const* rows, int64_t w, uint32_t* to) {
    Octet octets[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) octets[i] = Words::along_k(rows[i] + w * Words::kPerWord);
    V::transpose(octets);
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) V::put(to + step * kPanel, octets[step]);
  }

  // Eight rows at a time, transposed. Absent rows repeat the first: their lanes are not used.
  static void pack_along_k(const PackArgs& args) {
    const int64_t words = (args.k_count + Words::kPerWord - 1) / Words::kPerWord;
    const int64_t full_words = args.k_stride == 1 ? args.k_count / Words::kPerWord : 0;
    uint32_t* panel = args.panels;
    for (int64_t o = 0; o < args.outer_count; o += kPanel, panel += args.panel_stride) {
      const Elem* rows[kGroups * 8];
      for (int i = 0; i < kGroups * 8; ++i) {
        const bool inside = i < kPanel && o + i < args.outer_count;
        rows[i] = outer_at(args, inside ? o + i : o);
      }
      // The next panel's rows, which the hardware cannot foresee.
      const Elem* ahead[kPanel];
      for (int i = 0; i < kPanel; ++i)
        ahead[i] = o + kPanel + i < args.outer_count ? outer_at(args, o + kPanel + i) : rows[0];
      // A cache line of each row at a time. The last group first: what it spills into the next
      // row of the panel is written again by group 0.
      for (int64_t begin = 0; begin < words; begin += kLineWords) {
        for (int i = 0; i < kPanel; ++i)
          __builtin_prefetch(ahead[i] + begin * Words::kPerWord * args.k_stride);
        const int64_t end = begin + kLineWords < words ? begin + kLineWords : words;
        for (int group = kGroups - 1; group >= 0; --group) {
          uint32_t* to = panel + group * 8;
          for (int64_t w = begin; w < end; w += 8) {
            if (w + 8 <= full_words) {
              transpose_full(rows + group * 8, w, to + w * kPanel);
            } else {
              transpose_ragged(args, rows + group * 8, w, to + w * kPanel);
            }
          }
        }
      }
    }
  }

  // One row of a panel at its ragged end, or of an operand with a stride along the outer axis.
  static void put_ragged(const PackArgs& args, const Elem* low, const Elem* high, int64_t o,
                         uint32_t* to) {
    for (int group = kGroups - 1; group >= 0; --group) {
      const int64_t first = o + group * 8;
      const int64_t left = args.outer_count - first;
      if (left <= 0) continue;
      const int64_t count = left < 8 ? left : 8;
      const int64_t stride = args.outer_stride;
      const Padded padded_low(low + first * stride, stride, count);
      const Padded padded_high(high + (high == kZeros ? 0 : first * stride),
                               high == kZeros ? 0 : stride, count);
      V::put(to + group * 8, Words::across(padded_low.element, padded_high.element));
    }
  }

  static void put_full(const Elem* low, const Elem* high, int64_t o, uint32_t* to) {
#pragma GCC unroll 4
    for (int group = kGroups - 1; group >= 0; --group)
      V::put(to + group * 8, Words::across(low + o + group * 8, high + o + group * 8));
  }

  // A few words of k at a time, for all panels: memory is read in long runs, and a panel's lines
  // are filled while they are in the first cache.
  static void pack_across(const PackArgs& args) {
    constexpr int64_t kSteps = 8;
    const int64_t words = (args.k_count + Words::kPerWord - 1) / Words::kPerWord;
    for (int64_t begin = 0; begin < words; begin += kSteps) {
      const int64_t steps = words - begin < kSteps ? words - begin : kSteps;
      const Elem* low[kSteps];
      const Elem* high[kSteps];
      const Elem* ahead[kSteps];
      for (int64_t step = 0; step < kSteps; ++step) {
        const int64_t k = (begin + kSteps + step) * Words::kPerWord;
        ahead[step] = k_at(args, k < args.k_count ? k : 0);
      }
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t k = (begin + step) * Words::kPerWord;
        low[step] = k_at(args, k);
        high[step] = low[step];
        if (Words::kPerWord == 2) high[step] = k + 1 < args.k_count ? k_at(args, k + 1) : kZeros;
      }
      const bool whole = args.outer_stride == 1 && high[steps - 1] != kZeros;
      uint32_t* panel = args.panels + begin * kPanel;
      for (int64_t o = 0; o < args.outer_count; o += kPanel, panel += args.panel_stride) {
        for (int64_t step = 0; step < kSteps; ++step) {
          for (int64_t line = 0; line < kPanel; line += kLineElements)
            __builtin_prefetch(ahead[step] + (o + line) * args.outer_stride);
        }
        if (whole && steps == kSteps && o + kGroups * 8 <= args.outer_count) {
#pragma GCC unroll 8
          for (int64_t step = 0; step < kSteps; ++step)
            put_full(low[step], high[step], o, panel + step * kPanel);
        } else if (whole && o + kGroups * 8 <= args.outer_count) {
          for (int64_t step = 0; step < steps; ++step)
            put_full(low[step], high[step], o, panel + step * kPanel);
        } else {
          for (int64_t step = 0; step < steps; ++step)
            put_ragged(args, low[step], high[step], o, panel + step * kPanel);
        }
      }
    }
  }

  // Whichever axis is not gathered and closer to contiguous.
  static bool runs_along_k(const PackArgs& args) {
    if (args.outer_index != nullptr) return true;
    return args.k_index == nullptr && args.k_stride <= args.outer_stride;
  }

  static void pack(const PackArgs& args) {
    if (runs_along_k(args)) {
      pack_along_k(args);
    } else {
      pack_across(args);
    }
  }
};

template <typename V, int kPanel>
void pack_floats(const PackArgs& args) {
  switch (args.type) {
    case Element::f32:
      return Packer<V, WordsF32<V>, kPanel>::pack(args);
    case Element::bf16:
      return Packer<V, WordsBf16Widened<V>, kPanel>::pack(args);
    case Element::f16:
      return Packer<V, WordsF16Widened<V>, kPanel>::pack(args);
  }
}

template <typename V, int kPanel>
void pack_pairs(const PackArgs& args) {
  Packer<V, WordsBf16Pairs<V>, kPanel>::pack(args);
}

}  // namespace
}  // namespace penstock::cpu::fast
