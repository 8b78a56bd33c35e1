// SPDX-License-Identifier: Apache-2.0
//
// Which tokens of an expert change sides when its count is rounded: the others of largest keys
// join, ties to the lower token, or the chosen of least keys leave, the higher token first. Made
// for few moves among many tokens; where it would not be fast it says so. Included by
// pair_select.cu.
#pragma once

#include <cstdint>

#include "backends/cuda/bandwidth/pair_routers.cuh"
#include "backends/cuda/bandwidth/team.cuh"

namespace penstock::cuda {

inline constexpr int kMoveThreads = 512;  // of the block of one expert
inline constexpr int kMostMoving = 512;   // candidates whose order is counted

inline constexpr uint64_t kNobodyMoves = ~uint64_t{0};
inline constexpr uint64_t kTooManyMove = 0;

struct Moves {
  uint64_t candidates[kMostMoving];
  uint64_t last;
  int32_t num_candidates;
  int32_t warp_counts[32];  // 0 past the block's warps
};

// The side that tokens come from, and their order: the larger moves earlier, 0 is not on this side.
struct Side {
  __device__ explicit Side(int32_t change) : joining(change > 0) {}

  // 31 bits; for either side, 1 more than the key's distance from where moving ends.
  __device__ uint32_t order(uint32_t key) const {
    const bool chosen = (key & kChosenBit) != 0;
    if (chosen == joining) return 0;
    return (joining ? key : ~key) + 1u;
  }
  __device__ uint64_t order(uint32_t key, int64_t token) const {
    const uint32_t first = order(key);
    if (first == 0) return 0;
    const auto index = static_cast<uint32_t>(token);
    return static_cast<uint64_t>(first) << 32 | (joining ? ~index : index);
  }

  bool joining;
};

struct Column {
  const uint32_t* keys;
  int64_t num_tokens;
};

struct ColumnSummary {
  int32_t chosen;       // tokens, of the block
  uint32_t best_other;  // the thread's first to join, and to leave, by Side::order
  uint32_t best_leaving;
};

__device__ inline ColumnSummary summarise(const uint32_t* column, int64_t num_tokens,
                                          Moves& shared) {
  const Side joining(1);
  const Side leaving(-1);
  ColumnSummary summary = {};
#pragma unroll 8
  for (int64_t token = threadIdx.x; token < num_tokens; token += kMoveThreads) {
    const uint32_t key = column[token];
    summary.chosen += static_cast<int32_t>(key >> 31);
    summary.best_other = max(summary.best_other, joining.order(key));
    summary.best_leaving = max(summary.best_leaving, leaving.order(key));
  }
  const auto of_warp = static_cast<int32_t>(__reduce_add_sync(kFullMask, summary.chosen));
  if (threadIdx.x < 32) shared.warp_counts[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.warp_counts[threadIdx.x / 32] = of_warp;
  __syncthreads();
  const auto of_block = __reduce_add_sync(kFullMask, shared.warp_counts[threadIdx.x % 32]);
  summary.chosen = static_cast<int32_t>(of_block);
  return summary;
}

// An order that at least `wanted` threads' best reach and not many more, found bit by bit; 1 where
// fewer threads have anything.
__device__ inline uint32_t bound_on_order(uint32_t best, int32_t wanted) {
  const int32_t enough = wanted + wanted / 4;
  uint32_t bound = 0;
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    const int32_t reaching = __syncthreads_count(best >= (bound | bit) ? 1 : 0);
    if (reaching >= wanted) bound |= bit;
    if (reaching >= wanted && reaching <= enough) break;
  }
  return max(bound, 1u);
}

// The order of the last of `wanted` tokens to move; kTooManyMove where candidates are too many.
__device__ inline uint64_t last_to_move(const Column& column, const Side& side, uint32_t best,
                                        int32_t wanted, Moves& shared) {
  if (wanted > kMostMoving) return kTooManyMove;
  if (threadIdx.x == 0) shared.num_candidates = 0;
  const uint32_t bound = bound_on_order(best, wanted);  // its barriers also publish the 0
  if (best >= bound) {
    for (int64_t token = threadIdx.x; token < column.num_tokens; token += kMoveThreads) {
      const uint32_t key = column.keys[token];
      if (side.order(key) < bound) continue;
      // Any place will do: what counts is the candidates' order, which is counted below.
      const int32_t place = atomicAdd(&shared.num_candidates, 1);
      if (place < kMostMoving) shared.candidates[place] = side.order(key, token);
    }
  }
  __syncthreads();
  const int32_t count = shared.num_candidates;
  if (count > kMostMoving || count < wanted) return kTooManyMove;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (thread < count) {
    const uint64_t mine = shared.candidates[thread];
    int32_t rank = 0;
    for (int32_t i = 0; i < count; ++i) rank += shared.candidates[i] > mine ? 1 : 0;
    if (rank == wanted - 1) shared.last = mine;
  }
  __syncthreads();
  return shared.last;
}

}  // namespace penstock::cuda
