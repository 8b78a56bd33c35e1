// SPDX-License-Identifier: Apache-2.0
//
// mbarrier, one instruction per function. Barriers live in shared memory and are addressed by
// their 32-bit shared address. A phase is the parity of the completed-phase count: waiting with
// parity p returns once the phase of parity p has completed, so a fresh barrier passes parity 1.
#pragma once

#include <cstdint>

namespace penstock::cuda::arch {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives once and adds `bytes` to what copies must still deliver in this phase.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// A wait that never ends is a bug that costs a whole lease of the machine, so builds with
// PENSTOCK_WATCHDOG trap after some seconds; the count stays off the path of a wait that succeeds.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef PENSTOCK_WATCHDOG
  for (uint32_t spin = 0; !barrier_try_wait(barrier, parity); ++spin) {
    if (spin > (1u << 22)) __trap();
  }
#else
  while (!barrier_try_wait(barrier, parity)) {
  }
#endif
}

}  // namespace penstock::cuda::arch
