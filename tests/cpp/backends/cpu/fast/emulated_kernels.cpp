// SPDX-License-Identifier: Apache-2.0
//
// See emulated_kernels.h.
#include "emulated_kernels.h"

#include "backends/cpu/fast/isa/amx.h"
#include "backends/cpu/fast/isa/gemm.h"
#include "backends/cpu/fast/isa/rows.h"
#include "backends/cpu/fast/isa/vec_portable.h"

namespace penstock::cpu::fast {
namespace {

// The sums of AmxTiles, with what its tile instructions do to them.
struct EmulatedTiles {
  static inline thread_local float sums[kAmxPanel][kAmxPanel];

  static void begin() {}
  static void end() {}
  static void zero() { __builtin_memset(sums, 0, sizeof sums); }
  static void multiply_rows(const uint32_t* a, const uint32_t* b, int rows) {
    for (int i = 0; i < rows; ++i) {
      for (int w = 0; w < kTileSide; ++w) {
        const uint32_t pair = a[i * kTileSide + w];
        const float low = bits_to_float(pair << 16), high = bits_to_float(pair & 0xffff0000u);
        for (int j = 0; j < kAmxPanel; ++j) {
          const uint32_t other = b[w * kAmxPanel + j];
          sums[i][j] += low * bits_to_float(other << 16);
          sums[i][j] += high * bits_to_float(other & 0xffff0000u);
        }
      }
    }
  }
  static void multiply_upper(const uint32_t* a, const uint32_t* b) {
    multiply_rows(a, b, kTileSide);
  }
  static void multiply_both(const uint32_t* a, const uint32_t* b) {
    multiply_rows(a, b, kAmxPanel);
  }
  static void store_upper(float* to) { __builtin_memcpy(to, sums, sizeof sums / 2); }
  static void store_both(float* to) { __builtin_memcpy(to, sums, sizeof sums); }
};

using V = PortableVec<16>;

}  // namespace
}  // namespace penstock::cpu::fast

namespace penstock::cpu::fast_test {

const fast::IsaKernels& emulated_avx512_bf16() {
  using namespace fast;
  static constexpr IsaKernels kernels = {Gemm<V, FloatProduct<V>, 6, 4>::kernels(),
                                         Gemm<V, EmulatedPairProduct<V>, 6, 4>::kernels(),
                                         Rows<V>::kernels()};
  return kernels;
}

const fast::IsaKernels& emulated_amx_bf16() {
  using namespace fast;
  static constexpr IsaKernels kernels = {Gemm<V, FloatProduct<V>, 6, 4>::kernels(),
                                         AmxGemm<V, EmulatedTiles>::kernels(), Rows<V>::kernels()};
  return kernels;
}

}  // namespace penstock::cpu::fast_test
