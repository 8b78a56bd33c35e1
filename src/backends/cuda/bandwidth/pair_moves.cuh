// SPDX-License-Identifier: Apache-2.0
//
// One expert's keys, whose upper halves its block holds in registers, and which of its tokens
// change sides when its count is rounded: the others of largest keys join, ties to the lower token,
// or the chosen of least keys leave, the higher token first. Made for few moves among many tokens;
// where it would not be fast it says so. Included by pair_select.cu.
#pragma once

#include <cstdint>

#include "backends/cuda/bandwidth/pair_routers.cuh"
#include "backends/cuda/bandwidth/team.cuh"

namespace penstock::cuda {

inline constexpr int kKeysOfVector = 8;  // of 16 bits, in one load

// The threads that share one expert, and the vectors of keys that each of them holds: a panel of
// its tokens.
template <int kThreadCount, int kVectorsHeld>
struct ExpertBlock {
  static constexpr int kThreads = kThreadCount;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kHeld = kVectorsHeld;
  static constexpr uint32_t kPanelTokens = kThreads * kHeld * kKeysOfVector;
  static constexpr int kPanelChunks = kPanelTokens / kChunkTokens;
  static_assert(kPanelTokens % kChunkTokens == 0 && kPanelChunks <= kThreads,
                "a thread writes a chunk");
};

inline constexpr int kMostMoving = 512;  // candidates whose order is counted

enum class Moved : uint8_t { all, too_many };

struct Moves {
  uint32_t tokens[kMostMoving];
  uint64_t orders[kMostMoving];
  int32_t num_candidates;
  int32_t warp_sums[32];  // 0 past the block's warps
};

// The upper halves of an expert's keys. Where one panel has them all they are read once; otherwise
// every pass reads them again. Token t of a vector is half t of its words.
template <typename Block>
struct Column {
  const uint16_t* keys;
  uint32_t num_tokens;
  uint4 held[Block::kHeld];  // 0 past the last token

  // The first token of vector i.
  __device__ static uint32_t token(uint32_t panel, int i) {
    return panel + (static_cast<uint32_t>(i) * Block::kThreads + threadIdx.x) * kKeysOfVector;
  }

  __device__ void hold(uint32_t panel) {
    const auto* mine = reinterpret_cast<const uint4*>(keys + panel) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < Block::kHeld; ++i) {
      held[i] = make_uint4(0, 0, 0, 0);
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

// Bit t: the top bit of half t. Halves are pairs of tokens, so even bits come from the lower ones.
__device__ inline uint32_t top_bits(const uint4& halves) {
  constexpr uint32_t kTop = 0x80008000u;
  const uint32_t bits = (halves.x & kTop) >> 15 | (halves.y & kTop) >> 13 |
                        (halves.z & kTop) >> 11 | (halves.w & kTop) >> 9;
  return (bits | bits >> 15) & 0xffu;
}

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

// The side that tokens come from, and their order: the larger moves earlier, and the top bit says
// that a token is on this side. Others join by rising key, the chosen leave by falling key.
struct Side {
  __device__ explicit Side(int32_t change) : joining(change > 0) {}

  // Of two upper halves of keys.
  __device__ uint32_t orders(uint32_t keys) const {
    return keys ^ (joining ? 0x80008000u : 0x7fff7fffu);
  }
  // Ties: the lower token joins first and leaves last.
  __device__ uint64_t order(uint32_t whole_key, uint32_t token) const {
    const uint32_t first = whole_key ^ (joining ? 0x80000000u : 0x7fffffffu);
    return static_cast<uint64_t>(first) << 32 | (joining ? ~token : token);
  }

  bool joining;
};

// The first order, in 16 bits, among the thread's tokens.
template <typename Block>
__device__ uint32_t best_order(Column<Block>& column, const Side& side) {
  uint32_t best = 0;
  column.for_each_panel([&](uint32_t) {
#pragma unroll
    for (int i = 0; i < Block::kHeld; ++i) {
      const uint4& keys = column.held[i];
      best = __vmaxu2(best, __vmaxu2(side.orders(keys.x), side.orders(keys.y)));
      best = __vmaxu2(best, __vmaxu2(side.orders(keys.z), side.orders(keys.w)));
    }
  });
  return max(best & 0xffffu, best >> 16);
}

// An order in 16 bits that at least `wanted` threads' best reach and not many more, found bit by
// bit; the least of the side where fewer threads have anything.
__device__ inline uint32_t bound_on_order(uint32_t best, int32_t wanted) {
  const int32_t enough = wanted + wanted / 4;
  uint32_t bound = 0x8000u;
  for (uint32_t bit = 0x4000u; bit != 0; bit >>= 1) {
    const int32_t reaching = __syncthreads_count(best >= (bound | bit) ? 1 : 0);
    if (reaching >= wanted) bound |= bit;
    if (reaching >= wanted && reaching <= enough) break;
  }
  return bound;
}

// Lists the side's tokens that reach the bound, in any order; the padding past the last token has
// no place in it.
template <typename Block>
__device__ void gather_moving(Column<Block>& column, const Side& side, uint32_t bound,
                              Moves& shared) {
  // A half's 15 lower bits and this carry into its top bit where they reach the bound's.
  const uint32_t rest = (0x8000u - (bound & 0x7fffu)) * 0x00010001u;
  const auto reaching = [&](uint32_t keys) {
    const uint32_t orders = side.orders(keys);
    return ((orders & 0x7fff7fffu) + rest) & orders;
  };
  column.for_each_panel([&](uint32_t panel) {
#pragma unroll
    for (int i = 0; i < Block::kHeld; ++i) {
      const uint4& keys = column.held[i];
      uint32_t found = top_bits(
          make_uint4(reaching(keys.x), reaching(keys.y), reaching(keys.z), reaching(keys.w)));
      for (; found != 0; found &= found - 1) {
        const uint32_t token = column.token(panel, i) + __ffs(static_cast<int>(found)) - 1;
        if (token >= column.num_tokens) break;
        const int32_t place = atomicAdd(&shared.num_candidates, 1);
        if (place < kMostMoving) shared.tokens[place] = token;
      }
    }
  });
}

// Leaves the tokens that move in shared.tokens, the first to move first.
template <typename Block>
__device__ Moved find_moving(const PairParams& params, Column<Block>& column, int32_t change,
                             Moves& shared) {
  const int32_t wanted = abs(change);
  if (wanted > kMostMoving) return Moved::too_many;
  const Side side(change);
  if (threadIdx.x == 0) shared.num_candidates = 0;
  const uint32_t best = best_order(column, side);
  const uint32_t bound = bound_on_order(best, wanted);  // its barriers also publish the 0
  if (best >= bound) gather_moving(column, side, bound, shared);
  __syncthreads();
  const int32_t count = shared.num_candidates;
  if (count > kMostMoving || count < wanted) return Moved::too_many;
  const auto expert = static_cast<int32_t>(blockIdx.x);
  const uint32_t upper = side.joining ? 0u : kChosenBit >> 16;
  for (auto c = static_cast<int32_t>(threadIdx.x); c < count; c += Block::kThreads) {
    const uint32_t token = shared.tokens[c];
    shared.orders[c] = side.order(whole_key(params, expert, token, upper), token);
  }
  __syncthreads();
  for (auto c = static_cast<int32_t>(threadIdx.x); c < count; c += Block::kThreads) {
    const uint64_t mine = shared.orders[c];
    int32_t rank = 0;
    for (int32_t i = 0; i < count; ++i) rank += shared.orders[i] > mine ? 1 : 0;
    const auto low = static_cast<uint32_t>(mine);
    if (rank < wanted) shared.tokens[rank] = side.joining ? ~low : low;
  }
  __syncthreads();
  return Moved::all;
}

}  // namespace penstock::cuda
