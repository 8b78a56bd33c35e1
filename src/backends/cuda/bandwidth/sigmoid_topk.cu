// SPDX-License-Identifier: Apache-2.0
//
// DeepSeek-V3's router in one launch, and its gradient in another: one warp a token. The biased
// scores lie in shared memory, where one lane reads a whole group.
#include "backends/cuda/bandwidth/logit_keys.cuh"
#include "backends/cuda/bandwidth/sigmoid_topk.h"
#include "backends/cuda/launch.h"

namespace penstock::cuda {
namespace {

struct SigmoidParams {
  const float* logits;  // (T, E)
  int64_t logits_stride;
  const float* bias;  // (E) or null
  float* scores;      // (T, K)
  int32_t* ids;       // (T, K)
  const float* dscores;
  float* dlogits;
  int64_t dlogits_stride;
  int64_t num_tokens;
  int32_t num_experts;
  int32_t top_k;
  int32_t num_groups;
  int32_t top_groups;
  ScoreScaling scaling;
  float scale;
};

__device__ float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }

// The groups that take part, one bit each; lane g judges group g.
__device__ uint32_t best_groups(const SigmoidParams& params, const float* biased) {
  const WarpTeam team;
  if (params.num_groups == 1) return 1u;
  const int size = params.num_experts / params.num_groups;
  uint32_t worth[1] = {kTakenKey};
  if (team.rank() < params.num_groups) {
    const float* group = biased + team.rank() * size;
    uint32_t first = kTakenKey;
    uint32_t second = kTakenKey;
    for (int i = 0; i < size; ++i) {
      const uint32_t key = key_of(group[i]);
      if (key > first) {
        second = first;
        first = key;
      } else {
        second = max(second, key);
      }
    }
    worth[0] = size == 1 ? first : key_of(logit_of(first) + logit_of(second));
  }
  uint32_t groups = 0;
  for (int g = 0; g < params.top_groups; ++g) groups |= 1u << take_largest(team, worth).expert;
  return groups;
}

__device__ float sum_of_chosen(const SigmoidParams& params, const float* row, const int32_t* ids) {
  const WarpTeam team;
  float sum = 0.0f;
  for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize) sum += sigmoid(row[ids[k]]);
  return team.sum(sum);
}

template <int kPerLane>
__global__ void __launch_bounds__(256) sigmoid_topk_kernel(const SigmoidParams params) {
  extern __shared__ float shared[];  // (kTeamsPerBlock, E)
  const WarpTeam team;
  const int64_t token = team.index();
  if (token >= params.num_tokens) return;
  float* biased = shared + threadIdx.x / WarpTeam::kSize * params.num_experts;
  const float* row = params.logits + token * params.logits_stride;
  int32_t* ids = params.ids + token * params.top_k;
  for (int e = team.rank(); e < params.num_experts; e += WarpTeam::kSize) {
    biased[e] = sigmoid(row[e]) + (params.bias == nullptr ? 0.0f : params.bias[e]);
  }
  __syncwarp();
  const uint32_t groups = best_groups(params, biased);
  const int size = params.num_experts / params.num_groups;
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = team.rank() + i * WarpTeam::kSize;
    const bool takes_part = expert < params.num_experts && (groups >> (expert / size) & 1u) != 0;
    keys[i] = takes_part ? key_of(biased[expert]) : kTakenKey;
  }
  for (int k = 0; k < params.top_k; ++k) {
    const Choice choice = take_largest(team, keys);
    if (team.rank() == 0) ids[k] = choice.expert;
  }
  __syncwarp();  // lane 0 wrote the ids
  const bool divided = params.scaling == ScoreScaling::normalized;
  const float divisor = divided ? sum_of_chosen(params, row, ids) : 1.0f;
  for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize) {
    params.scores[token * params.top_k + k] = params.scale * (sigmoid(row[ids[k]]) / divisor);
  }
}

__global__ void __launch_bounds__(256) sigmoid_topk_backward_kernel(const SigmoidParams params) {
  const WarpTeam team;
  const int64_t token = team.index();
  if (token >= params.num_tokens) return;
  const float* row = params.logits + token * params.logits_stride;
  const int32_t* ids = params.ids + token * params.top_k;
  const float* scores = params.scores + token * params.top_k;
  const float* dscores = params.dscores + token * params.top_k;
  float* out = params.dlogits + token * params.dlogits_stride;
  float divisor = 1.0f;
  float dot = 0.0f;
  if (params.scaling == ScoreScaling::normalized) {
    divisor = sum_of_chosen(params, row, ids);
    for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize) dot += scores[k] * dscores[k];
    dot = team.sum(dot);
  }
  for (int e = team.rank(); e < params.num_experts; e += WarpTeam::kSize) out[e] = 0.0f;
  __syncwarp();  // a chosen expert is cleared by one lane and written by another
  for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize) {
    const float s = sigmoid(row[ids[k]]);
    out[ids[k]] = s * (1.0f - s) / divisor * (params.scale * dscores[k] - dot);
  }
}

// What forward and backward have in common.
template <typename Args>
SigmoidParams params_of(const Args& args) {
  SigmoidParams params = {};
  params.logits = args.logits.template as<const float>();
  params.logits_stride = args.logits.stride(0);
  params.scores = args.scores.template as<float>();
  params.ids = args.ids.template as<int32_t>();
  params.num_tokens = args.logits.size(0);
  params.num_experts = static_cast<int32_t>(args.logits.size(1));
  params.top_k = static_cast<int32_t>(args.scores.size(1));
  params.num_groups = args.options.num_groups;
  params.top_groups = args.options.top_groups;
  params.scaling = args.options.scaling;
  params.scale = static_cast<float>(args.options.scale);
  return params;
}

unsigned blocks_of(const SigmoidParams& params) {
  return static_cast<unsigned>(ceil_div(params.num_tokens, WarpTeam::kTeamsPerBlock));
}

}  // namespace

void sigmoid_topk_forward(const RouterForwardArgs& args, const Context& context) {
  check_clean_device("router_forward");
  SigmoidParams params = params_of(args);
  params.bias = args.bias.present() ? args.bias.as<const float>() : nullptr;
  const size_t shared =
      static_cast<size_t>(WarpTeam::kTeamsPerBlock * params.num_experts) * sizeof(float);
  visit_experts_per_lane(params.num_experts, [&]<int kPerLane>() {
    sigmoid_topk_kernel<kPerLane><<<blocks_of(params), 256, shared, stream_of(context)>>>(params);
  });
  check_launch("sigmoid_topk_kernel");
}

void sigmoid_topk_backward(const RouterBackwardArgs& args, const Context& context) {
  check_clean_device("router_backward");
  SigmoidParams params = params_of(args);
  params.dscores = args.dscores.as<const float>();
  params.dlogits = args.dlogits.as<float>();
  params.dlogits_stride = args.dlogits.stride(0);
  sigmoid_topk_backward_kernel<<<blocks_of(params), 256, 0, stream_of(context)>>>(params);
  check_launch("sigmoid_topk_backward_kernel");
}

}  // namespace penstock::cuda
