// SPDX-License-Identifier: Apache-2.0
//
// The second launch of token rounding and expert choice: one block an expert keeps the best of its
// tokens. Chosen pairs have the top bit of their key, so "the target's best keys" is all that is
// asked: surplus tokens fall out from below, missing ones come from the best others.
//
// Rounding moves less than a tile of tokens, so it looks for those: a bound that enough threads'
// own best reach leaves few candidates, whose order is counted (pair_moves.cuh). Where more tokens
// move, four counts of eight bits find the key at the target, the last two among the tokens that
// share its upper half. Nothing is sorted.
//
// Kept tokens are written chunk by chunk, with how many the chunks before have: from that follows
// an expert's part of the plan.
#include "backend/count_rounding.h"
#include "backend/ranking.h"
#include "backends/cuda/bandwidth/pair_moves.cuh"
#include "backends/cuda/bandwidth/pair_routers.cuh"

namespace penstock::cuda {
namespace {

// Each holds 16384 tokens, and 1024 threads of any fit on a multiprocessor: the more experts there
// are, the narrower, so that all of 512 have a place at once.
using WideBlock = ExpertBlock<1024, 2>;
using HalfBlock = ExpertBlock<512, 4>;
using NarrowBlock = ExpertBlock<256, 8>;

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
  double partial[32];
  uint32_t last_tie;                     // the last token that stays at the cut's key
  uint2 words[WideBlock::kPanelChunks];  // a panel's tokens, one bit each
  Moves moves;
};
static_assert(WideBlock::kPanelTokens == HalfBlock::kPanelTokens &&
                  WideBlock::kPanelTokens == NarrowBlock::kPanelTokens,
              "one layout for all");

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

// A token's key of this block's expert as far as a comparison with `other` needs it: the lower half
// is 0 where the upper ones differ.
__device__ uint32_t settled(const PairParams& params, int64_t token, uint32_t upper_half,
                            uint32_t other) {
  if (upper_half != (other & 0xffff0000u)) return upper_half;
  return whole_key(params, static_cast<int32_t>(blockIdx.x), static_cast<uint32_t>(token),
                   upper_half >> 16);
}

// 1 <= target <= tokens.
template <typename Block>
__device__ Cut find_cut(const PairParams& params, const uint16_t* column, int32_t target,
                        SelectShared& shared) {
  if (threadIdx.x == 0) {
    shared.prefix = 0;
    shared.left = target;
  }
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int d = threadIdx.x; d < kDigits; d += Block::kThreads) shared.digits[d] = 0;
    __syncthreads();
    const uint32_t prefix = shared.prefix;
    const uint32_t known = shift + kDigitBits == 32 ? 0u : 0xffffffffu << (shift + kDigitBits);
    const int64_t padded = ceil_div(params.num_tokens, Block::kThreads) * Block::kThreads;
    for (int64_t token = threadIdx.x; token < padded; token += Block::kThreads) {
      uint32_t key = token < params.num_tokens ? uint32_t{column[token]} << 16 : 0u;
      if (shift < 16 && token < params.num_tokens) key = settled(params, token, key, prefix);
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

// The sum over the block, in a fixed order.
template <typename Block>
__device__ double block_sum(double value, SelectShared& shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll 1  // registers are for keys
  for (int warp = 0; warp < Block::kWarps; ++warp) sum += shared.partial[warp];
  __syncthreads();
  return sum;
}

// NR-s: whether the chosen of the undecided tile weigh more than the others that would fill it.
template <typename Block>
__device__ bool chosen_weigh_more(const PairParams& params, const uint16_t* column, int32_t below,
                                  SelectShared& shared) {
  const auto tile = static_cast<int32_t>(params.options.tile);
  const Cut last_whole = below > 0 ? find_cut<Block>(params, column, below, shared) : Cut{};
  const Cut next_whole = find_cut<Block>(params, column, below + tile, shared);
  double leaving = 0.0;
  double joining = 0.0;
  double equal = 0.0;  // tokens at the key of last_whole
  for (int64_t token = threadIdx.x; token < params.num_tokens; token += Block::kThreads) {
    const uint32_t upper = column[token];
    const bool chosen = (upper << 16 & kChosenBit) != 0;
    if (chosen ? upper > last_whole.key >> 16 : upper < next_whole.key >> 16) continue;
    const auto expert = static_cast<int32_t>(blockIdx.x);
    const uint32_t key = whole_key(params, expert, static_cast<uint32_t>(token), upper);
    if (chosen) {
      if (below > 0 && key == last_whole.key) equal += 1.0;
      if (key < last_whole.key) leaving += ranking::weight(probability_of(key));
    } else if (key > next_whole.key) {
      joining += ranking::weight(probability_of(key));
    }
  }
  leaving = block_sum<Block>(leaving, shared);
  joining = block_sum<Block>(joining, shared);
  equal = block_sum<Block>(equal, shared);
  // Of tokens at a cut some are on either side; which does not matter to the sums.
  const double surplus = equal - static_cast<double>(last_whole.ties);
  if (below > 0 && surplus > 0.0)
    leaving += surplus * ranking::weight(probability_of(last_whole.key));
  joining += static_cast<double>(next_whole.ties) * ranking::weight(probability_of(next_whole.key));
  return leaving > joining;
}

// How many of `count` chosen tokens, or of any, the expert gets.
template <typename Block>
__device__ int32_t target_of(const PairParams& params, Column<Block>& column, int32_t count,
                             SelectShared& shared) {
  const auto expert = static_cast<int32_t>(blockIdx.x);
  if (params.kind == RouterKind::expert_choice) return params.expert_tokens;
  if (params.num_tokens < params.options.tile) return count;
  if (threadIdx.x == 0) {
    const uint64_t seed = params.seed == nullptr ? 0 : static_cast<uint64_t>(*params.seed);
    CountRounding rounding(params.options, params.num_tokens, seed);
    // Only one mode carries anything from expert to expert, and only it has all counts.
    const int32_t first = params.counts == nullptr ? expert : 0;
#pragma unroll 1  // registers are for keys
    for (int32_t e = first; e <= expert; ++e)
      shared.target = rounding.target(e, e < expert ? params.counts[e] : count);
  }
  __syncthreads();
  const int32_t target = shared.target;
  __syncthreads();
  if (target != kByScore) return target;
  const auto tile = static_cast<int32_t>(params.options.tile);
  const int32_t below = count / tile * tile;
  const bool up = chosen_weigh_more<Block>(params, column.keys, below, shared);
  column.hold(0);  // again, so that no register holds a key meanwhile
  return up ? below + tile : below;
}

// Calls fill(panel), which leaves tokens of the panel in shared.words, then visit(chunk, those of
// the chunk, how many are in the chunks before) on one thread for each chunk; returns how many
// there are.
template <typename Block, typename Fill, typename Visit>
__device__ int32_t visit_chunks(uint32_t num_tokens, SelectShared& shared, const Fill& fill,
                                const Visit& visit) {
  int32_t panels_before = 0;
  for (uint32_t panel = 0; panel < num_tokens; panel += Block::kPanelTokens) {
    fill(panel);
    __syncthreads();
    const bool has_chunk = threadIdx.x < Block::kPanelChunks;
    const uint2 tokens = has_chunk ? shared.words[threadIdx.x] : make_uint2(0, 0);
    const BlockScan scan = scan_block(__popc(tokens.x) + __popc(tokens.y), shared.moves);
    const uint32_t chunk = panel / kChunkTokens + threadIdx.x;
    if (has_chunk && chunk * uint32_t{kChunkTokens} < num_tokens)
      visit(chunk, tokens, panels_before + scan.before);
    panels_before += scan.all;
  }
  return panels_before;
}

// Fills shared.words with the tokens for which flag(token, upper half of its key) holds.
template <typename Block, typename Flag>
__device__ void fill_by_flag(const Column<Block>& column, uint32_t panel, SelectShared& shared,
                             const Flag& flag) {
  auto* words = reinterpret_cast<uint32_t*>(shared.words);
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < Block::kPanelTokens; i += Block::kThreads) {
    const uint32_t token = panel + i;
    const bool flagged = token < column.num_tokens && flag(token, uint32_t{column.keys[token]});
    const uint32_t word = __ballot_sync(kFullMask, flagged);
    if (threadIdx.x % 32 == 0) words[i / 32] = word;
  }
}

// Writes the tokens that fill(panel) leaves in shared.words.
template <typename Block, typename Fill>
__device__ void keep(const PairParams& params, SelectShared& shared, const Fill& fill) {
  const auto write = [&](uint32_t chunk, uint2 tokens, int32_t before) {
    const int64_t index = int64_t{chunk} * params.num_experts + blockIdx.x;
    params.kept[index] = tokens;
    params.before[index] = before;
  };
  const auto num_tokens = static_cast<uint32_t>(params.num_tokens);
  const int32_t total = visit_chunks<Block>(num_tokens, shared, fill, write);
  if (threadIdx.x == 0) params.totals[blockIdx.x] = total;
}

// Fills shared.words with the chosen tokens of the panel that is held; returns how many of them are
// this thread's.
template <typename Block>
__device__ int32_t list_chosen(const Column<Block>& column, uint32_t panel, SelectShared& shared) {
  auto* bytes = reinterpret_cast<uint8_t*>(shared.words);
  int32_t count = 0;
#pragma unroll
  for (int i = 0; i < Block::kHeld; ++i) {
    const uint32_t chosen = top_bits(column.held[i]);
    bytes[(column.token(panel, i) - panel) / kKeysOfVector] = static_cast<uint8_t>(chosen);
    count += __popc(chosen);
  }
  return count;
}

// Keeps the chosen tokens but for those that change sides, the first `moving` of shared.moves.
// Where one panel has all tokens, its chosen ones are listed already.
template <typename Block>
__device__ void keep_chosen(const PairParams& params, Column<Block>& column, int32_t moving,
                            SelectShared& shared) {
  keep<Block>(params, shared, [&](uint32_t panel) {
    if (column.num_tokens > Block::kPanelTokens) {
      column.hold(panel);
      list_chosen(column, panel, shared);
    }
    __syncthreads();
    auto* words = reinterpret_cast<uint32_t*>(shared.words);
    for (auto m = static_cast<int32_t>(threadIdx.x); m < moving; m += Block::kThreads) {
      const uint32_t token = shared.moves.tokens[m] - panel;  // wraps around below the panel
      if (token < Block::kPanelTokens) atomicXor(&words[token / 32], 1u << token % 32);
    }
  });
}

// Keeps the target's best tokens, the lower ones of those at the cut.
template <typename Block>
__device__ void keep_best(const PairParams& params, Column<Block>& column, int32_t target,
                          SelectShared& shared) {
  const auto keep_flagged = [&](const auto& flag) {
    keep<Block>(params, shared, [&](uint32_t panel) { fill_by_flag(column, panel, shared, flag); });
  };
  if (target == 0) return keep_flagged([](uint32_t, uint32_t) { return false; });
  const Cut cut = find_cut<Block>(params, column.keys, target, shared);
  const auto is_tie = [&](uint32_t token, uint32_t upper) {
    return settled(params, token, upper << 16, cut.key) == cut.key;
  };
  visit_chunks<Block>(
      column.num_tokens, shared,
      [&](uint32_t panel) { fill_by_flag(column, panel, shared, is_tie); },
      [&](uint32_t chunk, uint2 tokens, int32_t before) {
        int32_t rank = cut.ties - before;  // of the last that stays, among the chunk's ties
        const int32_t first_half = __popc(tokens.x);
        if (rank < 1 || rank > first_half + __popc(tokens.y)) return;
        const bool second = rank > first_half;
        uint32_t word = second ? tokens.y : tokens.x;
        if (second) rank -= first_half;
        for (; rank > 1; --rank) word &= word - 1;
        shared.last_tie = chunk * kChunkTokens + (second ? 32 : 0) + __ffs(word) - 1;
      });
  __syncthreads();
  const uint32_t last_tie = shared.last_tie;
  keep_flagged([&](uint32_t token, uint32_t upper) {
    const uint32_t key = settled(params, token, upper << 16, cut.key);
    return key > cut.key || (key == cut.key && token <= last_tie);
  });
}

template <typename Block>
__global__ void __launch_bounds__(Block::kThreads, 1024 / Block::kThreads)
    select_tokens_kernel(const PairParams params) {
  __shared__ SelectShared shared;
  if (threadIdx.x < 32) shared.moves.warp_sums[threadIdx.x] = 0;
  __syncthreads();
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  Column<Block> column;
  column.keys = params.keys + static_cast<int64_t>(blockIdx.x) * params.key_stride;
  column.num_tokens = static_cast<uint32_t>(params.num_tokens);
  column.hold(0);
  int32_t mine = 0;
  column.for_each_panel([&](uint32_t panel) { mine += list_chosen(column, panel, shared); });
  const int32_t chosen = scan_block(mine, shared.moves).all;
  const int32_t target = target_of(params, column, chosen, shared);
  // Where a thread holds many, its registers have no room for them beside the target's arithmetic.
  if constexpr (Block::kHeld > HalfBlock::kHeld) column.hold(0);
  const int32_t change = target - chosen;
  if (threadIdx.x == 0 && params.kind == RouterKind::token_rounding && change != 0) {
    const auto entry = change < 0 ? RouterReport::dropped : RouterReport::added;
    atomicAdd(&params.report[static_cast<int>(entry)], abs(change));
  }
  if (change == 0 || find_moving(params, column, change, shared.moves) == Moved::all)
    return keep_chosen(params, column, abs(change), shared);
  keep_best(params, column, target, shared);
}

template <typename Block>
void launch(const PairParams& params, const Context& context) {
  launch_dependent(
      {"select_tokens_kernel", dim3(static_cast<unsigned>(params.num_experts)), Block::kThreads},
      context, select_tokens_kernel<Block>, params);
}

}  // namespace

void launch_select_tokens(const PairParams& params, const Context& context) {
  if (params.num_tokens == 0) return;
  const int64_t at_once = multiprocessors(context);
  if (params.num_experts <= at_once) return launch<WideBlock>(params, context);
  if (params.num_experts <= 2 * at_once) return launch<HalfBlock>(params, context);
  launch<NarrowBlock>(params, context);
}

}  // namespace penstock::cuda
