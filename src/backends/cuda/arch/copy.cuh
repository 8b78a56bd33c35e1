// SPDX-License-Identifier: Apache-2.0
//
// Copies between global and shared memory: the bulk tensor copy engine (TMA) and 16-byte cp.async,
// and the proxy fence between what threads or cp.async write and what wgmma or TMA reads.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace penstock::cuda::arch {

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

// The same box into the same place of every CTA in `ctas` (a bit each), and its bytes to the
// barrier at the same address in each.
__device__ __forceinline__ void tma_load_multicast(uint32_t destination, const CUtensorMap* map,
                                                   uint32_t barrier, Coordinates at,
                                                   uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(at.c0), "r"(at.c1), "r"(at.c2),
      "h"(ctas)
      : "memory");
}

// True in one lane of a full warp, always the same one, which the compiler knows to be alone:
// behind a comparison of lane ids it wraps every TMA store in a loop over the lanes.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

// One box from shared memory into a 3-D tensor; elements outside the tensor are dropped. The copy
// is part of the calling thread's next bulk_commit.
__device__ __forceinline__ void tma_store(uint32_t source, const CUtensorMap* map, Coordinates at) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          reinterpret_cast<uint64_t>(map)),
      "r"(source), "r"(at.c0), "r"(at.c1), "r"(at.c2)
      : "memory");
}

__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Returns once all but the last kPending committed groups of this thread have read their shared
// memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// 16 bytes, or 16 zero bytes when `bytes` is 0 (the source is then not read). A row is read 128
// bytes a stage, so the other half of a 256-byte line will be wanted next.
__device__ __forceinline__ void copy_async_16(uint32_t destination, const void* source,
                                              uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(source), "r"(bytes)
               : "memory");
}

// Arrives on the barrier once every earlier cp.async of this thread has landed. The arrival is one
// of the barrier's expected count (noinc), so a barrier fed this way expects one per thread.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from the accumulator layout (a word holds two neighbours
// of a row) to rows of 16 bytes: lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrix(uint32_t row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// The inverse.
__device__ __forceinline__ void load_matrix(uint32_t row, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Orders earlier generic writes to shared memory (cp.async's included, once observed through a
// barrier) before later accesses by the async proxy, which is how wgmma and TMA see memory.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace penstock::cuda::arch
