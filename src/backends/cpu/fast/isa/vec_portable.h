// SPDX-License-Identifier: Apache-2.0
//
// Vectors of kWidth floats in the compiler's own vector types: whatever the baseline instruction
// set offers. Products and sums round separately, so results are the same on every machine that
// runs this. The interface that every vec_*.h has; tests also use it with other widths, to run
// the tile shapes of instruction sets that the machine lacks.
//
// Including files define the namespace they want the type in; it must be unnamed (see kernels.h).
#pragma once

#include <cstdint>

namespace penstock::cpu::fast {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Read as a float the exponent is short by 112: one exact product puts that right, also for
  // subnormals.
  return bits_to_float(sign | magnitude << 13) * 0x1p112f;
}

inline uint16_t float_to_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // adding 0.5 leaves the subnormal's bits, rounded, at the bottom
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

template <int kLanes>
struct VectorTypes;

template <>
struct VectorTypes<4> {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
};

template <>
struct VectorTypes<16> {
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef uint32_t U __attribute__((vector_size(64)));
};

template <int kLanes>
struct PortableVec {
  static constexpr int kWidth = kLanes;
  using F = typename VectorTypes<kLanes>::F;
  using I = typename VectorTypes<kLanes>::I;
  using U = typename VectorTypes<kLanes>::U;

  static F broadcast(float value) {
    F result = {};
    for (int i = 0; i < kLanes; ++i) result[i] = value;
    return result;
  }
  static F zero() { return F{}; }
  static F load(const float* from) {
    F result = {};
    __builtin_memcpy(&result, from, sizeof result);
    return result;
  }
  static void store(float* to, F value) { __builtin_memcpy(to, &value, sizeof value); }

  static void store_past_caches(float* to, F value) { store(to, value); }
  static void order_stores() {}
  static F fma(F a, F b, F c) { return a * b + c; }
  static I round_to_int(F x) {
    // 1.5 * 2^23 has a unit in the last place of 1: adding it rounds to nearest even.
    const F magic = broadcast(0x1.8p23f);
    return reinterpret_cast<I>(x + magic) - reinterpret_cast<I>(magic);
  }
  static F to_float(I x) { return __builtin_convertvector(x, F); }

  static F load_bf16(const uint16_t* from) {
    U bits = {};
    for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<uint32_t>(from[i]) << 16;
    return reinterpret_cast<F>(bits);
  }
  static void store_bf16(uint16_t* to, F value) {
    const U bits = reinterpret_cast<U>(value);
    const U rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const U quiet = bits >> 16 | 0x40u;
    const U result = value == value ? rounded : quiet;
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint16_t>(result[i]);
  }
  static void store_bf16_past_caches(uint16_t* to, F value) { store_bf16(to, value); }
  static F load_f16(const uint16_t* from) {
    F result = {};
    for (int i = 0; i < kLanes; ++i) result[i] = f16_to_float(from[i]);
    return result;
  }
  static void store_f16(uint16_t* to, F value) {
    for (int i = 0; i < kLanes; ++i) to[i] = float_to_f16(value[i]);
  }

  // Eight 32-bit words, what packing moves at a time.
  struct Octet {
    uint32_t word[8];
  };
  static Octet octet_words(const void* from) {
    Octet result;
    __builtin_memcpy(&result, from, sizeof result);
    return result;
  }
  static Octet octet_bf16(const uint16_t* from) {
    Octet result;
    for (int i = 0; i < 8; ++i) result.word[i] = static_cast<uint32_t>(from[i]) << 16;
    return result;
  }
  static Octet octet_f16(const uint16_t* from) {
    Octet result;
    for (int i = 0; i < 8; ++i) result.word[i] = float_to_bits(f16_to_float(from[i]));
    return result;
  }
  // Word i is the pair (low[i], high[i]).
  static Octet octet_pair(const uint16_t* low, const uint16_t* high) {
    Octet result;
    for (int i = 0; i < 8; ++i) {
      result.word[i] = static_cast<uint32_t>(low[i]) | static_cast<uint32_t>(high[i]) << 16;
    }
    return result;
  }
  static void put(uint32_t* to, const Octet& octet) { __builtin_memcpy(to, &octet, sizeof octet); }
  static void transpose(Octet (&rows)[8]) {
    for (int i = 0; i < 8; ++i) {
      for (int j = i + 1; j < 8; ++j) {
        const uint32_t held = rows[i].word[j];
        rows[i].word[j] = rows[j].word[i];
        rows[j].word[i] = held;
      }
    }
  }
};

// A word is a pair of bf16: two exact products, added one after the other. What the AVX-512 BF16
// instruction does, up to the order within a pair and subnormals; for tests of that tile's logic.
template <typename V>
struct EmulatedPairProduct {
  using F = typename V::F;
  using U = typename V::U;
  static constexpr int kPerWord = 2;
  static F low(F pair) { return reinterpret_cast<F>(reinterpret_cast<U>(pair) << 16); }
  static F high(F pair) { return reinterpret_cast<F>(reinterpret_cast<U>(pair) & 0xffff0000u); }
  static F multiply_add(F a, F b, F c) {
    return V::fma(high(a), high(b), V::fma(low(a), low(b), c));
  }
};

}  // namespace
}  // namespace penstock::cpu::fast
