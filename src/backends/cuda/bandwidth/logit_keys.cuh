// SPDX-License-Identifier: Apache-2.0
//
// Logits as integers of the same order, so that one integer maximum and one minimum choose a
// token's next expert: the largest logit, ties to the lower id, NaN below every number. The choice
// is exact in fp32: no mantissa bits are given up to carry the id. Member r of a team holds the
// experts r, r + kSize, r + 2 kSize and so on. Included by the routers.
#pragma once

#include <cstdint>

#include "backends/cuda/bandwidth/team.cuh"

namespace penstock::cuda {

inline constexpr uint32_t kTakenKey = 0;  // no such expert, or already chosen
inline constexpr uint32_t kNanKey = 1;    // below -inf, whose key is 0x007fffff

__device__ inline uint32_t key_of(float logit) {
  if (isnan(logit)) return kNanKey;
  const uint32_t bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);  // -0 ties with +0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ inline float logit_of(uint32_t key) {
  if (key == kNanKey) return __uint_as_float(0x7fc00000u);
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

struct Choice {
  int32_t expert;
  uint32_t key;
};

// The best of the keys that are left, taken out of them; the same answer for every member.
template <typename Team, int kPerMember>
__device__ Choice take_largest(const Team& team, uint32_t (&keys)[kPerMember]) {
  uint32_t best = kTakenKey;
#pragma unroll
  for (int i = 0; i < kPerMember; ++i) best = max(best, keys[i]);
  best = team.max(best);
  uint32_t expert = 0xffffffffu;
#pragma unroll
  for (int i = kPerMember - 1; i >= 0; --i) {
    if (keys[i] == best) expert = static_cast<uint32_t>(team.rank() + i * Team::kSize);
  }
  expert = team.min(expert);
#pragma unroll
  for (int i = 0; i < kPerMember; ++i) {
    if (static_cast<uint32_t>(team.rank() + i * Team::kSize) == expert) keys[i] = kTakenKey;
  }
  return {static_cast<int32_t>(expert), best};
}

// Calls function.template operator()<kPerMember>() with the keys that each lane of a warp holds.
template <typename Function>
void visit_experts_per_lane(int64_t num_experts, const Function& function) {
  if (num_experts <= 32) return function.template operator()<1>();
  if (num_experts <= 64) return function.template operator()<2>();
  if (num_experts <= 128) return function.template operator()<4>();
  if (num_experts <= 256) return function.template operator()<8>();
  if (num_experts <= 512) return function.template operator()<16>();
  return function.template operator()<32>();
}

}  // namespace penstock::cuda
