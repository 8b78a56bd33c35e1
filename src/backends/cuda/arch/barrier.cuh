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

// The same on the barrier at this address in another CTA of the cluster. Of CTA scope, as all a
// stage needs: reads of it by wgmma are over. `.release.cluster` would become a MEMBAR.GPU that
// waits for the epilogue's stores, at every stage: it doubled the time of the down-projection.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t cta) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(cta)
      : "memory");
}

// All threads of all CTAs of the cluster meet. Relaxed: orders nothing but the barriers' own
// initialisation, which fence_barrier_init releases.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;" ::
          : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
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

// Named barriers of one CTA: `sync` waits until `threads` have called either on this id.
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace penstock::cuda::arch
