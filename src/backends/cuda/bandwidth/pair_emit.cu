// SPDX-License-Identifier: Apache-2.0
//
// The last launch of the routers without a fixed K: from who was kept to offsets, ids, scores and
// the plan. A block takes one chunk of tokens. A token's slots are its top K that stayed, in their
// order, then the others by rising id. Where the chunk's slots begin, and where its rows of every
// expert do, follows from how many tokens each expert keeps, and keeps in the chunks before.
#include "backends/cuda/bandwidth/pair_routers.cuh"
#include "backends/cuda/bandwidth/pair_routers.h"
#include "backends/cuda/bandwidth/team.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaskWords = kMaxPairExperts / 32;
constexpr int kMaskStride = kMaskWords + 1;  // so that a warp's writes meet different banks
constexpr int kHalves = kChunkTokens / 32;
static_assert(kHalves == 2,
              "an expert's tokens of a chunk are a uint2, and two warps scan a chunk");

struct EmitShared {
  uint32_t masks[kChunkTokens][kMaskStride];   // a token's experts, less those of `staying`
  uint32_t staying[kChunkTokens][kMaskWords];  // bit k: the token's choice k stays
  uint2 kept[kMaxPairExperts];                 // an expert's tokens of the chunk
  int32_t rows[kMaxPairExperts];               // an expert's first row of the chunk
  int32_t begins[kChunkTokens + 1];            // a token's first slot
  int32_t sums[2][kWarps];
};

struct Totals {
  int32_t before;  // pairs of the chunks before
  int32_t all;
};

// The sums over the block of both; every thread gets them.
__device__ Totals block_sums(const Totals& mine, EmitShared& shared) {
  const auto before = static_cast<int32_t>(__reduce_add_sync(kFullMask, mine.before));
  const auto all = static_cast<int32_t>(__reduce_add_sync(kFullMask, mine.all));
  if (threadIdx.x % 32 == 0) {
    shared.sums[0][threadIdx.x / 32] = before;
    shared.sums[1][threadIdx.x / 32] = all;
  }
  __syncthreads();
  Totals sums = {};
  for (int warp = 0; warp < kWarps; ++warp) {
    sums.before += shared.sums[0][warp];
    sums.all += shared.sums[1][warp];
  }
  __syncthreads();
  return sums;
}

// A threshold's masks are there as they are, and so are the pairs of every chunk. Tokens past the
// last get empty masks.
__device__ Totals load_masks(const PairParams& params, int64_t first, EmitShared& shared) {
  for (int i = threadIdx.x; i < kChunkTokens * params.mask_words; i += kThreads) {
    const int64_t token = first + i / params.mask_words;
    const bool there = token < params.num_tokens;
    shared.masks[i / params.mask_words][i % params.mask_words] =
        there ? params.masks[first * params.mask_words + i] : 0u;
  }
  const auto mine = static_cast<int32_t>(blockIdx.x);
  Totals totals = {};
  for (int32_t chunk = threadIdx.x; chunk < params.num_chunks; chunk += kThreads) {
    totals.all += params.chunks[chunk];
    if (chunk < mine) totals.before += params.chunks[chunk];
  }
  return block_sums(totals, shared);
}

// Experts say which tokens they keep. A thread has a run of experts, whose rows follow those of the
// threads before; the first block writes the plan's arrays of experts.
__device__ Totals load_experts(const PairParams& params, EmitShared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t each = (params.num_experts + kThreads - 1) / kThreads;
  const int32_t first = min(thread * each, params.num_experts);
  const int32_t last = min(first + each, params.num_experts);
  const int64_t chunk = int64_t{blockIdx.x} * params.num_experts;
  const bool any = params.num_chunks > 0;  // otherwise nothing was written before this launch
  Totals mine = {};
  for (int32_t e = first; e < last; ++e) {
    const int32_t before = any ? params.before[chunk + e] : 0;
    shared.kept[e] = any ? params.kept[chunk + e] : make_uint2(0, 0);
    shared.rows[e] = before;
    mine.before += before;
    mine.all += any ? params.totals[e] : 0;
  }
  const int32_t end = warp_inclusive_sum(mine.all);
  const Totals totals = block_sums(mine, shared);
  int32_t offset = end - mine.all;
  for (int warp = 0; warp < thread / 32; ++warp) offset += shared.sums[1][warp];
  const bool writes = blockIdx.x == 0 && params.plan.expert_counts != nullptr;
  for (int32_t e = first; e < last; ++e) {
    const int32_t total = any ? params.totals[e] : 0;
    shared.rows[e] += offset;
    if (writes) params.plan.expert_counts[e] = total;
    if (writes) params.plan.expert_offsets[e] = offset;
    offset += total;
  }
  if (writes && thread == 0) params.plan.expert_offsets[params.num_experts] = totals.all;
  __syncthreads();
  return totals;
}

// Squares of 32 experts by 32 tokens, turned around by a warp each.
__device__ void turn_masks(const PairParams& params, EmitShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int square = threadIdx.x / 32; square < kHalves * params.mask_words; square += kWarps) {
    const int word = square / kHalves;
    const int half = square % kHalves;
    const int expert = word * 32 + lane;
    uint32_t tokens = 0;  // of this lane's expert
    if (expert < params.num_experts)
      tokens = half == 0 ? shared.kept[expert].x : shared.kept[expert].y;
    uint32_t mine = 0;  // the experts of this lane's token
    for (int token = 0; token < 32; ++token) {
      const uint32_t experts = __ballot_sync(kFullMask, (tokens >> token & 1u) != 0);
      if (lane == token) mine = experts;
    }
    shared.masks[half * 32 + lane][word] = mine;
  }
  __syncthreads();
}

// Where the slots of each of the chunk's tokens begin; the first thread of a token says it.
__device__ void place_tokens(const PairParams& params, int32_t before, EmitShared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  int32_t count = 0;
  if (thread < kChunkTokens) {
    for (int word = 0; word < params.mask_words; ++word)
      count += __popc(shared.masks[thread][word]);
  }
  const int32_t end = warp_inclusive_sum(count);
  if (thread % 32 == 31) shared.sums[0][thread / 32] = end;
  __syncthreads();
  if (thread < kChunkTokens) {
    const int32_t base = thread < 32 ? before : before + shared.sums[0][0];
    shared.begins[thread] = base + end - count;
    if (thread == kChunkTokens - 1) shared.begins[kChunkTokens] = base + end;
  }
  __syncthreads();
}

struct Pair {
  int32_t token;  // of the chunk
  int32_t expert;
  int32_t slot;
  float score;
};

// Slots at or past the last are dropped.
__device__ void write_pair(const PairParams& params, int64_t first, const Pair& pair,
                           const EmitShared& shared) {
  if (pair.slot >= params.num_slots) return;
  params.ids[pair.slot] = pair.expert;
  params.scores[pair.slot] = pair.score;
  if (params.plan.slot_to_row == nullptr) return;
  const uint2 kept = shared.kept[pair.expert];
  const uint32_t below = (1u << pair.token % 32) - 1u;
  int32_t row = shared.rows[pair.expert] + __popc((pair.token < 32 ? kept.x : kept.y) & below);
  if (pair.token >= 32) row += __popc(kept.x);
  params.plan.slot_to_row[pair.slot] = row;
  params.plan.row_to_slot[row] = pair.slot;
  params.plan.row_to_token[row] = static_cast<int32_t>(first + pair.token);
}

// Calls visit(i, token of the chunk, k) for the chunk's choices, of which a thread has every
// kThreads-th.
template <typename Visit>
__device__ void for_each_choice(const PairParams& params, int64_t first, const Visit& visit) {
  const int64_t tokens = min(params.num_tokens - first, int64_t{kChunkTokens});
  const int32_t choices = static_cast<int32_t>(tokens) * params.top_k;
  for (int32_t i = threadIdx.x; i < choices; i += kThreads) {
    const int32_t token = i / params.top_k;
    visit(params.top[first * params.top_k + i], token, i - token * params.top_k);
  }
}

// The top K that stayed. They leave the masks, which then have the others.
__device__ void write_top(const PairParams& params, int64_t first, EmitShared& shared) {
  for_each_choice(params, first, [&](const TopChoice& choice, int32_t token, int32_t k) {
    const uint32_t bit = 1u << choice.expert % 32;
    const uint32_t before = atomicAnd(&shared.masks[token][choice.expert / 32], ~bit);
    if ((before & bit) != 0) atomicOr(&shared.staying[token][k / 32], 1u << k % 32);
  });
  __syncthreads();
  for_each_choice(params, first, [&](const TopChoice& choice, int32_t token, int32_t k) {
    const uint32_t* staying = shared.staying[token];
    if ((staying[k / 32] >> k % 32 & 1u) == 0) return;
    int32_t slot = shared.begins[token] + __popc(staying[k / 32] & ((1u << k % 32) - 1u));
    for (int32_t word = 0; word < k / 32; ++word) slot += __popc(staying[word]);
    write_pair(params, first, {token, choice.expert, slot, choice.score}, shared);
  });
}

// Neighbouring threads have the words of one token.
__device__ void write_others(const PairParams& params, int64_t first, const EmitShared& shared) {
  const bool normed = params.score != PairScore::sigmoid;
  for (int i = threadIdx.x; i < kChunkTokens * params.mask_words; i += kThreads) {
    const int token = i / params.mask_words;
    const int word = i % params.mask_words;
    uint32_t others = shared.masks[token][word];
    if (others == 0) continue;
    int32_t slot = shared.begins[token];
    for (int k = 0; k < params.top_k; k += 32) slot += __popc(shared.staying[token][k / 32]);
    for (int before = 0; before < word; ++before) slot += __popc(shared.masks[token][before]);
    const float* row = params.logits + (first + token) * params.logits_stride;
    const TokenNorm norm = normed ? params.norms[first + token] : TokenNorm{};
    for (; others != 0; others &= others - 1) {
      const int32_t expert = word * 32 + __ffs(static_cast<int>(others)) - 1;
      const float score = score_of(params.score, norm, row[expert]);
      write_pair(params, first, {token, expert, slot++, score}, shared);
    }
  }
}

__device__ void write_report(const PairParams& params, int32_t pairs) {
  const auto slots = static_cast<int32_t>(params.num_slots);
  params.report[static_cast<int>(RouterReport::pairs)] = min(pairs, slots);
  if (pairs > slots) params.report[static_cast<int>(RouterReport::dropped)] = pairs - slots;
  const bool rounded =
      params.kind == RouterKind::token_rounding && params.num_tokens >= params.options.tile;
  params.report[static_cast<int>(RouterReport::rounded)] = rounded ? 1 : 0;
}

// The offsets of the chunk's tokens, and what the report says of them.
__device__ void write_offsets(const PairParams& params, int64_t first, const EmitShared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto slots = static_cast<int32_t>(params.num_slots);
  if (thread >= kChunkTokens) return;
  const bool there = first + thread < params.num_tokens;
  const int32_t end = min(shared.begins[thread + 1], slots);
  if (there) params.token_offsets[first + thread + 1] = end;
  const bool empty = there && end == min(shared.begins[thread], slots);
  const auto without = __popc(__ballot_sync(kFullMask, empty));
  if (thread % 32 == 0 && without != 0)
    atomicAdd(&params.report[static_cast<int>(RouterReport::tokens_without_expert)], without);
}

// Every block has a share of the slots past the last pair.
__device__ void write_padding(const PairParams& params, int32_t pairs) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t slot = min(int64_t{pairs}, params.num_slots) + thread; slot < params.num_slots;
       slot += step) {
    params.ids[slot] = -1;
    params.scores[slot] = 0.0f;
    if (params.plan.slot_to_row != nullptr) params.plan.slot_to_row[slot] = -1;
  }
}

__global__ void __launch_bounds__(kThreads, 2) emit_pairs_kernel(const PairParams params) {
  __shared__ EmitShared shared;
  for (int i = threadIdx.x; i < kChunkTokens * kMaskWords; i += kThreads)
    shared.staying[i / kMaskWords][i % kMaskWords] = 0;
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunkTokens;
  const bool by_threshold = params.kind == RouterKind::threshold;
  const Totals pairs =
      by_threshold ? load_masks(params, first, shared) : load_experts(params, shared);
  if (!by_threshold) turn_masks(params, shared);
  place_tokens(params, pairs.before, shared);
  write_offsets(params, first, shared);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    params.token_offsets[0] = 0;
    write_report(params, pairs.all);
  }
  if (params.top_k > 0) write_top(params, first, shared);
  write_others(params, first, shared);
  write_padding(params, pairs.all);
}

}  // namespace

void launch_emit_pairs(const PairParams& params, const Context& context) {
  // Without tokens one block still writes the first offset, the report and the padding.
  const auto blocks = static_cast<unsigned>(params.num_chunks > 0 ? params.num_chunks : 1);
  launch_dependent({"emit_pairs_kernel", dim3(blocks), kThreads}, context, emit_pairs_kernel,
                   params);
}

}  // namespace penstock::cuda
