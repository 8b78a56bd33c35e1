// SPDX-License-Identifier: Apache-2.0
//
// Kernels for AVX-512 F, BW, DQ, VL. 6 x 64 tiles: 24 of 32 registers accumulate.
#include "backends/cpu/fast/isa/gemm.h"
#include "backends/cpu/fast/isa/rows.h"
#include "backends/cpu/fast/isa/vec_avx512.h"

namespace penstock::cpu::fast {

const IsaKernels& avx512_kernels() {
  using V = Avx512Vec;
  static constexpr IsaKernels kernels = {
      Gemm<V, FloatProduct<V>, 6, 4>::kernels(), {}, Rows<V>::kernels()};
  return kernels;
}

}  // namespace penstock::cpu::fast
