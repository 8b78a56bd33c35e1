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

// The K best of the experts that are offered, by rising id: ids of the largest values, largest
// first. An expert passes only those it ranks above, so equal values stay in order of id.
template <typename Value>
class TopKChoice {
 public:
  TopKChoice(const Value* values, int32_t* ids, int64_t top_k)
      : values_(values), ids_(ids), top_k_(top_k) {}

  void offer(int64_t expert) {
    const Value value = values_[expert];
    if (chosen_ == top_k_ && !ranks_above(value, values_[ids_[top_k_ - 1]])) return;
    int32_t* const place = std::upper_bound(
        ids_, ids_ + chosen_, value,
        [&](Value offered, int32_t id) { return ranks_above(offered, values_[id]); });
    if (chosen_ < top_k_) ++chosen_;
    std::copy_backward(place, ids_ + chosen_ - 1, ids_ + chosen_);
    *place = static_cast<int32_t>(expert);
  }

 private:
  const Value* values_;
  int32_t* ids_;
  int64_t top_k_;
  int64_t chosen_ = 0;
};

// ids of the K largest of all, largest first.
template <typename Value>
void choose_top_k(const Value* values, int64_t num_experts, int32_t* ids, int64_t top_k) {
  TopKChoice<Value> choice(values, ids, top_k);
  for (int64_t expert = 0; expert < num_experts; ++expert) choice.offer(expert);
}

// sum_e exp(logit_e - largest), over all experts, in order of id. NaN if any logit is.
template <typename Logit>
double softmax_denominator(const Logit* logits, int64_t num_experts, Logit largest) {
  double sum = 0.0;
  for (int64_t expert = 0; expert < num_experts; ++expert)
    sum += static_cast<double>(std::exp(logits[expert] - largest));
  return sum;
}

inline bool names_expert(int32_t id, int64_t num_experts) { return id >= 0 && id < num_experts; }

// Scores of the chosen ids; 0 for one that names no expert. `largest` is the largest logit that
// the scores depend on (NaN if all are).
template <typename Logit>
void score_chosen(RouterKind kind, const TokenScores<Logit>& token, Logit largest) {
  double sum = 0.0;
  for (int64_t k = 0; k < token.top_k; ++k) {
    const int32_t id = token.ids[k];
    token.scores[k] =
        names_expert(id, token.num_experts) ? std::exp(token.logits[id] - largest) : Logit(0);
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
  score_chosen(kind, token, token.logits[token.ids[0]]);
}

// The largest logit of one token; NaN only if all are.
template <typename Logit>
Logit largest_logit(const Logit* logits, int64_t num_experts) {
  Logit largest = logits[0];
  for (int64_t expert = 1; expert < num_experts; ++expert)
    if (ranks_above(logits[expert], largest)) largest = logits[expert];
  return largest;
}

// Scores of ids that the caller brings, in any order: the same bits as route_token where they are
// the ids that it chooses. A token whose ids name no expert has scores 0.
template <typename Logit>
void score_given(RouterKind kind, const TokenScores<Logit>& token) {
  int64_t named = 0;
  Logit largest = token.logits[0];
  for (int64_t k = 0; k < token.top_k; ++k) {
    const int32_t id = token.ids[k];
    if (!names_expert(id, token.num_experts)) continue;
    if (named == 0 || ranks_above(token.logits[id], largest)) largest = token.logits[id];
    ++named;
  }
  if (named == 0) {
    std::fill_n(token.scores, token.top_k, Logit(0));
    return;
  }
  if (kind != RouterKind::softmax_topk) largest = largest_logit(token.logits, token.num_experts);
  score_chosen(kind, token, largest);
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
  const Logit largest = largest_logit(token.logits, token.num_experts);
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
    if (!names_expert(expert, token.num_experts)) continue;
    const double score = static_cast<double>(token.scores[k]);
    token.dlogits[expert] =
        static_cast<Logit>(score * (static_cast<double>(token.dscores[k]) - dot));
  }
}

}  // namespace penstock::cpu
