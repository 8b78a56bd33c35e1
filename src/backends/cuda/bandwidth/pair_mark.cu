// SPDX-License-Identifier: Apache-2.0
//
// The first launch of the routers without a fixed K: what each token has to say of its experts.
#include "backends/cuda/bandwidth/logit_keys.cuh"
#include "backends/cuda/bandwidth/pair_routers.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokensPerBlock = 64;  // one global count per expert and block, not per pair

// 31 bits: 0 for NaN, otherwise larger for larger p. p is never negative.
__device__ uint32_t probability_key(float p) { return isnan(p) ? 0u : __float_as_uint(p) + 1u; }

// p of every expert of a token, its top K, and the key of every pair.
template <int kPerLane>
__device__ void mark_token(const PairParams& params, int64_t token, int32_t* histogram) {
  const WarpTeam team;
  const float* row = params.logits + token * params.logits_stride;
  float logits[kPerLane];
  uint32_t order[kPerLane];
  uint32_t largest = kTakenKey;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = team.rank() + i * WarpTeam::kSize;
    const bool there = expert < params.num_experts;
    logits[i] = there ? row[expert] : 0.0f;
    order[i] = there ? key_of(logits[i]) : kTakenKey;
    largest = max(largest, order[i]);
  }
  const float shift = logit_of(team.max(largest));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (order[i] != kTakenKey) sum += expf(logits[i] - shift);
  }
  const float all = team.sum(sum);

  uint32_t chosen = 0;  // bit i: expert rank + 32 i
  float top_sum = 0.0f;
  for (int k = 0; k < params.top_k; ++k) {
    const Choice choice = take_largest(team, order);
    top_sum += expf(logit_of(choice.key) - shift);
    if (choice.expert % WarpTeam::kSize == team.rank()) {
      chosen |= 1u << (choice.expert / WarpTeam::kSize);
      params.top[token * params.top_k + k] = choice.expert;
      atomicAdd(&histogram[choice.expert], 1);
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = team.rank() + i * WarpTeam::kSize;
    if (expert >= params.num_experts) continue;
    const uint32_t key = probability_key(expf(logits[i] - shift) / all);
    const uint32_t bit = (chosen >> i & 1u) != 0 ? kChosenBit : 0u;
    params.keys[static_cast<int64_t>(expert) * params.num_tokens + token] = key | bit;
  }
  if (team.rank() == 0) {
    // A NaN anywhere spoils the sum over the top K as it spoils every p.
    const bool by_top = params.score == PairScore::softmax_of_top && !isnan(all);
    params.norms[token] = {shift, by_top ? top_sum : all};
  }
}

template <int kPerLane>
__global__ void __launch_bounds__(kThreads) mark_by_softmax_kernel(const PairParams params) {
  extern __shared__ int32_t histogram[];  // (E)
  for (int e = threadIdx.x; e < params.num_experts; e += kThreads) histogram[e] = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < kTokensPerBlock; i += kWarps) {
    if (first + i < params.num_tokens) mark_token<kPerLane>(params, first + i, histogram);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < params.num_experts; e += kThreads) {
    if (histogram[e] != 0) atomicAdd(&params.counts[e], histogram[e]);
  }
}

// One warp a token; 32 experts are one word of its mask.
__global__ void __launch_bounds__(kThreads) mark_by_threshold_kernel(const PairParams params) {
  const WarpTeam team;
  const int64_t token = team.index();
  if (token >= params.num_tokens) return;
  const float* row = params.logits + token * params.logits_stride;
  int32_t pairs = 0;
  for (int word = 0; word < params.mask_words; ++word) {
    const int expert = word * 32 + team.rank();
    bool passes = false;
    if (expert < params.num_experts) {
      // In double, as the CPU decides.
      const double score = 1.0 / (1.0 + exp(-static_cast<double>(row[expert])));
      passes = score >= params.options.threshold;
    }
    const uint32_t mask = __ballot_sync(kFullMask, passes);
    if (team.rank() == 0) params.masks[token * params.mask_words + word] = mask;
    pairs += __popc(mask);
  }
  if (team.rank() == 0 && pairs != 0) atomicAdd(&params.chunks[token / kChunkTokens], pairs);
}

}  // namespace

void launch_mark_by_softmax(const PairParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_tokens, kTokensPerBlock));
  const size_t shared = static_cast<size_t>(params.num_experts) * sizeof(int32_t);
  visit_experts_per_lane(params.num_experts, [&]<int kPerLane>() {
    mark_by_softmax_kernel<kPerLane><<<blocks, kThreads, shared, stream>>>(params);
  });
  check_launch("mark_by_softmax_kernel");
}

void launch_mark_by_threshold(const PairParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_tokens, WarpTeam::kTeamsPerBlock));
  mark_by_threshold_kernel<<<blocks, kThreads, 0, stream>>>(params);
  check_launch("mark_by_threshold_kernel");
}

}  // namespace penstock::cuda
