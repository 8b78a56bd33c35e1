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

  static Octet fetch_along_k(const PackArgs& args, const Elem* row, int64_t k) {
    const int64_t left = args.k_count - k;
    if (args.k_stride == 1 && left >= kSpan) return Words::along_k(row + k);
    const int64_t count = left < kSpan ? left : kSpan;
    return Words::along_k(Padded(row + k * args.k_stride, args.k_stride, count).element);
  }

  // Eight rows at a time, transposed. Absent rows repeat row 0: their lanes are not used.
  static void pack_along_k(const PackArgs& args) {
    const int64_t words = (args.k_count + Words::kPerWord - 1) / Words::kPerWord;
    uint32_t* panel = args.panels;
    for (int64_t o = 0; o < args.outer_count; o += kPanel, panel += args.panel_stride) {
      const Elem* rows[kGroups * 8];
      for (int i = 0; i < kGroups * 8; ++i) {
        const bool inside = i < kPanel && o + i < args.outer_count;
        rows[i] = outer_at(args, inside ? o + i : o);
      }
      for (int64_t w = 0; w < words; w += 8) {
        const int64_t steps = words - w < 8 ? words - w : 8;
        // The last group first: what it spills into the next row is written again by group 0.
        for (int group = kGroups - 1; group >= 0; --group) {
          Octet octets[8];
          for (int i = 0; i < 8; ++i)
            octets[i] = fetch_along_k(args, rows[group * 8 + i], w * Words::kPerWord);
          V::transpose(octets);
          uint32_t* to = panel + w * kPanel + group * 8;
          for (int64_t step = 0; step < steps; ++step) V::put(to + step * kPanel, octets[step]);
        }
      }
    }
  }

  static Octet fetch_across(const PackArgs& args, const Elem* low, const Elem* high, int64_t o) {
    const int64_t left = args.outer_count - o;
    if (args.outer_stride == 1 && left >= 8) return Words::across(low + o, high + o);
    const int64_t count = left < 8 ? left : 8;
    const int64_t offset = o * args.outer_stride;
    const Padded padded_low(low + offset, args.outer_stride, count);
    const Padded padded_high(high + offset, args.outer_stride, count);
    return Words::across(padded_low.element, padded_high.element);
  }

  // Word by word of k: all panels of one k are read in one sweep of memory.
  static void pack_across(const PackArgs& args) {
    const Elem zeros[1] = {};
    PackArgs row = args;
    uint32_t* to = args.panels;
    for (int64_t k = 0; k < args.k_count; k += Words::kPerWord, to += kPanel) {
      const Elem* low = k_at(args, k);
      const bool paired = Words::kPerWord == 1 || k + 1 < args.k_count;
      if (!paired) return pack_last_half(args, low, zeros, to);
      const Elem* high = Words::kPerWord == 1 ? low : k_at(args, k + 1);
      uint32_t* panel = to;
      for (int64_t o = 0; o < args.outer_count; o += kPanel, panel += args.panel_stride)
        for (int group = kGroups - 1; group >= 0; --group)
          if (o + group * 8 < args.outer_count)
            V::put(panel + group * 8, fetch_across(row, low, high, o + group * 8));
    }
  }

  // The last k of an odd count: its partner is 0.
  static void pack_last_half(const PackArgs& args, const Elem* low, const Elem* zeros,
                             uint32_t* to) {
    for (int64_t o = 0; o < args.outer_count; o += kPanel, to += args.panel_stride) {
      for (int group = kGroups - 1; group >= 0; --group) {
        const int64_t first = o + group * 8;
        if (first >= args.outer_count) continue;
        const int64_t left = args.outer_count - first;
        const int64_t count = left < 8 ? left : 8;
        const Padded padded(low + first * args.outer_stride, args.outer_stride, count);
        const Padded nothing(zeros, 0, 1);
        V::put(to + group * 8, Words::across(padded.element, nothing.element));
      }
    }
  }

  static void pack(const PackArgs& args) {
    const bool along_k = args.outer_index != nullptr ||
                         (args.k_index == nullptr && args.k_stride <= args.outer_stride);
    if (along_k) {
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
