// SPDX-License-Identifier: Apache-2.0
//
// Kernels for AVX-512 with BF16: as avx512.cpp, and products of bf16 pairs at twice the rate. The
// instruction flushes subnormal inputs and sums to 0; everything else rounds as usual.
#include "backends/cpu/fast/isa/gemm.h"
#include "backends/cpu/fast/isa/rows.h"
#include "backends/cpu/fast/isa/vec_avx512.h"

namespace penstock::cpu::fast {
namespace {

struct Bf16PairProduct {
  using F = Avx512Vec::F;
  static constexpr int kPerWord = 2;
  static F multiply_add(F a, F b, F c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

}  // namespace

const IsaKernels& avx512_bf16_kernels() {
  using V = Avx512Vec;
  static constexpr IsaKernels kernels = {Gemm<V, FloatProduct<V>, 6, 4>::kernels(),
                                         Gemm<V, Bf16PairProduct, 6, 4>::kernels(),
                                         Rows<V>::kernels()};
  return kernels;
}

}  // namespace penstock::cpu::fast
