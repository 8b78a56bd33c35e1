// SPDX-License-Identifier: Apache-2.0
//
// The softmax routers' scores and selection, of their own choice or of ids that are given, and
// their backward: launches right after the router's product. A token's logits live in the registers
// of its team: a warp, or a block past 1024 experts.
#include "backends/cuda/arch/launch.cuh"
#include "backends/cuda/bandwidth/bandwidth_ops.h"
#include "backends/cuda/bandwidth/warp_top_k.cuh"
#include "backends/cuda/launch.h"

namespace penstock::cuda {
namespace {

constexpr int64_t kMaxWarpExperts = 1024;

struct RouterParams {
  RouterKind kind;
  const float* logits;  // (T, E)
  int64_t logits_stride;
  float* scores;  // (T, K)
  int32_t* ids;   // (T, K) read where they are given
  int64_t num_tokens;
  int32_t num_experts;
  int32_t top_k;
};

// sum over all experts of exp(logit - shift).
template <typename Team>
__device__ float sum_over_all(const Team& team, const float* row, int32_t num_experts,
                              float shift) {
  float sum = 0.0f;
  // Never fused with the exponential's last product: a replay repeats the bits in another kernel.
  for (int e = team.rank(); e < num_experts; e += Team::kSize) {
    sum = __fadd_rn(sum, expf(row[e] - shift));
  }
  return team.sum(sum);
}

// The scores of one token. weight(k) is exp(logit - shift) of choice k; over_all the sum of that
// over all experts, for the kinds that need it. Choice k is member k % kSize's.
template <typename Team, typename Weight>
__device__ void write_scores(const Team& team, const RouterParams& params, int64_t token,
                             float over_all, const Weight& weight) {
  constexpr int kHeld = Team::kSize >= kMaxTopK ? 1 : kMaxTopK / Team::kSize;
  float weights[kHeld];
  float chosen_sum = 0.0f;
#pragma unroll
  for (int held = 0; held < kHeld; ++held) {
    const int k = team.rank() + held * Team::kSize;
    weights[held] = k < params.top_k ? weight(k) : 0.0f;
    chosen_sum = __fadd_rn(chosen_sum, weights[held]);
  }
  float denominator = over_all;
  // Normalised scores are those of the chosen alone, but a NaN anywhere spoils them all.
  if (params.kind != RouterKind::topk_softmax) {
    chosen_sum = team.sum(chosen_sum);
    if (!isnan(over_all)) denominator = chosen_sum;
  }
  float* scores = params.scores + token * params.top_k;
#pragma unroll
  for (int held = 0; held < kHeld; ++held) {
    const int k = team.rank() + held * Team::kSize;
    if (k < params.top_k) scores[k] = weights[held] / denominator;
  }
}

struct WarpRouterShared {
  uint64_t candidates[kCandidates];
  uint32_t chosen[kMaxTopK];  // keys
};

template <int kPerLane>
__global__ void __launch_bounds__(256) warp_router_kernel(const RouterParams params) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  __shared__ WarpRouterShared shared[WarpTeam::kTeamsPerBlock];
  const WarpTeam team;
  const int64_t token = team.index();
  if (token >= params.num_tokens) return;  // whole warps leave together
  WarpRouterShared& mine = shared[threadIdx.x / WarpTeam::kSize];
  const LaneValues<kPerLane> logits =
      load_values<kPerLane>(params.logits + token * params.logits_stride, params.num_experts);
  int32_t* ids = params.ids + token * params.top_k;
  choose_top_k(logits, params.top_k, mine.candidates, [&](int k, const Choice& choice) {
    ids[k] = choice.expert;
    mine.chosen[k] = choice.key;
  });
  __syncwarp();
  const float shift = logit_of(mine.chosen[0]);
  const bool needs_all = params.kind != RouterKind::softmax_topk;
  const float over_all =
      needs_all ? sum_over_all(team, logits.row, params.num_experts, shift) : 0.0f;
  write_scores(team, params, token, over_all,
               [&](int k) { return expf(logit_of(mine.chosen[k]) - shift); });
}

// More experts than a warp has room for.
__global__ void __launch_bounds__(BlockTeam::kSize) block_router_kernel(const RouterParams params) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  constexpr int kPerMember = kMaxExperts / BlockTeam::kSize;
  __shared__ uint32_t chosen[kMaxTopK];
  const BlockTeam team;
  const int64_t token = team.index();
  const float* row = params.logits + token * params.logits_stride;
  float values[kPerMember];
#pragma unroll
  for (int i = 0; i < kPerMember; ++i) {
    const int expert = team.rank() + i * BlockTeam::kSize;
    values[i] = 0.0f;
    if (expert < params.num_experts) values[i] = row[expert];
  }
  uint32_t keys[kPerMember];
#pragma unroll
  for (int i = 0; i < kPerMember; ++i) {
    const int expert = team.rank() + i * BlockTeam::kSize;
    keys[i] = expert < params.num_experts ? key_of(values[i]) : kTakenKey;
  }
  for (int k = 0; k < params.top_k; ++k) {
    const Choice choice = take_largest(team, keys);
    if (team.rank() != 0) continue;
    params.ids[token * params.top_k + k] = choice.expert;
    chosen[k] = choice.key;
  }
  __syncthreads();
  const float shift = logit_of(chosen[0]);
  const bool needs_all = params.kind != RouterKind::softmax_topk;
  const float over_all = needs_all ? sum_over_all(team, row, params.num_experts, shift) : 0.0f;
  write_scores(team, params, token, over_all,
               [&](int k) { return expf(logit_of(chosen[k]) - shift); });
}

// Scores of ids that the caller brings; the same bits where they are the ids that would be chosen.
template <typename Team>
__global__ void __launch_bounds__(Team::kSize* Team::kTeamsPerBlock)
    given_router_kernel(const RouterParams params) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const Team team;
  const int64_t token = team.index();
  if (token >= params.num_tokens) return;
  const float* row = params.logits + token * params.logits_stride;
  const int32_t* ids = params.ids + token * params.top_k;
  const auto names_expert = [&](int32_t id) { return id >= 0 && id < params.num_experts; };
  uint32_t largest = kTakenKey;
  for (int k = team.rank(); k < params.top_k; k += Team::kSize) {
    if (names_expert(ids[k])) largest = max(largest, key_of(row[ids[k]]));
  }
  largest = team.max(largest);
  if (largest == kTakenKey) {  // no id names an expert
    for (int k = team.rank(); k < params.top_k; k += Team::kSize) {
      params.scores[token * params.top_k + k] = 0.0f;
    }
    return;
  }
  float over_all = 0.0f;
  if (params.kind != RouterKind::softmax_topk) {
    for (int e = team.rank(); e < params.num_experts; e += Team::kSize) {
      largest = max(largest, key_of(row[e]));
    }
    largest = team.max(largest);
    over_all = sum_over_all(team, row, params.num_experts, logit_of(largest));
  }
  const float shift = logit_of(largest);
  write_scores(team, params, token, over_all,
               [&](int k) { return names_expert(ids[k]) ? expf(row[ids[k]] - shift) : 0.0f; });
}

struct RouterBackwardParams {
  RouterKind kind;
  const float* logits;
  int64_t logits_stride;
  const float* scores;
  const int32_t* ids;
  const float* dscores;
  float* dlogits;
  int64_t dlogits_stride;
  int64_t num_tokens;
  int32_t num_experts;
  int32_t top_k;
};

// One warp a token: the row of dlogits first gets what an expert that was not chosen receives,
// then the K chosen ones are written over it.
__global__ void __launch_bounds__(256) router_backward_kernel(const RouterBackwardParams params) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const WarpTeam team;
  const int64_t token = team.index();
  if (token >= params.num_tokens) return;
  const float* scores = params.scores + token * params.top_k;
  const float* dscores = params.dscores + token * params.top_k;
  const int32_t* ids = params.ids + token * params.top_k;
  float* out = params.dlogits + token * params.dlogits_stride;

  float dot = 0.0f;
  for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize) dot += scores[k] * dscores[k];
  dot = team.sum(dot);

  if (params.kind == RouterKind::topk_softmax) {
    const float* row = params.logits + token * params.logits_stride;
    uint32_t top = kTakenKey;
    for (int e = team.rank(); e < params.num_experts; e += WarpTeam::kSize) {
      top = max(top, key_of(row[e]));
    }
    const float shift = logit_of(team.max(top));
    float sum = 0.0f;
    for (int e = team.rank(); e < params.num_experts; e += WarpTeam::kSize) {
      sum += expf(row[e] - shift);
    }
    const float scale = dot / team.sum(sum);
    for (int e = team.rank(); e < params.num_experts; e += WarpTeam::kSize) {
      out[e] = -expf(row[e] - shift) * scale;
    }
  } else {
    for (int e = team.rank(); e < params.num_experts; e += WarpTeam::kSize) out[e] = 0.0f;
  }
  __syncwarp();  // orders the two writes of a chosen expert, which come from different lanes
  for (int k = team.rank(); k < params.top_k; k += WarpTeam::kSize) {
    if (ids[k] < 0 || ids[k] >= params.num_experts) continue;  // given ids may name no expert
    out[ids[k]] = scores[k] * (dscores[k] - dot);
  }
}

unsigned warp_blocks(int64_t num_tokens) {
  return static_cast<unsigned>(ceil_div(num_tokens, WarpTeam::kTeamsPerBlock));
}

void launch_chosen(const RouterParams& params, const Context& context) {
  if (params.num_experts > kMaxWarpExperts) {
    const auto blocks = static_cast<unsigned>(params.num_tokens);
    return launch_dependent({"block_router_kernel", dim3(blocks), BlockTeam::kSize}, context,
                            block_router_kernel, params);
  }
  visit_experts_per_lane(params.num_experts, [&]<int kPerLane>() {
    launch_dependent({"warp_router_kernel", dim3(warp_blocks(params.num_tokens)), 256}, context,
                     warp_router_kernel<kPerLane>, params);
  });
}

void launch_given(const RouterParams& params, const Context& context) {
  if (params.num_experts > kMaxWarpExperts) {
    const auto blocks = static_cast<unsigned>(params.num_tokens);
    launch_dependent({"given_router_kernel", dim3(blocks), BlockTeam::kSize}, context,
                     given_router_kernel<BlockTeam>, params);
  } else {
    launch_dependent({"given_router_kernel", dim3(warp_blocks(params.num_tokens)), 256}, context,
                     given_router_kernel<WarpTeam>, params);
  }
}

}  // namespace

void softmax_topk_forward(const RouterForwardArgs& args, const Context& context) {
  check_clean_device("router_forward");
  RouterParams params;
  params.kind = args.kind;
  params.logits = args.logits.as<float>();
  params.logits_stride = args.logits.stride(0);
  params.scores = args.scores.as<float>();
  params.ids = args.ids.as<int32_t>();
  params.num_tokens = args.logits.size(0);
  params.num_experts = static_cast<int32_t>(args.logits.size(1));
  params.top_k = static_cast<int32_t>(args.scores.size(1));
  if (params.num_tokens == 0) return;

  if (args.selection == Selection::given) return launch_given(params, context);
  launch_chosen(params, context);
}

void softmax_topk_backward(const RouterBackwardArgs& args, const Context& context) {
  check_clean_device("router_backward");
  RouterBackwardParams params;
  params.kind = args.kind;
  params.logits = args.logits.as<float>();
  params.logits_stride = args.logits.present() ? args.logits.stride(0) : 0;
  params.scores = args.scores.as<float>();
  params.ids = args.ids.as<int32_t>();
  params.dscores = args.dscores.as<float>();
  params.dlogits = args.dlogits.as<float>();
  params.dlogits_stride = args.dlogits.stride(0);
  params.num_tokens = args.dlogits.size(0);
  params.num_experts = static_cast<int32_t>(args.dlogits.size(1));
  params.top_k = static_cast<int32_t>(args.scores.size(1));
  if (params.num_tokens == 0) return;
  launch_dependent({"router_backward_kernel", dim3(warp_blocks(params.num_tokens)), 256}, context,
                   router_backward_kernel, params);
}

}  // namespace penstock::cuda
