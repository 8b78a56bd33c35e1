// SPDX-License-Identifier: Apache-2.0
//
// Two neighbouring elements as the hardware packs them, from fp32 and back, rounded to nearest
// even. Used by the bandwidth kernels and by the epilogues of the products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace penstock::cuda {

template <typename Element>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ Type pack(float low, float high) { return __floats2bfloat162_rn(low, high); }
  static __device__ float2 unpack(Type pair) { return __bfloat1622float2(pair); }
};
template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ Type pack(float low, float high) { return __floats2half2_rn(low, high); }
  static __device__ float2 unpack(Type pair) { return __half22float2(pair); }
};
template <>
struct Pair<float> {
  using Type = float2;
  static __device__ Type pack(float low, float high) { return {low, high}; }
  static __device__ float2 unpack(Type pair) { return pair; }
};

}  // namespace penstock::cuda
