// SPDX-License-Identifier: Apache-2.0
//
// Routers whose tokens differ in their number of experts, in at most three launches without host
// synchronisation: mark (a token's softmax, its top K, a key of every pair), select (each expert's
// best tokens; not for a threshold), emit (offsets, ids, scores, report, plan). Each may start
// while the one before it ends. Everything is counted in integers, so no order of blocks shows in
// the result.
//
// A key orders the tokens of one expert: the bit of a chosen pair, then p, with NaN last. p is that
// of backend/ranking.h, so the order is the CPU's also where two tokens all but tie. Keys are
// written as their upper 16 bits, which leave few tokens of an expert undecided; of those the rest
// is computed again.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/ops.h"
#include "backend/ranking.h"
#include "backends/cuda/arch/launch.cuh"
#include "backends/cuda/launch.h"

namespace penstock::cuda {

inline constexpr int kChunkTokens = 64;  // tokens of one block of the emit kernel
inline constexpr int kTileTokens = 16;  // of one block of the mark kernel, which writes whole tiles
inline constexpr uint32_t kChosenBit = 0x80000000u;

// How a pair's score follows from its logit.
enum class PairScore : uint8_t {
  softmax_of_all,  // exp(logit - shift) / sum over the token's experts
  softmax_of_top,  // exp(logit - shift) / sum over the token's top K
  sigmoid,         // 1 / (1 + exp(-logit))
};

inline PairScore pair_score(RouterKind kind, const RouterOptions& options) {
  if (kind == RouterKind::threshold) return PairScore::sigmoid;
  const bool of_top =
      kind == RouterKind::token_rounding && options.scaling == ScoreScaling::normalized;
  return of_top ? PairScore::softmax_of_top : PairScore::softmax_of_all;
}

struct TokenNorm {
  float shift;
  float divisor;
};

// p = exp(logit - shift) * inverse, as it is ranked.
struct RankNorm {
  float shift;
  float inverse;
};

__device__ inline float score_of(PairScore score, const TokenNorm& norm, float logit) {
  if (score == PairScore::sigmoid) return 1.0f / (1.0f + expf(-logit));
  return expf(logit - norm.shift) / norm.divisor;
}

// A token's choice of an expert.
struct TopChoice {
  int32_t expert;
  float score;
};

// Arrays of the plan that emit writes; null: not wanted.
struct PlanArrays {
  int32_t* expert_counts;   // (E)
  int32_t* expert_offsets;  // (E+1)
  int32_t* row_to_token;    // (slots)
  int32_t* row_to_slot;     // (slots)
  int32_t* slot_to_row;     // (slots)
};

struct PairParams {
  RouterKind kind;
  RouterOptions options;
  PairScore score;
  const float* logits;  // (T, E)
  int64_t logits_stride;
  int64_t num_tokens;
  int64_t num_slots;
  int32_t num_experts;
  int32_t top_k;          // 0: no pair is chosen by its token
  int32_t expert_tokens;  // C of expert_choice
  float least_logit;      // of threshold
  int32_t num_chunks;
  int32_t mask_words;  // of one token
  const int64_t* seed;

  float* scores;           // (slots)
  int32_t* ids;            // (slots)
  int32_t* token_offsets;  // (T+1)

  PlanArrays plan;

  int32_t* report;  // (kRouterReportSize)
  // threshold
  int32_t* chunks;  // (chunks)  pairs of each chunk of tokens
  uint32_t* masks;  // (T, mask_words) a token's experts
  // the others
  int32_t* counts;   // (E)         tokens that chose the expert; null: no launch asks another's
  int32_t* totals;   // (E)         tokens that the expert keeps
  int32_t* before;   // (chunks, E) and how many of them are in the chunks before
  uint2* kept;       // (chunks, E) those of the chunk, one bit each
  TokenNorm* norms;  // (T)
  RankNorm* ranks;   // (T)
  TopChoice* top;    // (T, K)
  uint16_t* keys;    // (E, key_stride) upper halves; 0 past the last token
  int64_t key_stride;
};

// The key of p but for the bit of a chosen pair; 31 bits, as p is at most 1.
__device__ inline uint32_t probability_key(float p) {
  return isnan(p) ? 0u : __float_as_uint(p) << 1 | 1u;
}
__device__ inline float probability_of(uint32_t key) {
  const uint32_t bits = key & ~kChosenBit;
  return bits == 0 ? __uint_as_float(0x7fc00000u) : __uint_as_float(bits >> 1);
}

// All 32 bits of the key whose upper half is given.
__device__ inline uint32_t whole_key(const PairParams& params, int32_t expert, uint32_t token,
                                     uint32_t upper) {
  const RankNorm norm = params.ranks[token];
  const float logit = params.logits[token * params.logits_stride + expert];
  const float weight = ranking::exponential_below_88(ranking::minus(logit, norm.shift));
  const uint32_t chosen = upper << 16 & kChosenBit;
  return chosen | probability_key(ranking::times(weight, norm.inverse));
}

// The least fp32 logit whose sigmoid reaches the threshold, by the CPU's formula in double, so that
// both sides decide alike; NaN where none does.
float least_passing_logit(double threshold);

void launch_mark_by_softmax(const PairParams& params, const Context& context);
void launch_mark_by_threshold(const PairParams& params, const Context& context);
void launch_select_tokens(const PairParams& params, const Context& context);
void launch_emit_pairs(const PairParams& params, const Context& context);
// Scores of the pairs in ids and token_offsets, by the sums of the kernels above.
void launch_score_given(const PairParams& params, cudaStream_t stream);

}  // namespace penstock::cuda
