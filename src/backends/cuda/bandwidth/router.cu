// SPDX-License-Identifier: Apache-2.0
//
// Router scores and selection, and their backward: launches right after the router's product.
//
// A token's logits live in the registers of its team (a warp, or a block past 1024 experts) as
// order-preserving keys, so that one integer maximum and one minimum choose the next expert: the
// largest logit, ties to the lower id, NaN below every number. The choice is exact in fp32: no
// mantissa bits are given up to carry the id.
#include <string>
#include <type_traits>

#include "backends/cuda/bandwidth/bandwidth_ops.h"
#include "backends/cuda/bandwidth/team.cuh"
#include "backends/cuda/launch.h"

namespace penstock::cuda {
namespace {

constexpr uint32_t kTakenKey = 0;  // no such expert, or already chosen
constexpr uint32_t kNanKey = 1;    // below -inf, whose key is 0x007fffff

__device__ uint32_t key_of(float logit) {
  if (isnan(logit)) return kNanKey;
  const uint32_t bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);  // -0 ties with +0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ float logit_of(uint32_t key) {
  if (key == kNanKey) return __uint_as_float(0x7fc00000u);
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

struct RouterParams {
  RouterKind kind;
  const float* logits;  // (T, E)
  int64_t logits_stride;
  float* scores;  // (T, K)
  int32_t* ids;   // (T, K)
  int64_t num_tokens;
  int32_t num_experts;
  int32_t top_k;
};

// The K choices of a token, choice k held by member k % kSize.
template <typename Team>
struct Choices {
  static constexpr int kHeld = Team::kSize >= kMaxTopK ? 1 : kMaxTopK / Team::kSize;
  int32_t id[kHeld];
  uint32_t key[kHeld];
};

template <typename Team, int kPerMember>
__global__ void __launch_bounds__(Team::kSize* Team::kTeamsPerBlock)
    router_forward_kernel(const RouterParams params) {
  const Team team;
  const int64_t token = team.index();
  if (token >= params.num_tokens) return;  // whole teams leave together
  const float* row = params.logits + token * params.logits_stride;

  uint32_t keys[kPerMember];
#pragma unroll
  for (int i = 0; i < kPerMember; ++i) {
    const int expert = team.rank() + i * Team::kSize;
    keys[i] = expert < params.num_experts ? key_of(row[expert]) : kTakenKey;
  }

  uint32_t top = kTakenKey;
#pragma unroll
  for (int i = 0; i < kPerMember; ++i) top = max(top, keys[i]);
  const float shift = logit_of(team.max(top));

  float denominator = 0.0f;
  if (params.kind != RouterKind::softmax_topk) {
#pragma unroll
    for (int i = 0; i < kPerMember; ++i) {
      if (keys[i] != kTakenKey) denominator += expf(logit_of(keys[i]) - shift);
    }
    denominator = team.sum(denominator);
  }

  Choices<Team> choices;
  for (int k = 0; k < params.top_k; ++k) {
    uint32_t best = kTakenKey;
#pragma unroll
    for (int i = 0; i < kPerMember; ++i) best = max(best, keys[i]);
    best = team.max(best);
    uint32_t expert = 0xffffffffu;
#pragma unroll
    for (int i = kPerMember - 1; i >= 0; --i) {
      if (keys[i] == best) expert = static_cast<uint32_t>(team.rank() + i * Team::kSize);
    }
    expert = team.min(expert);
#pragma unroll
    for (int i = 0; i < kPerMember; ++i) {
      if (static_cast<uint32_t>(team.rank() + i * Team::kSize) == expert) keys[i] = kTakenKey;
    }
#pragma unroll
    for (int held = 0; held < Choices<Team>::kHeld; ++held) {
      if (k == team.rank() + held * Team::kSize) {
        choices.id[held] = static_cast<int32_t>(expert);
        choices.key[held] = best;
      }
    }
  }

  float weights[Choices<Team>::kHeld];
  float chosen_sum = 0.0f;
#pragma unroll
  for (int held = 0; held < Choices<Team>::kHeld; ++held) {
    weights[held] = 0.0f;
    if (team.rank() + held * Team::kSize < params.top_k) {
      weights[held] = expf(logit_of(choices.key[held]) - shift);
    }
    chosen_sum += weights[held];
  }
  // Normalised scores are those of the chosen alone, but a NaN anywhere spoils them all.
  if (params.kind != RouterKind::topk_softmax) {
    chosen_sum = team.sum(chosen_sum);
    if (!isnan(denominator)) denominator = chosen_sum;
  }
#pragma unroll
  for (int held = 0; held < Choices<Team>::kHeld; ++held) {
    const int k = team.rank() + held * Team::kSize;
    if (k < params.top_k) {
      params.scores[token * params.top_k + k] = weights[held] / denominator;
      params.ids[token * params.top_k + k] = choices.id[held];
    }
  }
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
    out[ids[k]] = scores[k] * (dscores[k] - dot);
  }
}

template <typename Team, int kPerMember>
void launch_forward(const RouterParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_tokens, Team::kTeamsPerBlock));
  router_forward_kernel<Team, kPerMember>
      <<<blocks, Team::kSize * Team::kTeamsPerBlock, 0, stream>>>(params);
}

}  // namespace

void router_forward(const RouterForwardArgs& args, const Context& context) {
  if (args.logits.size(1) > kMaxExperts || args.scores.size(1) > kMaxTopK) {
    throw Error(ErrorCode::unsupported,
                {"routing on the GPU",
                 "num_experts " + std::to_string(args.logits.size(1)) + " and top_k " +
                     std::to_string(args.scores.size(1)),
                 "at most " + std::to_string(kMaxExperts) + " and " + std::to_string(kMaxTopK),
                 "Route on the CPU, or bring ids and scores of your own."});
  }
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

  const cudaStream_t stream = stream_of(context);
  const int32_t experts = params.num_experts;
  if (experts <= 32) {
    launch_forward<WarpTeam, 1>(params, stream);
  } else if (experts <= 64) {
    launch_forward<WarpTeam, 2>(params, stream);
  } else if (experts <= 128) {
    launch_forward<WarpTeam, 4>(params, stream);
  } else if (experts <= 256) {
    launch_forward<WarpTeam, 8>(params, stream);
  } else if (experts <= 512) {
    launch_forward<WarpTeam, 16>(params, stream);
  } else if (experts <= 1024) {
    launch_forward<WarpTeam, 32>(params, stream);
  } else {
    launch_forward<BlockTeam, kMaxExperts / BlockTeam::kSize>(params, stream);
  }
  check_launch("router_forward_kernel");
}

void router_backward(const RouterBackwardArgs& args, const Context& context) {
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
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_tokens, WarpTeam::kTeamsPerBlock));
  router_backward_kernel<<<blocks, 256, 0, stream_of(context)>>>(params);
  check_launch("router_backward_kernel");
}

}  // namespace penstock::cuda
