// SPDX-License-Identifier: Apache-2.0
//
// The threads that share one token of the router: a warp for up to 1024 experts, a block beyond.
// Every reduction returns the same bits to all members and adds in a fixed order.
#pragma once

#include <cstdint>

namespace penstock::cuda {

inline constexpr unsigned kFullMask = 0xffffffffu;

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

// The sum over this lane and the lanes below it.
__device__ inline int32_t warp_inclusive_sum(int32_t value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t below = __shfl_up_sync(kFullMask, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

struct WarpTeam {
  static constexpr int kSize = 32;
  static constexpr int kTeamsPerBlock = 8;

  __device__ int rank() const { return static_cast<int>(threadIdx.x) % kSize; }
  __device__ int64_t index() const {
    return static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock + threadIdx.x / kSize;
  }
  __device__ uint32_t max(uint32_t value) const { return __reduce_max_sync(kFullMask, value); }
  __device__ uint32_t min(uint32_t value) const { return __reduce_min_sync(kFullMask, value); }
  __device__ float sum(float value) const { return warp_sum(value); }
};

struct BlockTeam {
  static constexpr int kSize = 256;
  static constexpr int kTeamsPerBlock = 1;
  static constexpr int kWarps = kSize / 32;

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int64_t index() const { return blockIdx.x; }

  __device__ uint32_t max(uint32_t value) const {
    uint32_t* partial = exchange(__reduce_max_sync(kFullMask, value));
    uint32_t best = partial[0];
    for (int w = 1; w < kWarps; ++w) best = ::max(best, partial[w]);
    return best;
  }
  __device__ uint32_t min(uint32_t value) const {
    uint32_t* partial = exchange(__reduce_min_sync(kFullMask, value));
    uint32_t best = partial[0];
    for (int w = 1; w < kWarps; ++w) best = ::min(best, partial[w]);
    return best;
  }
  __device__ float sum(float value) const {
    uint32_t* partial = exchange(__float_as_uint(warp_sum(value)));
    float total = __uint_as_float(partial[0]);
    for (int w = 1; w < kWarps; ++w) total += __uint_as_float(partial[w]);
    return total;
  }

 private:
  // One word per warp, visible to all; the leading barrier keeps the previous call's readers safe.
  __device__ static uint32_t* exchange(uint32_t warp_value) {
    __shared__ uint32_t partial[kWarps];
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = warp_value;
    __syncthreads();
    return partial;
  }
};

}  // namespace penstock::cuda
