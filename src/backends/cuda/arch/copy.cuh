// SPDX-License-Identifier: Apache-2.0
//
// Copies from global to shared memory: the bulk tensor copy engine (TMA) and 16-byte cp.async, and
// the proxy fence between what cp.async writes and what wgmma reads.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace penstock::cuda::arch {

__device__ __forceinline__ void tma_prefetch_descriptor(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

struct Coordinates {
  int32_t c0;  // along the contiguous dimension
  int32_t c1;
  int32_t c2;
};

// One box of a 3-D tensor into shared memory; elements outside the tensor arrive as zeros, and all
// bytes of the box count towards the barrier.
__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap* map,
                                         uint32_t barrier, Coordinates at) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(destination),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(at.c0), "r"(at.c1), "r"(at.c2)
      : "memory");
}

// 16 bytes, or 16 zero bytes when `bytes` is 0 (the source is then not read).
__device__ __forceinline__ void copy_async_16(uint32_t destination, const void* source,
                                              uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(bytes)
               : "memory");
}

// Arrives on the barrier once every earlier cp.async of this thread has landed. The arrival is one
// of the barrier's expected count (noinc), so a barrier fed this way expects one per thread.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Orders earlier generic writes to shared memory (cp.async's included, once observed through a
// barrier) before later accesses by the async proxy, which is how wgmma and TMA see memory.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace penstock::cuda::arch
