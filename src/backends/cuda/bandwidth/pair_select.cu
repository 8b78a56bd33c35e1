// SPDX-License-Identifier: Apache-2.0
//
// The second launch of token rounding and expert choice: one block an expert keeps the best of its
// tokens. Chosen pairs have the top bit of their key, so "the target's best keys" is all that is
// asked: surplus tokens fall out from below, missing ones come from the best others.
//
// Rounding moves less than a tile of tokens, so it looks for those: a bound that enough threads'
// own best reach leaves few candidates, whose order is counted (pair_moves.cuh). Where more tokens
// move, four counts of eight bits find the key at the target. Nothing is sorted.
#include "backend/count_rounding.h"
#include "backend/ranking.h"
#include "backends/cuda/bandwidth/pair_moves.cuh"
#include "backends/cuda/bandwidth/pair_routers.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = kMoveThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kDigits = 256;
constexpr int kDigitBits = 8;

// The target's best are the tokens of larger keys, and the first `ties` of equal ones.
struct Cut {
  uint32_t key = 0xffffffffu;
  int32_t ties = 0;
};

struct SelectShared {
  int32_t digits[kDigits];
  uint32_t prefix;
  int32_t left;  // of the target, among keys that share the prefix
  int32_t target;
  double partial[kWarps];
  int32_t warp_ties[kWarps];
  Moves moves;
};

__device__ bool in_first_warp() { return threadIdx.x < 32; }

// Warp 0 finds the digit, from the largest down, at which `left` tokens are reached.
__device__ void choose_digit(SelectShared& shared, int shift) {
  constexpr int kPerLane = kDigits / 32;
  const int lane = static_cast<int>(threadIdx.x);
  int32_t sum = 0;
  for (int i = 0; i < kPerLane; ++i) sum += shared.digits[kDigits - 1 - lane * kPerLane - i];
  const int32_t inclusive = warp_inclusive_sum(sum);
  int32_t before = inclusive - sum;
  const int32_t left = shared.left;
  __syncwarp();  // every lane has read `left` before one writes it
  if (before >= left || left > inclusive) return;
  int digit = kDigits - 1 - lane * kPerLane;
  while (before + shared.digits[digit] < left) before += shared.digits[digit--];
  shared.prefix |= static_cast<uint32_t>(digit) << shift;
  shared.left = left - before;
}

// 1 <= target <= tokens.
__device__ Cut find_cut(const PairParams& params, const uint32_t* column, int32_t target,
                        SelectShared& shared) {
  if (threadIdx.x == 0) {
    shared.prefix = 0;
    shared.left = target;
  }
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int d = threadIdx.x; d < kDigits; d += kThreads) shared.digits[d] = 0;
    __syncthreads();
    const uint32_t prefix = shared.prefix;
    const uint32_t known = shift + kDigitBits == 32 ? 0u : 0xffffffffu << (shift + kDigitBits);
    const int64_t padded = ceil_div(params.num_tokens, kThreads) * kThreads;
    for (int64_t token = threadIdx.x; token < padded; token += kThreads) {
      const uint32_t key = token < params.num_tokens ? column[token] : 0u;
      const bool counts = token < params.num_tokens && (key & known) == prefix;
      const uint32_t digit = counts ? key >> shift & (kDigits - 1) : kDigits;
      // Most keys share a few digits: one addition for all the lanes that agree.
      const unsigned peers = __match_any_sync(kFullMask, digit);
      const bool first = (peers & ((1u << threadIdx.x % 32) - 1u)) == 0;
      if (counts && first) atomicAdd(&shared.digits[digit], __popc(peers));
    }
    __syncthreads();
    if (in_first_warp()) choose_digit(shared, shift);
    __syncthreads();
  }
  const Cut cut = {shared.prefix, shared.left};
  __syncthreads();
  return cut;
}

__device__ float probability_of(uint32_t key) {
  const uint32_t bits = key & ~kChosenBit;
  return bits == 0 ? __uint_as_float(0x7fc00000u) : __uint_as_float(bits - 1u);
}

// The sum over the block, in a fixed order.
__device__ double block_sum(double value, SelectShared& shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) sum += shared.partial[warp];
  __syncthreads();
  return sum;
}

// NR-s: whether the chosen of the undecided tile weigh more than the others that would fill it.
__device__ bool chosen_weigh_more(const PairParams& params, const uint32_t* column, int32_t below,
                                  SelectShared& shared) {
  const auto tile = static_cast<int32_t>(params.options.tile);
  const Cut last_whole = below > 0 ? find_cut(params, column, below, shared) : Cut{};
  const Cut next_whole = find_cut(params, column, below + tile, shared);
  double leaving = 0.0;
  double joining = 0.0;
  double equal = 0.0;  // tokens at the key of last_whole
  for (int64_t token = threadIdx.x; token < params.num_tokens; token += kThreads) {
    const uint32_t key = column[token];
    if ((key & kChosenBit) != 0) {
      if (below > 0 && key == last_whole.key) equal += 1.0;
      if (key < last_whole.key) leaving += ranking::weight(probability_of(key));
    } else if (key > next_whole.key) {
      joining += ranking::weight(probability_of(key));
    }
  }
  leaving = block_sum(leaving, shared);
  joining = block_sum(joining, shared);
  equal = block_sum(equal, shared);
  // Of tokens at a cut some are on either side; which does not matter to the sums.
  const double surplus = equal - static_cast<double>(last_whole.ties);
  if (below > 0 && surplus > 0.0)
    leaving += surplus * ranking::weight(probability_of(last_whole.key));
  joining += static_cast<double>(next_whole.ties) * ranking::weight(probability_of(next_whole.key));
  return leaving > joining;
}

// How many of `count` chosen tokens, or of any, the expert gets.
__device__ int32_t target_of(const PairParams& params, const uint32_t* column, int32_t count,
                             SelectShared& shared) {
  const auto expert = static_cast<int32_t>(blockIdx.x);
  if (params.kind == RouterKind::expert_choice) return params.expert_tokens;
  if (params.num_tokens < params.options.tile) return count;
  if (threadIdx.x == 0) {
    const uint64_t seed = params.seed == nullptr ? 0 : static_cast<uint64_t>(*params.seed);
    CountRounding rounding(params.options, params.num_tokens, seed);
    // Only one mode carries anything from expert to expert, and only it has all counts.
    const int32_t first = params.counts == nullptr ? expert : 0;
    for (int32_t e = first; e < expert; ++e) rounding.target(e, params.counts[e]);
    shared.target = rounding.target(expert, count);
  }
  __syncthreads();
  const int32_t target = shared.target;
  __syncthreads();
  if (target != kByScore) return target;
  const auto tile = static_cast<int32_t>(params.options.tile);
  const int32_t below = count / tile * tile;
  return chosen_weigh_more(params, column, below, shared) ? below + tile : below;
}

// A warp's 32 tokens of the expert: those kept, and what that changes in the pairs of their chunk.
__device__ void write_kept(const PairParams& params, int64_t token, bool chosen, bool kept) {
  const unsigned kept_lanes = __ballot_sync(kFullMask, kept);
  const unsigned chosen_lanes = __ballot_sync(kFullMask, chosen);
  if (threadIdx.x % 32 != 0 || token >= params.num_tokens) return;
  params.kept[static_cast<int64_t>(blockIdx.x) * params.token_words + token / 32] = kept_lanes;
  const int32_t change = __popc(kept_lanes) - __popc(chosen_lanes);
  if (change != 0) atomicAdd(&params.chunks[token / kChunkTokens], change);
}

// Keeps the cut's best tokens, the lower ones of those at the cut.
__device__ void keep_best(const PairParams& params, const uint32_t* column, const Cut& cut,
                          SelectShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int32_t ties_before = 0;
  for (int64_t base = 0; base < params.num_tokens; base += kThreads) {
    const int64_t token = base + threadIdx.x;
    const bool there = token < params.num_tokens;
    const uint32_t key = there ? column[token] : 0u;
    const bool tie = there && key == cut.key;
    const unsigned ties = __ballot_sync(kFullMask, tie);
    if (lane == 0) shared.warp_ties[warp] = __popc(ties);
    __syncthreads();
    int32_t rank = ties_before + __popc(ties & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) rank += shared.warp_ties[w];
      ties_before += shared.warp_ties[w];
    }
    __syncthreads();
    const bool kept = there && (key > cut.key || (tie && rank < cut.ties));
    write_kept(params, token, there && (key & kChosenBit) != 0, kept);
  }
}

// Keeps the chosen tokens but for those that change sides, which are `side`'s up to `last`.
__device__ void keep_moved(const PairParams& params, const uint32_t* column, const Side& side,
                           uint64_t last) {
  for (int64_t base = 0; base < params.num_tokens; base += kThreads) {
    const int64_t token = base + threadIdx.x;
    const bool there = token < params.num_tokens;
    const uint32_t key = there ? column[token] : 0u;
    const bool chosen = there && (key & kChosenBit) != 0;
    const bool moves = there && side.order(key, token) >= last;
    write_kept(params, token, chosen, chosen != moves);
  }
}

__global__ void __launch_bounds__(kThreads, 2) select_tokens_kernel(const PairParams params) {
  __shared__ SelectShared shared;
  const uint32_t* column = params.keys + static_cast<int64_t>(blockIdx.x) * params.num_tokens;
  const ColumnSummary summary = summarise(column, params.num_tokens, shared.moves);
  const int32_t target = target_of(params, column, summary.chosen, shared);
  const int32_t change = target - summary.chosen;
  if (threadIdx.x == 0 && params.kind == RouterKind::token_rounding && change != 0) {
    const auto entry = change < 0 ? RouterReport::dropped : RouterReport::added;
    atomicAdd(&params.report[static_cast<int>(entry)], abs(change));
  }
  const Side side(change);
  uint64_t last = kNobodyMoves;
  if (change != 0) {
    const uint32_t best = change > 0 ? summary.best_other : summary.best_leaving;
    last = last_to_move({column, params.num_tokens}, side, best, abs(change), shared.moves);
  }
  if (last != kTooManyMove) return keep_moved(params, column, side, last);
  const Cut nothing;
  keep_best(params, column, target > 0 ? find_cut(params, column, target, shared) : nothing,
            shared);
}

}  // namespace

void launch_select_tokens(const PairParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>(params.num_experts);
  select_tokens_kernel<<<blocks, kThreads, 0, stream>>>(params);
  check_launch("select_tokens_kernel");
}

}  // namespace penstock::cuda
