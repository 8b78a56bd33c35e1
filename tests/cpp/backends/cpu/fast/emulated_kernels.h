// SPDX-License-Identifier: Apache-2.0
//
// Kernel sets for instruction sets that the test machine may lack: the same templates (tile shapes,
// packing, tails, pairs, matrix tiles) over portable vectors of 16 floats and tiles in memory. What
// they leave untested is the handful of intrinsics in vec_avx512.h, avx512_bf16.cpp, amx_bf16.cpp.
#pragma once

#include "backends/cpu/fast/isa/kernels.h"

namespace penstock::cpu::fast_test {

const fast::IsaKernels& emulated_avx512_bf16();
const fast::IsaKernels& emulated_amx_bf16();

}  // namespace penstock::cpu::fast_test
