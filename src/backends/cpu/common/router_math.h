// SPDX-License-Identifier: Apache-2.0
//
// The router on one token: choice of the K largest logits, scores of the three kinds, gradient.
// Both CPU backends run it, so that ids and scores do not depend on the backend. Sums over experts
// are kept in double. A NaN logit ranks below every number, ties go to the lower id.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "penstock/routing.h"

namespace penstock::cpu {

// One token's slice of the router's tensors. Logit is float or double.
template <typename Logit>
struct TokenScores {
  const Logit* logits;  // (E)
  int64_t num_experts;
  Logit* scores;  // (K)
  int32_t* ids;   // (K)
  int64_t top_k;
};

// Whether `left` is chosen before `right`, ids aside.
template <typename Logit>
bool ranks_above(Logit left, Logit right) {
  return left > right || (std::isnan(right) && !std::isnan(left));
}

// ids of the K largest, largest first. Experts are offered by rising id and pass only those they
// rank above, so equal logits stay in order of id.
template <typename Logit>
void choose_top_k(const Logit* logits, int64_t num_experts, int32_t* ids, int64_t top_k) {
  int64_t chosen = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const Logit logit = logits[expert];
    if (chosen == top_k && !ranks_above(logit, logits[ids[top_k - 1]])) continue;
    int32_t* const end = ids + chosen;
    int32_t* const place = std::upper_bound(
        ids, end, logit, [&](Logit value, int32_t id) { return ranks_above(value, logits[id]); });
    if (chosen < top_k) ++chosen;
    std::copy_backward(place, ids + chosen - 1, ids + chosen);
    *place = static_cast<int32_t>(expert);
  }
}

// sum_e exp(logit_e - largest), over all experts, in order of id. NaN if any logit is.
template <typename Logit>
double softmax_denominator(const Logit* logits, int64_t num_experts, Logit largest) {
  double sum = 0.0;
  for (int64_t expert = 0; expert < num_experts; ++expert)
    sum += static_cast<double>(std::exp(logits[expert] - largest));
  return sum;
}

// ids are chosen; the first of them has the largest logit (NaN if all are).
template <typename Logit>
void score_chosen(RouterKind kind, const TokenScores<Logit>& token) {
  const Logit largest = token.logits[token.ids[0]];
  double sum = 0.0;
  for (int64_t k = 0; k < token.top_k; ++k) {
    token.scores[k] = std::exp(token.logits[token.ids[k]] - largest);
    sum += static_cast<double>(token.scores[k]);
  }
  if (kind != RouterKind::softmax_topk) {
    const double all = softmax_denominator(token.logits, token.num_experts, largest);
    // Normalised scores are those of the chosen alone, but a NaN anywhere spoils them all.
    if (kind == RouterKind::topk_softmax || std::isnan(all)) sum = all;
  }
  for (int64_t k = 0; k < token.top_k; ++k)
    token.scores[k] = static_cast<Logit>(static_cast<double>(token.scores[k]) / sum);
}

template <typename Logit>
void route_token(RouterKind kind, const TokenScores<Logit>& token) {
  if (token.top_k == 0) return;
  choose_top_k(token.logits, token.num_experts, token.ids, token.top_k);
  score_chosen(kind, token);
}

// One token's slice of the router's backward pass.
template <typename Logit>
struct TokenGradients {
  const Logit* logits;  // (E)
  int64_t num_experts;
  const Logit* scores;   // (K)
  const int32_t* ids;    // (K)  one outside [0, E) has no logit and is passed over
  const Logit* dscores;  // (K)
  int64_t top_k;
  Logit* dlogits;  // (E) out
};

// dlogits of the experts that were not chosen: 0, or their share of the softmax over all.
template <typename Logit>
void spread_to_all(RouterKind kind, const TokenGradients<Logit>& token, double dot) {
  if (kind != RouterKind::topk_softmax) {
    std::fill_n(token.dlogits, token.num_experts, Logit(0));
    return;
  }
  Logit largest = token.logits[0];
  for (int64_t expert = 1; expert < token.num_experts; ++expert)
    if (ranks_above(token.logits[expert], largest)) largest = token.logits[expert];
  const double all = softmax_denominator(token.logits, token.num_experts, largest);
  for (int64_t expert = 0; expert < token.num_experts; ++expert) {
    const double probability = static_cast<double>(std::exp(token.logits[expert] - largest)) / all;
    token.dlogits[expert] = static_cast<Logit>(probability * (0.0 - dot));
  }
}

// d score_k / d logit_e = score_k (1[e = k] - p_e), with p the softmax over the chosen or over all.
template <typename Logit>
void route_token_backward(RouterKind kind, const TokenGradients<Logit>& token) {
  double dot = 0.0;
  for (int64_t k = 0; k < token.top_k; ++k)
    dot += static_cast<double>(token.scores[k]) * static_cast<double>(token.dscores[k]);
  spread_to_all(kind, token, dot);
  for (int64_t k = 0; k < token.top_k; ++k) {
    const int32_t expert = token.ids[k];
    if (expert < 0 || expert >= token.num_experts) continue;
    const double score = static_cast<double>(token.scores[k]);
    token.dlogits[expert] =
        static_cast<Logit>(score * (static_cast<double>(token.dscores[k]) - dot));
  }
}

}  // namespace penstock::cpu
