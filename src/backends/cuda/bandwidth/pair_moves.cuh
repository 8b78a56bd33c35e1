// SPDX-License-Identifier: Apache-2.0
//
// One expert's keys, which its block holds in registers, and which of its tokens change sides when
// its count is rounded: the others of largest keys join, ties to the lower token, or the chosen of
// least keys leave, the higher token first. Made for few moves among many tokens; where it would
// not be fast it says so. Included by pair_select.cu.
#pragma once

#include <cstdint>

#include "backends/cuda/bandwidth/pair_routers.cuh"
#include "backends/cuda/bandwidth/team.cuh"

namespace penstock::cuda {

// The threads that share one expert, and the keys that each of them holds: a panel of its tokens.
template <int kThreadCount, int kKeysHeld>
struct ExpertBlock {
  static constexpr int kThreads = kThreadCount;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kHeld = kKeysHeld;
  static constexpr uint32_t kPanelTokens = kThreads * kHeld;
  static constexpr int kPanelChunks = kPanelTokens / kChunkTokens;
  static_assert(kPanelTokens % kChunkTokens == 0 && kPanelChunks <= kThreads,
                "a thread writes a chunk");
};

inline constexpr int kMostMoving = 512;  // candidates whose order is counted

inline constexpr uint64_t kNobodyMoves = ~uint64_t{0};
inline constexpr uint64_t kTooManyMove = 0;

struct Moves {
  uint64_t candidates[kMostMoving];
  uint64_t last;
  int32_t num_candidates;
  int32_t warp_sums[32];  // 0 past the block's warps
};

// The keys of one expert. Where one panel has them all they are read once; otherwise every pass
// reads them again.
template <typename Block>
struct Column {
  const uint32_t* keys;
  uint32_t num_tokens;
  uint32_t held[Block::kHeld];  // 0 past the last token

  __device__ static uint32_t token(uint32_t panel, int i) {
    return panel + static_cast<uint32_t>(i) * Block::kThreads + threadIdx.x;
  }

  __device__ void hold(uint32_t panel) {
    const uint32_t* mine = keys + panel + threadIdx.x;  // one address for all the loads
#pragma unroll
    for (int i = 0; i < Block::kHeld; ++i) {
      held[i] = 0;
      if (token(panel, i) < num_tokens) held[i] = mine[i * Block::kThreads];
    }
  }

  // Calls visit(first token of a panel) with its keys held; the first panel is held before.
  template <typename Visit>
  __device__ void for_each_panel(const Visit& visit) {
    for (uint32_t panel = 0; panel < num_tokens; panel += Block::kPanelTokens) {
      if (num_tokens > Block::kPanelTokens) hold(panel);
      visit(panel);
    }
  }
};

struct BlockScan {
  int32_t before;  // the sum over the threads below
  int32_t all;
};

__device__ inline BlockScan scan_block(int32_t value, Moves& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int32_t end = warp_inclusive_sum(value);
  if (lane == 31) shared.warp_sums[warp] = end;
  __syncthreads();
  const int32_t sum = shared.warp_sums[lane];
  const int32_t sums_end = warp_inclusive_sum(sum);
  const int32_t warps_before = __shfl_sync(kFullMask, sums_end - sum, warp);
  const int32_t all = __shfl_sync(kFullMask, sums_end, 31);
  __syncthreads();  // the sums have been read
  return {warps_before + end - value, all};
}

// The side that tokens come from, and their order: the larger moves earlier, 0 is not on this side.
struct Side {
  __device__ explicit Side(int32_t change) : joining(change > 0) {}

  // 31 bits; for either side, 1 more than the key's distance from where moving ends.
  __device__ uint32_t order(uint32_t key) const {
    const bool chosen = (key & kChosenBit) != 0;
    if (chosen == joining) return 0;
    return (joining ? key : ~key) + 1u;
  }
  __device__ uint64_t order(uint32_t key, uint32_t token) const {
    const uint32_t first = order(key);
    if (first == 0) return 0;
    return static_cast<uint64_t>(first) << 32 | (joining ? ~token : token);
  }

  bool joining;
};

struct ColumnSummary {
  int32_t chosen;       // tokens, of the block
  uint32_t best_other;  // the thread's first to join, and to leave, by Side::order
  uint32_t best_leaving;
};

template <typename Block>
__device__ ColumnSummary summarise(Column<Block>& column, Moves& shared) {
  const Side joining(1);
  const Side leaving(-1);
  ColumnSummary summary = {};
  column.for_each_panel([&](uint32_t panel) {
#pragma unroll
    for (int i = 0; i < Block::kHeld; ++i) {
      if (column.token(panel, i) >= column.num_tokens) continue;
      summary.chosen += static_cast<int32_t>(column.held[i] >> 31);
      summary.best_other = max(summary.best_other, joining.order(column.held[i]));
      summary.best_leaving = max(summary.best_leaving, leaving.order(column.held[i]));
    }
  });
  summary.chosen = scan_block(summary.chosen, shared).all;
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
template <typename Block>
__device__ uint64_t last_to_move(Column<Block>& column, const Side& side, uint32_t best,
                                 int32_t wanted, Moves& shared) {
  if (wanted > kMostMoving) return kTooManyMove;
  if (threadIdx.x == 0) shared.num_candidates = 0;
  const uint32_t bound = bound_on_order(best, wanted);  // its barriers also publish the 0
  column.for_each_panel([&](uint32_t panel) {
    if (best < bound) return;
#pragma unroll
    for (int i = 0; i < Block::kHeld; ++i) {
      const uint32_t token = column.token(panel, i);
      if (token >= column.num_tokens || side.order(column.held[i]) < bound) continue;
      // Any place will do: what counts is the candidates' order, which is counted below.
      const int32_t place = atomicAdd(&shared.num_candidates, 1);
      if (place < kMostMoving) shared.candidates[place] = side.order(column.held[i], token);
    }
  });
  __syncthreads();
  const int32_t count = shared.num_candidates;
  if (count > kMostMoving || count < wanted) return kTooManyMove;
  for (auto c = static_cast<int32_t>(threadIdx.x); c < count; c += Block::kThreads) {
    const uint64_t mine = shared.candidates[c];
    int32_t rank = 0;
    for (int32_t i = 0; i < count; ++i) rank += shared.candidates[i] > mine ? 1 : 0;
    if (rank == wanted - 1) shared.last = mine;
  }
  __syncthreads();
  return shared.last;
}

}  // namespace penstock::cuda
