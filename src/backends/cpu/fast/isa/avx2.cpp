// SPDX-License-Identifier: Apache-2.0
//
// Kernels for AVX2, FMA and F16C. 6 x 16 tiles: 12 of 16 registers accumulate, enough to cover
// the latency of two multiply-adds a cycle.
#include "backends/cpu/fast/isa/gemm.h"
#include "backends/cpu/fast/isa/rows.h"
#include "backends/cpu/fast/isa/vec_avx2.h"

namespace penstock::cpu::fast {

const IsaKernels& avx2_kernels() {
  using V = Avx2Vec;
  static constexpr IsaKernels kernels = {Gemm<V, FloatProduct<V>, 6, 2>::kernels(), {},
                                         Rows<V>::kernels()};
  return kernels;
}

}  // namespace penstock::cpu::fast
