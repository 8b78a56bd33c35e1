// SPDX-License-Identifier: Apache-2.0
//
// The last launch of the routers without a fixed K: from who was kept to offsets, ids and scores. A
// block takes one chunk of tokens; where its slots begin follows from the counts of the chunks
// before. A warp writes a token: its top K that stayed, in their order, then the others by rising
// id.
#include "backends/cuda/bandwidth/pair_routers.cuh"
#include "backends/cuda/bandwidth/pair_routers.h"
#include "backends/cuda/bandwidth/team.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaskWords = kMaxPairExperts / 32;
constexpr int kMaskStride = kMaskWords + 1;  // so that a warp's writes meet different banks

struct EmitShared {
  uint32_t masks[kChunkTokens][kMaskStride];  // a token's experts
  int32_t begins[kChunkTokens + 1];           // a token's first slot
  int32_t sums[kWarps];
};

// The sum over the block; every thread gets it.
__device__ int32_t block_sum(int32_t value, EmitShared& shared) {
  const auto sum = static_cast<int32_t>(__reduce_add_sync(kFullMask, value));
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = sum;
  __syncthreads();
  int32_t total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += shared.sums[warp];
  __syncthreads();
  return total;
}

__device__ int32_t sum_of_chunks(const PairParams& params, int32_t end, EmitShared& shared) {
  int32_t sum = 0;
  for (int32_t chunk = threadIdx.x; chunk < end; chunk += kThreads) sum += params.chunks[chunk];
  return block_sum(sum, shared);
}

// The chunk's masks, which a threshold has as they are. Where experts say which tokens they keep, a
// warp turns squares of 32 experts by 32 tokens around. Tokens past the last get empty masks.
__device__ void load_masks(const PairParams& params, int64_t first, EmitShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (params.kind == RouterKind::threshold) {
    for (int i = threadIdx.x; i < kChunkTokens * params.mask_words; i += kThreads) {
      const int64_t token = first + i / params.mask_words;
      const bool there = token < params.num_tokens;
      shared.masks[i / params.mask_words][i % params.mask_words] =
          there ? params.masks[first * params.mask_words + i] : 0u;
    }
    return;
  }
  constexpr int kTokenWords = kChunkTokens / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int square = warp; square < kTokenWords * params.mask_words; square += kWarps) {
    const int word = square / kTokenWords;
    const int expert = word * 32 + lane;
    const int64_t column = first / 32 + square % kTokenWords;
    uint32_t tokens = 0;  // of this lane's expert
    if (expert < params.num_experts && column < params.token_words)
      tokens = params.kept[static_cast<int64_t>(expert) * params.token_words + column];
    uint32_t mine = 0;  // the experts of this lane's token
    for (int token = 0; token < 32; ++token) {
      const uint32_t experts = __ballot_sync(kFullMask, (tokens >> token & 1u) != 0);
      if (lane == token) mine = experts;
    }
    shared.masks[square % kTokenWords * 32 + lane][word] = mine;
  }
}

// Where the slots of each of the chunk's tokens begin; the first thread of a token says it.
__device__ void place_tokens(const PairParams& params, int32_t before, EmitShared& shared) {
  static_assert(kChunkTokens == 64, "two warps scan a chunk");
  const int thread = static_cast<int>(threadIdx.x);
  int32_t count = 0;
  if (thread < kChunkTokens) {
    for (int word = 0; word < params.mask_words; ++word)
      count += __popc(shared.masks[thread][word]);
  }
  const int32_t end = warp_inclusive_sum(count);
  if (thread % 32 == 31) shared.sums[thread / 32] = end;
  __syncthreads();
  if (thread < kChunkTokens) {
    const int32_t base = thread < 32 ? before : before + shared.sums[0];
    shared.begins[thread] = base + end - count;
    if (thread == kChunkTokens - 1) shared.begins[kChunkTokens] = base + end;
  }
  __syncthreads();
}

// One token by one warp. Slots at or past the last are dropped.
__device__ void write_token(const PairParams& params, int64_t token, uint32_t* mask, int32_t next) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto slots = static_cast<int32_t>(params.num_slots);
  const float* row = params.logits + token * params.logits_stride;
  const bool normed = params.score != PairScore::sigmoid;
  const TokenNorm norm = normed ? params.norms[token] : TokenNorm{};
  const auto write = [&](int32_t slot, int32_t expert) {
    if (slot >= slots) return;
    params.ids[slot] = expert;
    params.scores[slot] = score_of(params.score, norm, row[expert]);
  };
  for (int32_t first = 0; first < params.top_k; first += 32) {
    const bool there = first + lane < params.top_k;
    const int32_t expert = there ? params.top[token * params.top_k + first + lane] : 0;
    const uint32_t bit = 1u << (expert % 32);
    const bool stays = there && (mask[expert / 32] & bit) != 0;
    const unsigned staying = __ballot_sync(kFullMask, stays);
    if (stays) {
      write(next + __popc(staying & ((1u << lane) - 1u)), expert);
      atomicAnd(&mask[expert / 32], ~bit);
    }
    next += __popc(staying);
  }
  __syncwarp();  // the mask has only the others left
  uint32_t left = lane < params.mask_words ? mask[lane] : 0u;
  const int32_t count = __popc(left);
  int32_t slot = next + warp_inclusive_sum(count) - count;
  for (; left != 0; left &= left - 1) write(slot++, lane * 32 + __ffs(static_cast<int>(left)) - 1);
}

__device__ void write_report(const PairParams& params, int32_t pairs) {
  const auto slots = static_cast<int32_t>(params.num_slots);
  params.report[static_cast<int>(RouterReport::pairs)] = min(pairs, slots);
  if (pairs > slots) params.report[static_cast<int>(RouterReport::dropped)] = pairs - slots;
  const bool rounded =
      params.kind == RouterKind::token_rounding && params.num_tokens >= params.options.tile;
  params.report[static_cast<int>(RouterReport::rounded)] = rounded ? 1 : 0;
}

__global__ void __launch_bounds__(kThreads) emit_pairs_kernel(const PairParams params) {
  __shared__ EmitShared shared;
  const int thread = static_cast<int>(threadIdx.x);
  const auto slots = static_cast<int32_t>(params.num_slots);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunkTokens;
  load_masks(params, first, shared);
  const int32_t before = sum_of_chunks(params, static_cast<int32_t>(blockIdx.x), shared);
  const int32_t pairs = sum_of_chunks(params, params.num_chunks, shared);
  place_tokens(params, before, shared);

  if (thread < kChunkTokens) {
    const bool there = first + thread < params.num_tokens;
    const int32_t end = min(shared.begins[thread + 1], slots);
    if (there) params.token_offsets[first + thread + 1] = end;
    const bool empty = there && end == min(shared.begins[thread], slots);
    const auto without = __popc(__ballot_sync(kFullMask, empty));
    if (thread % 32 == 0 && without != 0)
      atomicAdd(&params.report[static_cast<int>(RouterReport::tokens_without_expert)], without);
  }
  if (blockIdx.x == 0 && thread == 0) {
    params.token_offsets[0] = 0;
    write_report(params, pairs);
  }
  for (int i = thread / 32; i < kChunkTokens; i += kWarps) {
    if (first + i >= params.num_tokens) break;
    write_token(params, first + i, shared.masks[i], shared.begins[i]);
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t start = min(pairs, slots) + static_cast<int64_t>(blockIdx.x) * kThreads + thread;
  for (int64_t pad = start; pad < params.num_slots; pad += step) {
    params.ids[pad] = -1;
    params.scores[pad] = 0.0f;
  }
}

}  // namespace

void launch_emit_pairs(const PairParams& params, cudaStream_t stream) {
  // Without tokens one block still writes the first offset, the report and the padding.
  const auto blocks = static_cast<unsigned>(params.num_chunks > 0 ? params.num_chunks : 1);
  emit_pairs_kernel<<<blocks, kThreads, 0, stream>>>(params);
  check_launch("emit_pairs_kernel");
}

}  // namespace penstock::cuda
