// SPDX-License-Identifier: Apache-2.0
//
// Asks the compiler's run-time support, which also checks that the operating system saves the
// registers concerned.
#include "backends/cpu/fast/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

uint64_t extended_state() {
  uint32_t low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Tile data is a large state: Linux wants to be asked for it, once a process.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx_bf16() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles_and_bf16 = (d >> 24 & 1) != 0 && (d >> 22 & 1) != 0;
  constexpr uint64_t kTileState = uint64_t{3} << 17;
  return tiles_and_bf16 && (extended_state() & kTileState) == kTileState && may_use_tiles();
}
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
    case Isa::amx_bf16:
      return "amx_bf16";
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
    case Isa::amx_bf16: {
      static const bool usable = has_amx_bf16();
      return usable;
    }
  }
  return false;
}

#else

bool is_supported(Isa isa) { return isa == Isa::portable; }

#endif

std::vector<Isa> supported_isas() {
  std::vector<Isa> result;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16})
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
