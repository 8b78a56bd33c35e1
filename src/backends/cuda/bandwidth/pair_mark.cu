// SPDX-License-Identifier: Apache-2.0
//
// The first launch of the routers without a fixed K: what each token has to say of its experts.
// Keys are ranked down the tokens of one expert, so a block turns a tile of their upper halves
// around in shared memory, and writes runs of kTileTokens. Also starts the report that the later
// launches count in.
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
constexpr int kTileStride = kTileTokens + 2;  // so that a warp's writes meet different banks
constexpr uint16_t kChosenHalf = kChosenBit >> 16;

// Replaces a token's logits by exp(logit - shift), and returns their sum.
template <int kPerLane>
__device__ float exponentiate(LaneValues<kPerLane>& values, float shift) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    values.value[i] = ranking::exponential_below_88(ranking::minus(values.value[i], shift));
    if (values.has(i)) sum = ranking::plus(sum, values.value[i]);
  }
  return WarpTeam().sum(sum);
}

// What turns the token's logits into scores, from the sum over all and the logits of its top K.
template <typename LogitOf>
__device__ TokenNorm norm_of(const PairParams& params, const TokenNorm& over_all,
                             const LogitOf& logit_of_choice) {
  // A NaN anywhere spoils the sum over the top K as it spoils every p.
  if (params.score != PairScore::softmax_of_top || isnan(over_all.divisor)) return over_all;
  const WarpTeam team;
  float sum = 0.0f;
  for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize) {
    sum = __fadd_rn(sum, expf(logit_of_choice(k) - over_all.shift));
  }
  return {over_all.shift, team.sum(sum)};
}

// What a warp needs in shared memory to mark a token.
struct MarkWarp {
  uint64_t* candidates;  // (kCandidates)
  Choice* chosen;        // (K)
  uint16_t* column;      // (E, kTileStride) from the token's key of expert 0 on
};

// The upper halves of a token's keys, whose p are these values times `inverse`.
template <int kPerLane>
__device__ void write_column(const PairParams& params, const LaneValues<kPerLane>& values,
                             float inverse, const MarkWarp& shared) {
  const WarpTeam team;
  const uint32_t number = isnan(inverse) ? 0u : 0xffffffffu;  // so is every p of the token, or none
  uint16_t* column = shared.column + team.rank() * kTileStride;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (!values.has(i)) continue;
    const uint32_t p = __float_as_uint(ranking::times(values.value[i], inverse));
    column[i * WarpTeam::kSize * kTileStride] = static_cast<uint16_t>((p & number) >> 15);
  }
  __syncwarp();  // keys of the chosen are changed by other lanes than wrote them
  for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize)
    shared.column[shared.chosen[k].expert * kTileStride] |= kChosenHalf;
}

// p of every expert of a token, its top K, and the key of every pair.
template <int kPerLane>
__device__ void mark_token(const PairParams& params, int64_t token, const MarkWarp& shared) {
  const WarpTeam team;
  LaneValues<kPerLane> values =
      load_values<kPerLane>(params.logits + token * params.logits_stride, params.num_experts);
  const float shift = logit_of(team.max(lane_largest(values)));
  if (params.top_k > 0) {
    choose_top_k(values, params.top_k, shared.candidates, [&](int k, const Choice& choice) {
      shared.chosen[k] = choice;
      // Only the mode that carries from expert to expert needs all counts before it selects.
      if (params.counts != nullptr) atomicAdd(&params.counts[choice.expert], 1);
    });
  }
  const float all = exponentiate(values, shift);
  const float inverse = ranking::over(1.0f, all);
  write_column(params, values, inverse, shared);
  const auto logit_of_choice = [&](int k) { return logit_of(shared.chosen[k].key); };
  const TokenNorm norm = norm_of(params, {shift, all}, logit_of_choice);
  if (team.rank() == 0) {
    params.norms[token] = norm;
    params.ranks[token] = {shift, inverse};
  }
  for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize) {
    const float score = score_of(params.score, norm, logit_of_choice(k));
    params.top[token * params.top_k + k] = {shared.chosen[k].expert, score};
  }
  __syncwarp();  // the next token's top K come after this one's have been read
}

constexpr int mark_blocks_per_multiprocessor(int per_lane) {
  return per_lane <= 4 ? 8 : per_lane <= 8 ? 5 : per_lane <= 16 ? 4 : 2;
}

template <int kPerLane>
__global__ void __launch_bounds__(kThreads, mark_blocks_per_multiprocessor(kPerLane))
    mark_by_softmax_kernel(const PairParams params) {
  extern __shared__ uint64_t dynamic[];  // (kWarps, K) choices, then (E, kTileStride) keys
  __shared__ uint64_t candidates[kWarps][kCandidates];
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  auto* chosen = reinterpret_cast<Choice*>(dynamic);
  auto* tile = reinterpret_cast<uint16_t*>(dynamic + kWarps * params.top_k);
  if (blockIdx.x == 0 && threadIdx.x < kRouterReportSize) params.report[threadIdx.x] = 0;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileTokens;
  for (int i = warp; i < kTileTokens; i += kWarps) {
    if (first + i < params.num_tokens) {
      mark_token<kPerLane>(params, first + i,
                           {candidates[warp], chosen + warp * params.top_k, tile + i});
    } else {
      for (int e = threadIdx.x % 32; e < params.num_experts; e += 32) tile[e * kTileStride + i] = 0;
    }
  }
  __syncthreads();
  // A thread writes eight bytes, four keys.
  constexpr int kThreadsOfRun = kTileTokens / 4;
  const int quad = static_cast<int>(threadIdx.x) % kThreadsOfRun;
  const auto* pairs = reinterpret_cast<const uint32_t*>(tile) + quad * 2;
  auto* keys = reinterpret_cast<uint2*>(params.keys + first) + quad;
  const int64_t step = params.key_stride / 4;
#pragma unroll 4
  for (int e = threadIdx.x / kThreadsOfRun; e < params.num_experts; e += kThreads / kThreadsOfRun) {
    const uint32_t* run = pairs + e * (kTileStride / 2);
    keys[e * step] = make_uint2(run[0], run[1]);
  }
}

// A block has the tokens of one chunk, in turn a warp each; 32 experts are one word of a mask.
__global__ void __launch_bounds__(kThresholdThreads)
    mark_by_threshold_kernel(const PairParams params) {
  __shared__ int32_t pairs_of_warp[32];
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
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
    norm =
        norm_of(params, {shift, exponentiate(values, shift)}, [&](int k) { return row[top[k]]; });
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

void launch_mark_by_softmax(const PairParams& params, const Context& context) {
  if (params.num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_tokens, kTileTokens));
  const int64_t bytes = int64_t{kWarps} * params.top_k * int64_t{sizeof(Choice)} +
                        int64_t{params.num_experts} * kTileStride * int64_t{sizeof(uint16_t)};
  visit_experts_per_lane(params.num_experts, [&]<int kPerLane>() {
    // 48 KB are not enough for the most experts.
    check(
        "cudaFuncSetAttribute(mark_by_softmax_kernel)",
        cudaFuncSetAttribute(mark_by_softmax_kernel<kPerLane>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    launch_dependent({"mark_by_softmax_kernel", dim3(blocks), kThreads, bytes}, context,
                     mark_by_softmax_kernel<kPerLane>, params);
  });
}

void launch_mark_by_threshold(const PairParams& params, const Context& context) {
  if (params.num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>(params.num_chunks);
  launch_dependent({"mark_by_threshold_kernel", dim3(blocks), kThresholdThreads}, context,
                   mark_by_threshold_kernel, params);
}

}  // namespace penstock::cuda
