// SPDX-License-Identifier: Apache-2.0
//
// Eight storage elements (16 bytes of bf16 or fp16) at a time, widened to fp32 and back, rounding
// to nearest even. Used by every bandwidth kernel.
#pragma once

#include <cstdint>

#include "backends/cuda/pair.cuh"
#include "penstock/dtype.h"

namespace penstock::cuda {

inline constexpr int kVector = 8;  // elements in a 16-byte access

struct Float8 {
  float v[kVector];
};

template <typename T>
__device__ Float8 widen(const uint4& packed) {
  Float8 result;
  const auto* pairs = reinterpret_cast<const typename Pair<T>::Type*>(&packed);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = Pair<T>::unpack(pairs[i]);
    result.v[2 * i] = pair.x;
    result.v[2 * i + 1] = pair.y;
  }
  return result;
}

template <typename T>
__device__ uint4 narrow(const Float8& values) {
  uint4 packed;
  auto* pairs = reinterpret_cast<typename Pair<T>::Type*>(&packed);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    pairs[i] = Pair<T>::pack(values.v[2 * i], values.v[2 * i + 1]);
  }
  return packed;
}

// Read once, by this kernel only: does not displace weights from the caches.
__device__ inline uint4 load_streaming(const void* address) {
  return __ldcs(static_cast<const uint4*>(address));
}

// Read more than once, or written just before: no hint. Also where each byte is read once, hints
// lose: 4 % for either of evict-first and no allocation in L1.
__device__ inline uint4 load_vector(const void* address) {
  return *static_cast<const uint4*>(address);
}

// One 16-byte store: assigned in place, a uint4 can become four of 4 bytes.
__device__ inline void store_vector(void* address, const uint4& packed) {
  *static_cast<uint4*>(address) = packed;
}

// Calls visitor with a null pointer of the device type of a 16-bit storage dtype.
template <typename Visitor>
void visit_storage(DType dtype, Visitor&& visitor) {
  if (dtype == DType::bfloat16) {
    visitor(static_cast<__nv_bfloat16*>(nullptr));
  } else {
    visitor(static_cast<__half*>(nullptr));
  }
}

}  // namespace penstock::cuda
