// SPDX-License-Identifier: Apache-2.0
//
// wgmma m64nNk16 with fp32 accumulators, both operands in shared memory, one instruction per
// function; plus its fences and the matrix descriptor.
//
// Shared tiles are 128-byte swizzled, 1024-byte aligned. K-major: a row (one m or n) is 128 bytes
// of k. MN-major: a row (one k) is 128 bytes of m or n, and 64-wide blocks follow one another.
// Accumulators: thread t of the warpgroup holds rows 16 * (t / 32) + t % 32 / 4 (+ 8) and, of every
// 8 columns, 2 * (t % 4) (+ 1): d[4 i + (0, 1, 2, 3)] = (row, c) (row, c + 1) (row + 8, c)
// (row + 8, c + 1).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace penstock::cuda::arch {

enum class Major : uint8_t { k, mn };

// Byte strides of the canonical 128-byte-swizzled layouts. `block_stride` is the distance between
// the 64-wide blocks of an MN-major tile and means nothing for a K-major one.
template <Major kMajor>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t block_stride) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  const uint64_t leading = kMajor == Major::mn ? (block_stride >> 4) : 1;
  return kSwizzle128 | kEightRows | (leading << 16) | ((address & 0x3ffffu) >> 4);
}

// What 16 further k add to a descriptor: 32 bytes inside the swizzled row, or two groups of 8 rows.
template <Major kMajor>
constexpr uint64_t kDescriptorStepK16 = kMajor == Major::k ? (32 >> 4) : (2048 >> 4);

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads of accumulators above the wait that makes them valid.
template <int kCount>
__device__ __forceinline__ void fence_accumulators(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kRegisters>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Both descriptors of one instruction, and whether it adds to the accumulators or replaces them.
struct Operands {
  uint64_t a;
  uint64_t b;
  int32_t accumulate;
};

// The instruction for accumulators of N columns: D (+)= A B. Specialised for each N and type.
template <typename Element, int kN, Major kMajorA, Major kMajorB>
struct Wgmma;

// clang-format off
// The accumulators in an instruction's text, and among an asm statement's operands from d[I] on.
#define PENSTOCK_REGISTERS_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PENSTOCK_REGISTERS_32 \
  PENSTOCK_REGISTERS_16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PENSTOCK_REGISTERS_64 \
  PENSTOCK_REGISTERS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PENSTOCK_REGISTERS_128 \
  PENSTOCK_REGISTERS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PENSTOCK_SUMS_4(I) "+f"(d[I]), "+f"(d[(I) + 1]), "+f"(d[(I) + 2]), "+f"(d[(I) + 3])
#define PENSTOCK_SUMS_16(I) \
  PENSTOCK_SUMS_4(I), PENSTOCK_SUMS_4((I) + 4), PENSTOCK_SUMS_4((I) + 8), PENSTOCK_SUMS_4((I) + 12)
#define PENSTOCK_SUMS_32(I) PENSTOCK_SUMS_16(I), PENSTOCK_SUMS_16((I) + 16)
#define PENSTOCK_SUMS_64(I) PENSTOCK_SUMS_32(I), PENSTOCK_SUMS_32((I) + 32)
#define PENSTOCK_SUMS_128(I) PENSTOCK_SUMS_64(I), PENSTOCK_SUMS_64((I) + 64)

// SUMS accumulators for COLUMNS columns; the operands that follow them are numbered from SUMS on:
// descriptors A and B, ACCUMULATE, and whether A and B are TRANSPOSED.
#define PENSTOCK_WGMMA(ELEMENT, TYPE, COLUMNS, SUMS, A, B, ACCUMULATE, TRANSPOSED) \
  template <Major kMajorA, Major kMajorB> \
  struct Wgmma<ELEMENT, COLUMNS, kMajorA, kMajorB> { \
    static __device__ __forceinline__ void run(float (&d)[SUMS], const Operands& operands) { \
      asm volatile( \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE ", 0;\n" \
          "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE \
          " {" PENSTOCK_REGISTERS_##SUMS "}, %" #A ", %" #B ", p, 1, 1, " TRANSPOSED ";\n}" \
          : PENSTOCK_SUMS_##SUMS(0) \
          : "l"(operands.a), "l"(operands.b), "r"(operands.accumulate), \
            "n"(kMajorA == Major::mn ? 1 : 0), "n"(kMajorB == Major::mn ? 1 : 0)); \
    } \
  }
// clang-format on

PENSTOCK_WGMMA(__nv_bfloat16, "bf16", 32, 16, 16, 17, 18, "%19, %20");
PENSTOCK_WGMMA(__half, "f16", 32, 16, 16, 17, 18, "%19, %20");
PENSTOCK_WGMMA(__nv_bfloat16, "bf16", 64, 32, 32, 33, 34, "%35, %36");
PENSTOCK_WGMMA(__half, "f16", 64, 32, 32, 33, 34, "%35, %36");
PENSTOCK_WGMMA(__nv_bfloat16, "bf16", 128, 64, 64, 65, 66, "%67, %68");
PENSTOCK_WGMMA(__half, "f16", 128, 64, 64, 65, 66, "%67, %68");
PENSTOCK_WGMMA(__nv_bfloat16, "bf16", 256, 128, 128, 129, 130, "%131, %132");
PENSTOCK_WGMMA(__half, "f16", 256, 128, 128, 129, 130, "%131, %132");
#undef PENSTOCK_WGMMA
#undef PENSTOCK_SUMS_128
#undef PENSTOCK_SUMS_64
#undef PENSTOCK_SUMS_32
#undef PENSTOCK_SUMS_16
#undef PENSTOCK_SUMS_4
#undef PENSTOCK_REGISTERS_128
#undef PENSTOCK_REGISTERS_64
#undef PENSTOCK_REGISTERS_32
#undef PENSTOCK_REGISTERS_16

}  // namespace penstock::cuda::arch
