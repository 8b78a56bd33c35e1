// SPDX-License-Identifier: Apache-2.0
//
// The first launch of the routers without a fixed K: what each token has to say of its experts.
// Keys are ranked down the tokens of one expert, so a block turns a tile of them around in shared
// memory, and writes runs of kTileTokens. Also starts what the later launches count on with.
//
// The scores of pairs that are given come from here too: they need the same sums over a token.
#include <cmath>
#include <limits>

#include "backend/ranking.h"
#include "backends/cuda/bandwidth/pair_routers.cuh"
#include "backends/cuda/bandwidth/warp_top_k.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kThresholdThreads = 1024;
constexpr int kTileTokens = 16;
constexpr int kTileStride = kTileTokens + 1;  // so that a warp's writes meet different banks

// 31 bits: 0 for NaN, otherwise larger for larger p. p is never negative.
__device__ uint32_t probability_key(float p) { return isnan(p) ? 0u : __float_as_uint(p) + 1u; }

// The report starts at 0, and a chunk with the pairs that its tokens choose.
__device__ void start_counts(const PairParams& params) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (first < kRouterReportSize) params.report[first] = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t chunk = first; chunk < params.num_chunks; chunk += step) {
    const int64_t tokens = min(params.num_tokens - chunk * kChunkTokens, int64_t{kChunkTokens});
    params.chunks[chunk] = static_cast<int32_t>(tokens) * params.top_k;
  }
}

// Replaces a token's logits by exp(logit - shift), and returns their sum.
template <int kPerLane>
__device__ float exponentiate(LaneValues<kPerLane>& values, float shift) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    values.value[i] = ranking::exponential(ranking::minus(values.value[i], shift));
    if (values.has(i)) sum = ranking::plus(sum, values.value[i]);
  }
  return WarpTeam().sum(sum);
}

// What turns the token's logits into scores, from the sum over all and the top K.
__device__ TokenNorm norm_of(const PairParams& params, const float* row, const int32_t* top,
                             const TokenNorm& over_all) {
  // A NaN anywhere spoils the sum over the top K as it spoils every p.
  if (params.score != PairScore::softmax_of_top || isnan(over_all.divisor)) return over_all;
  const WarpTeam team;
  float sum = 0.0f;
  for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize) {
    sum = __fadd_rn(sum, expf(row[top[k]] - over_all.shift));
  }
  return {over_all.shift, team.sum(sum)};
}

// p of every expert of a token, its top K, and the key of every pair, which goes to `column`.
template <int kPerLane>
__device__ void mark_token(const PairParams& params, int64_t token, uint64_t* candidates,
                           uint32_t* column) {
  const WarpTeam team;
  LaneValues<kPerLane> values =
      load_values<kPerLane>(params.logits + token * params.logits_stride, params.num_experts);
  const float shift = logit_of(team.max(lane_largest(values)));
  uint64_t last = ~uint64_t{0};  // no pair is chosen by its token
  if (params.top_k > 0) {
    int32_t* top_out = params.top + token * params.top_k;
    last = choose_top_k(values, params.top_k, candidates, [&](int k, const Choice& choice) {
      top_out[k] = choice.expert;
      // Only the mode that carries from expert to expert needs all counts before it selects.
      if (params.counts != nullptr) atomicAdd(&params.counts[choice.expert], 1);
    });
    __syncwarp();  // the top K are read by other lanes than wrote them
  }
  uint32_t is_chosen = 0;  // bit i
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = team.rank() + i * WarpTeam::kSize;
    if (packed(key_of(values.value[i]), expert) >= last) is_chosen |= 1u << i;
  }
  const float all = exponentiate(values, shift);
  const float inverse = ranking::over(1.0f, all);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (!values.has(i)) continue;
    const uint32_t bit = (is_chosen >> i & 1u) != 0 ? kChosenBit : 0u;
    const int expert = team.rank() + i * WarpTeam::kSize;
    column[expert * kTileStride] = probability_key(ranking::times(values.value[i], inverse)) | bit;
  }
  const int32_t* top = params.top + token * params.top_k;
  const TokenNorm norm = norm_of(params, values.row, top, {shift, all});
  if (team.rank() == 0) params.norms[token] = norm;
}

template <int kPerLane>
__global__ void __launch_bounds__(kThreads) mark_by_softmax_kernel(const PairParams params) {
  extern __shared__ uint32_t tile[];  // (E, kTileStride) keys
  __shared__ uint64_t candidates[kWarps][kCandidates];
  start_counts(params);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileTokens;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int i = warp; i < kTileTokens; i += kWarps) {
    if (first + i >= params.num_tokens) continue;
    mark_token<kPerLane>(params, first + i, candidates[warp], tile + i);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < params.num_experts * kTileTokens; i += kThreads) {
    const int expert = i / kTileTokens;
    const int64_t token = first + i % kTileTokens;
    if (token >= params.num_tokens) continue;
    params.keys[expert * params.num_tokens + token] = tile[expert * kTileStride + i % kTileTokens];
  }
}

// A block has the tokens of one chunk, in turn a warp each; 32 experts are one word of a mask.
__global__ void __launch_bounds__(kThresholdThreads)
    mark_by_threshold_kernel(const PairParams params) {
  __shared__ int32_t pairs_of_warp[32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunkTokens;
  const int64_t end = min(first + kChunkTokens, params.num_tokens);
  int32_t pairs = 0;
  for (int64_t token = first + warp; token < end; token += kThresholdThreads / 32) {
    const float* row = params.logits + token * params.logits_stride;
    for (int word = 0; word < params.mask_words; ++word) {
      const int expert = word * 32 + lane;
      const bool passes = expert < params.num_experts && row[expert] >= params.least_logit;
      const uint32_t mask = __ballot_sync(kFullMask, passes);
      if (lane == 0) params.masks[token * params.mask_words + word] = mask;
      pairs += __popc(mask);
    }
  }
  if (lane == 0) pairs_of_warp[warp] = pairs;
  if (blockIdx.x == 0 && threadIdx.x < kRouterReportSize) params.report[threadIdx.x] = 0;
  __syncthreads();
  if (warp != 0) return;
  pairs = pairs_of_warp[lane];
  pairs = static_cast<int32_t>(__reduce_add_sync(kFullMask, pairs));
  if (lane == 0) params.chunks[blockIdx.x] = pairs;
}

template <int kPerLane>
__global__ void __launch_bounds__(kThreads) score_given_kernel(const PairParams params) {
  extern __shared__ int32_t tops[];  // (kWarps, K)
  __shared__ uint64_t candidates[kWarps][kCandidates];
  const WarpTeam team;
  const int64_t token = team.index();
  if (token >= params.num_tokens) return;
  const float* row = params.logits + token * params.logits_stride;
  TokenNorm norm = {};
  if (params.score != PairScore::sigmoid) {
    const int warp = static_cast<int>(threadIdx.x) / WarpTeam::kSize;
    int32_t* top = tops + warp * params.top_k;
    LaneValues<kPerLane> values = load_values<kPerLane>(row, params.num_experts);
    const float shift = logit_of(team.max(lane_largest(values)));
    if (params.score == PairScore::softmax_of_top) {
      choose_top_k(values, params.top_k, candidates[warp],
                   [&](int k, const Choice& choice) { top[k] = choice.expert; });
      __syncwarp();
    }
    norm = norm_of(params, row, top, {shift, exponentiate(values, shift)});
  }
  const auto slots = static_cast<int32_t>(params.num_slots);
  const int32_t end = min(params.token_offsets[token + 1], slots);
  for (int32_t slot = params.token_offsets[token] + team.rank(); slot < end; slot += team.kSize) {
    const int32_t id = params.ids[slot];
    const bool named = id >= 0 && id < params.num_experts;
    params.scores[slot] = named ? score_of(params.score, norm, row[id]) : 0.0f;
  }
}

}  // namespace

float least_passing_logit(double threshold) {
  const auto passes = [&](float logit) {
    return 1.0 / (1.0 + std::exp(-static_cast<double>(logit))) >= threshold;
  };
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (passes(-kInfinity)) return -kInfinity;
  if (!passes(kInfinity)) return std::numeric_limits<float>::quiet_NaN();
  float low = -800.0f;  // exp(800) is infinity
  float high = 800.0f;
  for (float middle = 0.0f; low < middle && middle < high; middle = low + (high - low) / 2) {
    (passes(middle) ? high : low) = middle;
  }
  return high;
}

void launch_score_given(const PairParams& params, cudaStream_t stream) {
  // Slots past the last pair, which no token has.
  const size_t bytes = static_cast<size_t>(params.num_slots) * sizeof(float);
  check("cudaMemsetAsync(scores)", cudaMemsetAsync(params.scores, 0, bytes, stream));
  if (params.num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_tokens, kWarps));
  const auto top_bytes = static_cast<size_t>(kWarps * params.top_k) * sizeof(int32_t);
  visit_experts_per_lane(params.num_experts, [&]<int kPerLane>() {
    score_given_kernel<kPerLane><<<blocks, kThreads, top_bytes, stream>>>(params);
  });
  check_launch("score_given_kernel");
}

void launch_mark_by_softmax(const PairParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_tokens, kTileTokens));
  const auto bytes = static_cast<size_t>(params.num_experts * kTileStride) * sizeof(uint32_t);
  visit_experts_per_lane(params.num_experts, [&]<int kPerLane>() {
    // 48 KB are not enough beyond 672 experts.
    check(
        "cudaFuncSetAttribute(mark_by_softmax_kernel)",
        cudaFuncSetAttribute(mark_by_softmax_kernel<kPerLane>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    mark_by_softmax_kernel<kPerLane><<<blocks, kThreads, bytes, stream>>>(params);
  });
  check_launch("mark_by_softmax_kernel");
}

void launch_mark_by_threshold(const PairParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>(params.num_chunks);
  mark_by_threshold_kernel<<<blocks, kThresholdThreads, 0, stream>>>(params);
  check_launch("mark_by_threshold_kernel");
}

}  // namespace penstock::cuda
