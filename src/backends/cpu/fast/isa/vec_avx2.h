// SPDX-License-Identifier: Apache-2.0
//
// Vectors of eight floats: AVX2, FMA and F16C. See vec_portable.h for the interface. The packing
// primitives (Octet) serve the AVX-512 files too.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace penstock::cpu::fast {
namespace {

struct Avx2Octets {
  using Octet = __m256i;
  static Octet octet_words(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static Octet octet_bf16(const uint16_t* from) {
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(half_octet(from)), 16);
  }
  static Octet octet_f16(const uint16_t* from) {
    return _mm256_castps_si256(_mm256_cvtph_ps(half_octet(from)));
  }
  static Octet octet_pair(const uint16_t* low, const uint16_t* high) {
    const __m256i upper = _mm256_slli_epi32(_mm256_cvtepu16_epi32(half_octet(high)), 16);
    return _mm256_or_si256(_mm256_cvtepu16_epi32(half_octet(low)), upper);
  }
  static void put(uint32_t* to, Octet octet) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), octet);
  }
  static __m128i half_octet(const uint16_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }

  // Pairs of rows, then quarters, then halves change places.
  static void transpose(Octet (&rows)[8]) {
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    __m256i q[8];
    for (int i = 0; i < 8; i += 4) {
      q[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      q[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      q[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      q[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2x128_si256(q[i], q[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2x128_si256(q[i], q[i + 4], 0x31);
    }
  }
};

struct Avx2Vec : Avx2Octets {
  static constexpr int kWidth = 8;
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));

  static F broadcast(float value) { return _mm256_set1_ps(value); }
  static F zero() { return F{}; }
  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
  static void store_past_caches(float* to, F value) { _mm256_stream_ps(to, value); }
  static void order_stores() { _mm_sfence(); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static I round_to_int(F x) { return reinterpret_cast<I>(_mm256_cvtps_epi32(x)); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(x)); }

  static F load_bf16(const uint16_t* from) { return reinterpret_cast<F>(octet_bf16(from)); }
  static __m128i round_to_bf16(F value) {
    const U bits = reinterpret_cast<U>(value);
    const U rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const U result = value == value ? rounded : (bits >> 16 | 0x40u);
    const __m256i words = reinterpret_cast<__m256i>(result);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  static void store_bf16(uint16_t* to, F value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), round_to_bf16(value));
  }
  static void store_bf16_past_caches(uint16_t* to, F value) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), round_to_bf16(value));
  }
  static F load_f16(const uint16_t* from) { return _mm256_cvtph_ps(half_octet(from)); }
  static void store_f16(uint16_t* to, F value) {
    const __m128i halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  }
};

}  // namespace
}  // namespace penstock::cpu::fast
