// SPDX-License-Identifier: Apache-2.0
//
// DeepSeek-V3's router in one launch, and its gradient in another: one warp a token. Experts are
// ranked by the sums of backend/ranking.h, so ids are the CPU's also where two all but tie.
#include "backend/ranking.h"
#include "backends/cuda/bandwidth/sigmoid_topk.h"
#include "backends/cuda/bandwidth/warp_top_k.cuh"
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

__device__ bool names_expert(const SigmoidParams& params, int32_t id) {
  return id >= 0 && id < params.num_experts;
}

// Words of shared memory of one warp: the candidates, then what experts are ranked by (E).
int32_t shared_words(int32_t num_experts) { return kCandidates + (num_experts + 1) / 2; }

// The groups that take part, one bit each; lane g judges group g.
__device__ uint32_t best_groups(const SigmoidParams& params, const float* biased) {
  const WarpTeam team;
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

// What the token's experts are ranked by, also in shared memory, where one lane reads a group.
template <int kPerLane>
__device__ LaneValues<kPerLane> load_biased(const SigmoidParams& params, const float* row,
                                            float* biased) {
  const int lane = WarpTeam().rank();
  LaneValues<kPerLane> values = load_values<kPerLane>(row, params.num_experts);
  LaneValues<kPerLane> bias = {};
  if (params.bias != nullptr) bias = load_values<kPerLane>(params.bias, params.num_experts);
  values.row = biased;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    values.value[i] = ranking::plus(ranking::sigmoid(values.value[i]), bias.value[i]);
    if (values.has(i)) biased[lane + i * WarpTeam::kSize] = values.value[i];
  }
  __syncwarp();
  return values;
}

// Leaves only the experts of the best groups.
template <int kPerLane>
__device__ void limit_to_groups(const SigmoidParams& params, LaneValues<kPerLane>& values) {
  const uint32_t groups = best_groups(params, values.row);
  const int size = params.num_experts / params.num_groups;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = WarpTeam().rank() + i * WarpTeam::kSize;
    if (values.has(i) && (groups >> (expert / size) & 1u) != 0) continue;
    values.value[i] = __uint_as_float(0x7fc00000u);
    values.present &= ~(1u << i);
  }
}

__device__ float sum_of_chosen(const SigmoidParams& params, const float* row, const int32_t* ids) {
  const WarpTeam team;
  float sum = 0.0f;
  for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize) {
    if (names_expert(params, ids[k])) sum = __fadd_rn(sum, sigmoid(row[ids[k]]));
  }
  return team.sum(sum);
}

__device__ void write_scores(const SigmoidParams& params, int64_t token) {
  const WarpTeam team;
  const float* row = params.logits + token * params.logits_stride;
  const int32_t* ids = params.ids + token * params.top_k;
  const bool divided = params.scaling == ScoreScaling::normalized;
  const float divisor = divided ? sum_of_chosen(params, row, ids) : 1.0f;
  for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize) {
    const float chosen = names_expert(params, ids[k]) ? sigmoid(row[ids[k]]) : 0.0f;
    params.scores[token * params.top_k + k] = params.scale * (chosen / divisor);
  }
}

template <int kPerLane>
__global__ void __launch_bounds__(256)
    sigmoid_topk_kernel(const SigmoidParams params, int32_t words_per_warp) {
  extern __shared__ uint64_t shared[];
  const int64_t token = WarpTeam().index();
  if (token >= params.num_tokens) return;
  uint64_t* candidates = shared + threadIdx.x / WarpTeam::kSize * words_per_warp;
  int32_t* ids = params.ids + token * params.top_k;
  auto values = load_biased<kPerLane>(params, params.logits + token * params.logits_stride,
                                      reinterpret_cast<float*>(candidates + kCandidates));
  if (params.num_groups > 1) limit_to_groups(params, values);
  choose_top_k(values, params.top_k, candidates,
               [&](int k, const Choice& choice) { ids[k] = choice.expert; });
  __syncwarp();  // an id is read by another lane than the one that wrote it
  write_scores(params, token);
}

__global__ void __launch_bounds__(256) given_sigmoid_kernel(const SigmoidParams params) {
  const int64_t token = WarpTeam().index();
  if (token < params.num_tokens) write_scores(params, token);
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
    if (!names_expert(params, ids[k])) continue;
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
  const cudaStream_t stream = stream_of(context);
  if (args.selection == Selection::given) {
    given_sigmoid_kernel<<<blocks_of(params), 256, 0, stream>>>(params);
    return check_launch("given_sigmoid_kernel");
  }
  const int32_t words = shared_words(params.num_experts);
  const size_t bytes = static_cast<size_t>(words * WarpTeam::kTeamsPerBlock) * sizeof(uint64_t);
  visit_experts_per_lane(params.num_experts, [&]<int kPerLane>() {
    sigmoid_topk_kernel<kPerLane><<<blocks_of(params), 256, bytes, stream>>>(params, words);
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
