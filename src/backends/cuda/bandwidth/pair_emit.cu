// SPDX-License-Identifier: Apache-2.0
//
// The last launch of the routers without a fixed K: from masks to offsets, ids and scores. A block
// takes one chunk of tokens; where its slots begin follows from the counts of the chunks before.
#include "backends/cuda/bandwidth/pair_routers.cuh"
#include "backends/cuda/bandwidth/team.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = kChunkTokens;
constexpr int kWarps = kThreads / 32;

struct EmitShared {
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

// The sum over the threads before this one.
__device__ int32_t block_exclusive_sum(int32_t value, EmitShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int32_t inclusive = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t below = __shfl_up_sync(kFullMask, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  if (lane == 31) shared.sums[warp] = inclusive;
  __syncthreads();
  int32_t before = inclusive - value;
  for (int w = 0; w < warp; ++w) before += shared.sums[w];
  __syncthreads();
  return before;
}

__device__ int32_t sum_of_chunks(const PairParams& params, int32_t end, EmitShared& shared) {
  int32_t sum = 0;
  for (int32_t chunk = threadIdx.x; chunk < end; chunk += kThreads) sum += params.chunks[chunk];
  return block_sum(sum, shared);
}

// Writes the pairs of one token to the slots [next, end).
struct TokenWriter {
  const PairParams& params;
  int64_t token;
  int32_t next;
  int32_t end;

  __device__ void write(int32_t expert) {
    if (next >= end) return;
    const float logit = params.logits[token * params.logits_stride + expert];
    float score = 0.0f;
    if (params.score == PairScore::sigmoid) {
      score = 1.0f / (1.0f + expf(-logit));
    } else {
      const TokenNorm norm = params.norms[token];
      score = expf(logit - norm.shift) / norm.divisor;
    }
    params.ids[next] = expert;
    params.scores[next] = score;
    ++next;
  }
};

// Its top K that stayed, in their order, then the others by rising id.
__device__ void write_token(TokenWriter writer) {
  const PairParams& params = writer.params;
  const uint32_t* mask = params.masks + writer.token * params.mask_words;
  const int32_t* top = params.top + writer.token * params.top_k;
  for (int32_t k = 0; k < params.top_k; ++k) {
    if ((mask[top[k] / 32] >> (top[k] % 32) & 1u) != 0) writer.write(top[k]);
  }
  for (int32_t word = 0; word < params.mask_words; ++word) {
    uint32_t left = mask[word];
    for (int32_t k = 0; k < params.top_k; ++k) {
      if (top[k] / 32 == word) left &= ~(1u << (top[k] % 32));
    }
    for (; left != 0; left &= left - 1) writer.write(word * 32 + __ffs(static_cast<int>(left)) - 1);
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

__global__ void __launch_bounds__(kThreads) emit_pairs_kernel(const PairParams params) {
  __shared__ EmitShared shared;
  const auto slots = static_cast<int32_t>(params.num_slots);
  const int32_t first = sum_of_chunks(params, static_cast<int32_t>(blockIdx.x), shared);
  const int32_t pairs = sum_of_chunks(params, params.num_chunks, shared);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool there = token < params.num_tokens;
  int32_t count = 0;
  if (there) {
    const uint32_t* mask = params.masks + token * params.mask_words;
    for (int32_t word = 0; word < params.mask_words; ++word) count += __popc(mask[word]);
  }
  const int32_t begin = first + block_exclusive_sum(count, shared);
  const int32_t slot = min(begin, slots);
  const int32_t end = min(begin + count, slots);
  if (there) {
    params.token_offsets[token + 1] = end;
    write_token({params, token, slot, end});
  }
  const auto without = __popc(__ballot_sync(kFullMask, there && end == slot));
  if (threadIdx.x % 32 == 0 && without != 0) {
    atomicAdd(&params.report[static_cast<int>(RouterReport::tokens_without_expert)], without);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    params.token_offsets[0] = 0;
    write_report(params, pairs);
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t pad = min(pairs, slots) + token; pad < params.num_slots; pad += step) {
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
