// SPDX-License-Identifier: Apache-2.0
//
// A warp's choice of the K largest of up to 1024 values: ties to the lower expert, NaN below every
// number, any K up to the number of values. Included by the routers.
//
// Taking the largest K times makes every lane look at all its keys K times. Where K is small a
// bound saves that: the K-th largest of the 32 lanes' own maxima is reached by at least K values
// and, of E values in random order, by few more (12 of 512 for K = 10). Those few move to shared
// memory, one a lane, and the rank of each is how many of them come before it. Values that do not
// allow it (more than 32 reach the bound, or too few lanes hold a number) go by rounds.
#pragma once

#include <cstdint>

#include "backends/cuda/bandwidth/logit_keys.cuh"

namespace penstock::cuda {

inline constexpr int kCandidates = 32;    // one a lane
inline constexpr int kMostBoundedK = 16;  // beyond, often more than 32 values reach the bound

// Lane l holds the values of experts l, l + 32, l + 64 and so on, and knows where they came from.
template <int kPerLane>
struct LaneValues {
  const float* row;       // (E) in global or shared memory
  float value[kPerLane];  // NaN where no such expert takes part
  uint32_t present;       // bit i: value[i] takes part

  __device__ bool has(int i) const { return (present >> i & 1u) != 0; }
};

// The values of all experts. Every load is in flight before the first value is looked at.
template <int kPerLane>
__device__ LaneValues<kPerLane> load_values(const float* row, int32_t num_experts) {
  const int lane = WarpTeam().rank();
  const int held = (num_experts - lane + WarpTeam::kSize - 1) / WarpTeam::kSize;
  LaneValues<kPerLane> values;
  values.row = row;
  values.present = held >= 32 ? 0xffffffffu : (1u << held) - 1u;
  const float* lane_row = row + lane;  // one address for all the loads
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    values.value[i] = __uint_as_float(0x7fc00000u);
    if (i < held) values.value[i] = lane_row[i * WarpTeam::kSize];
  }
  return values;
}

// A choice as one integer: of two, the larger comes first.
__device__ inline uint64_t packed(uint32_t key, int32_t expert) {
  return static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(expert);
}
__device__ inline Choice unpacked(uint64_t choice) {
  return {static_cast<int32_t>(~static_cast<uint32_t>(choice)),
          static_cast<uint32_t>(choice >> 32)};
}

// The largest of the values, as a key; kNanKey where none is a number.
template <int kPerLane>
__device__ uint32_t lane_largest(const LaneValues<kPerLane>& values) {
  float largest = values.value[0];
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) largest = fmaxf(largest, values.value[i]);  // passes NaN over
  return key_of(largest);
}

// The K-th largest of the lanes' keys, or less where lanes are equal.
__device__ inline uint32_t bound_of(uint32_t lane_key, int top_k) {
  const WarpTeam team;
  uint32_t bound = kTakenKey;
  for (int k = 0; k < top_k; ++k) {
    bound = team.max(lane_key);
    if (lane_key == bound) lane_key = kTakenKey;
  }
  return bound;
}

// Moves the values that reach the bound to `candidates`, in any order; returns how many there are.
// Nothing is written where they are more than kCandidates.
template <int kPerLane>
__device__ int gather_candidates(const LaneValues<kPerLane>& values, float bound,
                                 uint64_t* candidates) {
  const int lane = WarpTeam().rank();
  uint32_t reaching = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (values.value[i] >= bound) reaching |= 1u << i;
  }
  const int mine = __popc(reaching);
  const int end = warp_inclusive_sum(mine);
  const int count = __shfl_sync(kFullMask, end, WarpTeam::kSize - 1);
  if (count > kCandidates) return count;
  int next = end - mine;
  __syncwarp();  // an earlier call's candidates have been read
  for (; reaching != 0; reaching &= reaching - 1) {
    // Read again, which is cheap: a register cannot be named by a number.
    const int expert = lane + (__ffs(static_cast<int>(reaching)) - 1) * WarpTeam::kSize;
    candidates[next++] = packed(key_of(values.row[expert]), expert);
  }
  __syncwarp();
  return count;
}

// Calls emit(rank, choice) on one lane for each of the K first candidates; returns the K-th.
template <typename Emit>
__device__ uint64_t rank_candidates(const uint64_t* candidates, int count, int top_k,
                                    const Emit& emit) {
  const int lane = WarpTeam().rank();
  const uint64_t mine = lane < count ? candidates[lane] : 0;
  int rank = 0;
  for (int other = 0; other < count; ++other) rank += candidates[other] > mine ? 1 : 0;
  const bool chosen = lane < count && rank < top_k;
  if (chosen) emit(rank, unpacked(mine));
  const unsigned last = __ballot_sync(kFullMask, chosen && rank == top_k - 1);
  return __shfl_sync(kFullMask, mine, __ffs(static_cast<int>(last)) - 1);
}

template <int kPerLane, typename Emit>
__device__ uint64_t choose_by_rounds(const LaneValues<kPerLane>& values, int top_k,
                                     const Emit& emit) {
  const WarpTeam team;
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    keys[i] = values.has(i) ? key_of(values.value[i]) : kTakenKey;
  }
  Choice choice = {0, kTakenKey};
  for (int k = 0; k < top_k; ++k) {
    choice = take_largest(team, keys);
    if (team.rank() == k % WarpTeam::kSize) emit(k, choice);
  }
  return packed(choice.key, choice.expert);
}

// Calls emit(rank, choice) on one lane for each of the K best; returns the last of them, packed,
// so that a value was chosen if packed(its key, its expert) is no less. candidates: kCandidates
// words of shared memory for this warp alone.
template <int kPerLane, typename Emit>
__device__ uint64_t choose_top_k(const LaneValues<kPerLane>& values, int top_k,
                                 uint64_t* candidates, const Emit& emit) {
  if (top_k <= kMostBoundedK) {
    const uint32_t bound = bound_of(lane_largest(values), top_k);
    if (bound > kNanKey) {
      const int count = gather_candidates(values, logit_of(bound), candidates);
      if (count <= kCandidates) return rank_candidates(candidates, count, top_k, emit);
    }
  }
  return choose_by_rounds(values, top_k, emit);
}

}  // namespace penstock::cuda
