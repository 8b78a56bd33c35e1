// SPDX-License-Identifier: Apache-2.0
//
// Asks the compiler's run-time support, which also checks that the operating system saves the
// registers concerned.
#include "backends/cpu/fast/isa.h"

namespace penstock::cpu::fast {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

#if defined(__x86_64__)

bool is_supported(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return has_avx2();
    case Isa::avx512:
      return has_avx512();
    case Isa::avx512_bf16:
      return has_avx512_bf16();
  }
  return false;
}

const IsaKernels& kernels_of(Isa isa) {
  switch (isa) {
    case Isa::portable:
      break;
    case Isa::avx2:
      return avx2_kernels();
    case Isa::avx512:
      return avx512_kernels();
    case Isa::avx512_bf16:
      return avx512_bf16_kernels();
  }
  return portable_kernels();
}

#else

bool is_supported(Isa isa) { return isa == Isa::portable; }

const IsaKernels& kernels_of(Isa) { return portable_kernels(); }

#endif

std::vector<Isa> supported_isas() {
  std::vector<Isa> result;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
    if (is_supported(isa)) result.push_back(isa);
  return result;
}

Isa best_isa() {
  static const Isa best = supported_isas().back();
  return best;
}

Element element_of(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return Element::bf16;
    case DType::float16:
      return Element::f16;
    default:
      return Element::f32;
  }
}

}  // namespace penstock::cpu::fast
