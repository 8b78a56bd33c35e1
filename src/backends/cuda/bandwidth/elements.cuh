// SPDX-License-Identifier: Apache-2.0
//
// Eight storage elements (16 bytes of bf16 or fp16) at a time, widened to fp32 and back, rounding
// to nearest even. Used by every bandwidth kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "penstock/dtype.h"

namespace penstock::cuda {

inline constexpr int kVector = 8;  // elements in a 16-byte access

struct Float8 {
  float v[kVector];
};

template <typename T>
struct Pair;  // two elements as the hardware packs them

template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ float2 widen(type pair) { return __bfloat1622float2(pair); }
  static __device__ type narrow(float2 pair) { return __float22bfloat162_rn(pair); }
};

template <>
struct Pair<__half> {
  using type = __half2;
  static __device__ float2 widen(type pair) { return __half22float2(pair); }
  static __device__ type narrow(float2 pair) { return __float22half2_rn(pair); }
};

template <typename T>
__device__ Float8 widen(const uint4& packed) {
  Float8 result;
  const auto* pairs = reinterpret_cast<const typename Pair<T>::type*>(&packed);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = Pair<T>::widen(pairs[i]);
    result.v[2 * i] = pair.x;
    result.v[2 * i + 1] = pair.y;
  }
  return result;
}

template <typename T>
__device__ uint4 narrow(const Float8& values) {
  uint4 packed;
  auto* pairs = reinterpret_cast<typename Pair<T>::type*>(&packed);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    pairs[i] = Pair<T>::narrow(make_float2(values.v[2 * i], values.v[2 * i + 1]));
  }
  return packed;
}

// Read once, by this kernel only: does not displace weights from the caches.
__device__ inline uint4 load_streaming(const void* address) {
  return __ldcs(static_cast<const uint4*>(address));
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
