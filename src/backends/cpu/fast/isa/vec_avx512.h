// SPDX-License-Identifier: Apache-2.0
//
// Vectors of sixteen floats: AVX-512 F, BW, DQ and VL. See vec_portable.h for the interface.
#pragma once

#include "backends/cpu/fast/isa/vec_avx2.h"

namespace penstock::cpu::fast {
namespace {

struct Avx512Vec : Avx2Octets {
  static constexpr int kWidth = 16;
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef uint32_t U __attribute__((vector_size(64)));

  static F broadcast(float value) { return _mm512_set1_ps(value); }
  static F zero() { return F{}; }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  static void store_past_caches(float* to, F value) { _mm512_stream_ps(to, value); }
  static void order_stores() { _mm_sfence(); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static I round_to_int(F x) { return reinterpret_cast<I>(_mm512_cvtps_epi32(x)); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(x)); }

  static __m256i halves(const uint16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static F load_bf16(const uint16_t* from) {
    return reinterpret_cast<F>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(from)), 16));
  }
  // Integer form: the bf16 conversion instruction would flush subnormals.
  static __m256i round_to_bf16(F value) {
    const U bits = reinterpret_cast<U>(value);
    const U rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const U result = value == value ? rounded : (bits >> 16 | 0x40u);
    return _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(result));
  }
  static void store_bf16(uint16_t* to, F value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round_to_bf16(value));
  }
  static void store_bf16_past_caches(uint16_t* to, F value) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), round_to_bf16(value));
  }
  static F load_f16(const uint16_t* from) { return _mm512_cvtph_ps(halves(from)); }
  static void store_f16(uint16_t* to, F value) {
    const __m256i words = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
  }
};

}  // namespace
}  // namespace penstock::cpu::fast
