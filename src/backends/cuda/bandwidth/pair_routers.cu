// SPDX-License-Identifier: Apache-2.0
//
// token_rounding, expert_choice and threshold: scratch, order of launches, and the backward kernel.
#include <algorithm>

#include "backends/cuda/bandwidth/bandwidth_ops.h"
#include "backends/cuda/bandwidth/pair_routers.cuh"
#include "backends/cuda/bandwidth/pair_routers.h"
#include "backends/cuda/bandwidth/warp_top_k.cuh"

namespace penstock::cuda {
namespace {

constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

// Byte offsets of the scratch, of which nothing is expected. A threshold shares no part of it with
// the others, and its plan is made after the router has done with it.
struct Layout {
  explicit Layout(const RouteProblem& problem) {
    constexpr int64_t kWord = sizeof(int32_t);
    const int64_t tokens = problem.num_tokens;
    const int64_t experts = problem.num_experts;
    const int64_t top_k = problem.kind == RouterKind::token_rounding ? problem.top_k : 0;
    num_chunks = ceil_div(tokens, kChunkTokens);
    mask_words = ceil_div(experts, 32);
    report = take(kRouterReportSize * kWord);
    if (problem.kind == RouterKind::threshold) {
      chunks = take(num_chunks * kWord);
      masks = take(tokens * mask_words * kWord);
      return;
    }
    counts = take(experts * kWord);
    totals = take(experts * kWord);
    before = take(num_chunks * experts * kWord);
    kept = take(num_chunks * experts * int64_t{sizeof(uint2)});
    norms = take(tokens * int64_t{sizeof(TokenNorm)});
    ranks = take(tokens * int64_t{sizeof(RankNorm)});
    top = take(tokens * top_k * int64_t{sizeof(TopChoice)});
    key_stride = ceil_div(tokens, kTileTokens) * kTileTokens;
    keys = take(key_stride * experts * int64_t{sizeof(uint16_t)});
  }

  int64_t take(int64_t wanted) {
    const int64_t offset = bytes;
    bytes += aligned(wanted);
    return offset;
  }

  int64_t bytes = 0;
  int64_t num_chunks, mask_words;
  int64_t report = 0, chunks = 0, masks = 0;
  int64_t counts = 0, totals = 0, before = 0, kept = 0, norms = 0, ranks = 0, top = 0;
  int64_t keys = 0, key_stride = 0;
};

struct PairBackwardParams {
  PairScore score;
  const float* logits;
  int64_t logits_stride;
  const float* scores;
  const int32_t* ids;
  const float* dscores;
  const int32_t* token_offsets;
  float* dlogits;
  int64_t dlogits_stride;
  int64_t num_tokens;
  int32_t num_experts;
  int32_t top_k;
};

// The row's share of -dot: the softmax over all experts or over the top K; 0 elsewhere.
template <int kPerLane>
__device__ void write_shares(const PairBackwardParams& params, const float* row, float* out,
                             float dot) {
  __shared__ uint64_t candidates[WarpTeam::kTeamsPerBlock][kCandidates];
  const WarpTeam team;
  const LaneValues<kPerLane> logits = load_values<kPerLane>(row, params.num_experts);
  const float shift = logit_of(team.max(lane_largest(logits)));
  uint32_t within = logits.present;  // bit i: expert rank + 32 i is in the softmax
  if (params.score == PairScore::softmax_of_top) {
    const uint64_t last = choose_top_k(
        logits, params.top_k, candidates[threadIdx.x / WarpTeam::kSize], [](int, const Choice&) {});
    within = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = team.rank() + i * WarpTeam::kSize;
      if (packed(key_of(logits.value[i]), expert) >= last) within |= 1u << i;
    }
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if ((within >> i & 1u) != 0) sum += expf(logits.value[i] - shift);
  }
  const float scale = dot / team.sum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (!logits.has(i)) continue;
    const float share = (within >> i & 1u) != 0 ? -expf(logits.value[i] - shift) * scale : 0.0f;
    out[team.rank() + i * WarpTeam::kSize] = share;
  }
}

// One warp a token.
template <int kPerLane>
__global__ void __launch_bounds__(256, 1) pairs_backward_kernel(const PairBackwardParams params) {
  const WarpTeam team;
  const int64_t token = team.index();
  if (token >= params.num_tokens) return;
  const float* row = params.logits + token * params.logits_stride;
  float* out = params.dlogits + token * params.dlogits_stride;
  const int32_t begin = params.token_offsets[token];
  const int32_t end = params.token_offsets[token + 1];
  if (params.score != PairScore::sigmoid) {
    float dot = 0.0f;
    for (int32_t slot = begin + team.rank(); slot < end; slot += WarpTeam::kSize)
      dot += params.scores[slot] * params.dscores[slot];
    write_shares<kPerLane>(params, row, out, team.sum(dot));
  } else {
    for (int e = team.rank(); e < params.num_experts; e += WarpTeam::kSize) out[e] = 0.0f;
  }
  __syncwarp();  // a pair's expert is written by one lane and added to by another
  for (int32_t slot = begin + team.rank(); slot < end; slot += WarpTeam::kSize) {
    const int32_t expert = params.ids[slot];
    if (expert < 0 || expert >= params.num_experts) continue;
    const float score = params.scores[slot];
    const float slope = params.score == PairScore::sigmoid ? score * (1.0f - score) : score;
    out[expert] += slope * params.dscores[slot];
  }
}

PairParams pair_params(const RouterForwardArgs& args) {
  PairParams params = {};
  params.kind = args.kind;
  params.options = args.options;
  params.score = pair_score(args.kind, args.options);
  params.logits = args.logits.as<const float>();
  params.logits_stride = args.logits.stride(0);
  params.num_tokens = args.logits.size(0);
  params.num_slots = args.ids.numel();
  params.num_experts = static_cast<int32_t>(args.logits.size(1));
  params.top_k = args.kind == RouterKind::token_rounding ? args.top_k : 0;
  params.expert_tokens = static_cast<int32_t>(params.num_slots / params.num_experts);
  params.seed = args.seed.present() ? args.seed.as<const int64_t>() : nullptr;
  params.scores = args.scores.as<float>();
  params.ids = args.ids.as<int32_t>();
  params.token_offsets = args.token_offsets.as<int32_t>();
  return params;
}

PlanArrays plan_arrays(const RoutingPlan& plan) {
  return {.expert_counts = plan.expert_counts.as<int32_t>(),
          .expert_offsets = plan.expert_offsets.as<int32_t>(),
          .row_to_token = plan.row_to_token.as<int32_t>(),
          .row_to_slot = plan.row_to_slot.as<int32_t>(),
          .slot_to_row = plan.slot_to_row.as<int32_t>()};
}

// Lays out the scratch; what the first launch cannot start is set to 0 on the stream.
void place_scratch(const RouterForwardArgs& args, PairParams& params, cudaStream_t stream) {
  RouteProblem problem;
  problem.kind = args.kind;
  problem.num_tokens = params.num_tokens;
  problem.num_experts = params.num_experts;
  problem.top_k = args.top_k;
  const Layout layout(problem);
  auto* base = static_cast<char*>(args.workspace.data);
  params.num_chunks = static_cast<int32_t>(layout.num_chunks);
  params.mask_words = static_cast<int32_t>(layout.mask_words);
  params.report = args.report.present() ? args.report.as<int32_t>()
                                        : reinterpret_cast<int32_t*>(base + layout.report);
  params.chunks = reinterpret_cast<int32_t*>(base + layout.chunks);
  params.masks = reinterpret_cast<uint32_t*>(base + layout.masks);
  params.totals = reinterpret_cast<int32_t*>(base + layout.totals);
  params.before = reinterpret_cast<int32_t*>(base + layout.before);
  params.kept = reinterpret_cast<uint2*>(base + layout.kept);
  params.norms = reinterpret_cast<TokenNorm*>(base + layout.norms);
  params.top = reinterpret_cast<TopChoice*>(base + layout.top);
  params.ranks = reinterpret_cast<RankNorm*>(base + layout.ranks);
  params.keys = reinterpret_cast<uint16_t*>(base + layout.keys);
  params.key_stride = layout.key_stride;
  const bool carries = args.kind == RouterKind::token_rounding &&
                       args.options.rounding == RoundingMode::balanced_count;
  if (carries) {
    params.counts = reinterpret_cast<int32_t*>(base + layout.counts);
    const size_t bytes = static_cast<size_t>(params.num_experts) * sizeof(int32_t);
    check("cudaMemsetAsync(counts)", cudaMemsetAsync(params.counts, 0, bytes, stream));
  }
  if (params.num_tokens == 0) {  // no launch of the first kernel, which would start the report
    const size_t bytes = kRouterReportSize * sizeof(int32_t);
    check("cudaMemsetAsync(report)", cudaMemsetAsync(params.report, 0, bytes, stream));
  }
}

}  // namespace

int64_t pair_scratch_bytes(const RouteProblem& problem, const Context& context) {
  if (problem.selection == Selection::given) return 0;
  const int64_t bytes = Layout(problem).bytes;
  if (problem.kind != RouterKind::threshold) return bytes;
  return std::max(bytes, plan_scratch_bytes(problem.num_slots, problem.num_experts, context));
}

void pair_router_forward(const RouterForwardArgs& args, const Context& context) {
  check_clean_device("router_forward");
  const cudaStream_t stream = stream_of(context);
  PairParams params = pair_params(args);
  if (args.selection == Selection::given) return launch_score_given(params, stream);
  place_scratch(args, params, stream);
  if (args.kind == RouterKind::threshold) {
    params.least_logit = least_passing_logit(args.options.threshold);
    launch_mark_by_threshold(params, context);
    launch_emit_pairs(params, context);
    if (args.plan.present()) build_plan({chosen_routing(args), args.plan, args.workspace}, context);
    return;
  }
  if (args.plan.present()) params.plan = plan_arrays(args.plan);
  launch_mark_by_softmax(params, context);
  launch_select_tokens(params, context);
  launch_emit_pairs(params, context);
}

void pair_router_backward(const RouterBackwardArgs& args, const Context& context) {
  check_clean_device("router_backward");
  PairBackwardParams params = {};
  params.score = pair_score(args.kind, args.options);
  params.logits = args.logits.as<const float>();
  params.logits_stride = args.logits.stride(0);
  params.scores = args.scores.as<const float>();
  params.ids = args.ids.as<const int32_t>();
  params.dscores = args.dscores.as<const float>();
  params.token_offsets = args.token_offsets.as<const int32_t>();
  params.dlogits = args.dlogits.as<float>();
  params.dlogits_stride = args.dlogits.stride(0);
  params.num_tokens = args.logits.size(0);
  params.num_experts = static_cast<int32_t>(args.logits.size(1));
  params.top_k = args.top_k;
  const auto blocks = static_cast<unsigned>(ceil_div(params.num_tokens, WarpTeam::kTeamsPerBlock));
  visit_experts_per_lane(params.num_experts, [&]<int kPerLane>() {
    pairs_backward_kernel<kPerLane><<<blocks, 256, 0, stream_of(context)>>>(params);
  });
  check_launch("pairs_backward_kernel");
}

}  // namespace penstock::cuda
