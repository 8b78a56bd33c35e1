// SPDX-License-Identifier: Apache-2.0
//
// Kernels for the baseline of whatever processor this is built for.
#include "backends/cpu/fast/isa/gemm.h"
#include "backends/cpu/fast/isa/rows.h"
#include "backends/cpu/fast/isa/vec_portable.h"

namespace penstock::cpu::fast {

const IsaKernels& portable_kernels() {
  using V = PortableVec<4>;
  static constexpr IsaKernels kernels = {Gemm<V, FloatProduct<V>, 4, 2>::kernels(), {},
                                         Rows<V>::kernels()};
  return kernels;
}

}  // namespace penstock::cpu::fast
