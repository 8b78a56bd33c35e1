// SPDX-License-Identifier: Apache-2.0
//
// What the routers without a fixed K share: (token, expert) pairs laid out by token_offsets, scores
// that are a softmax over all experts, and the choice of an expert's best tokens.
//
// Invariants of a finished routing: offsets rise from 0 to the number of pairs, a token's pairs
// stand together, and slots past the last pair hold id -1 and score 0.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <span>

#include "backend/ranking.h"
#include "backends/cpu/common/elements.h"
#include "backends/cpu/common/router_math.h"
#include "backends/cpu/common/routers/router.h"
#include "backends/cpu/common/rows.h"

namespace penstock::cpu {

// Experts that one step takes together: their scores of a token share a cache line.
inline constexpr int64_t kExpertsPerStep = 16;

// p_e = exp(logit_e - largest) / denominator of one token.
template <typename Logit>
struct TokenSoftmax {
  TokenSoftmax(const Logit* token_logits, int64_t num_experts)
      : logits(token_logits),
        largest(largest_logit(token_logits, num_experts)),
        denominator(softmax_denominator(token_logits, num_experts, largest)) {}

  double exponential(int64_t expert) const {
    return static_cast<double>(std::exp(logits[expert] - largest));
  }
  double probability(int64_t expert) const { return exponential(expert) / denominator; }

  const Logit* logits;
  Logit largest;
  double denominator;
};

// p of a token's experts as tokens are ranked by it, the same bits on every backend in fp32.
inline void ranking_softmax(const float* logits, int64_t num_experts, float* p) {
  const float largest = largest_logit(logits, num_experts);
  std::array<float, ranking::kPartialSums> sums = {};
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    p[expert] = ranking::exponential(ranking::minus(logits[expert], largest));
    sums[expert % ranking::kPartialSums] += p[expert];
  }
  for (size_t half = sums.size() / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  const float inverse = ranking::over(1.0f, sums[0]);
  for (int64_t expert = 0; expert < num_experts; ++expert)
    p[expert] = ranking::times(p[expert], inverse);
}

inline void ranking_softmax(const double* logits, int64_t num_experts, double* p) {
  const TokenSoftmax softmax(logits, num_experts);
  for (int64_t expert = 0; expert < num_experts; ++expert) p[expert] = softmax.probability(expert);
}

// Tokens of one expert's column of `keys` (T, E), by falling key; NaN last, ties to the lower
// token.
template <typename Logit>
class TokenRank {
 public:
  TokenRank(const Logit* keys, int64_t num_experts, int64_t expert)
      : column_(keys + expert), stride_(num_experts) {}

  bool before(int32_t left, int32_t right) const {
    const Logit a = column_[left * stride_];
    const Logit b = column_[right * stride_];
    if (ranks_above(a, b)) return true;
    return !ranks_above(b, a) && left < right;
  }
  Logit key(int32_t token) const { return column_[token * stride_]; }

 private:
  const Logit* column_;
  int64_t stride_;
};

// The `limit` first of the tokens offered, by an order `before`, in memory that the caller lends.
// A heap whose root is the last of those kept; what it ends with does not depend on the order in
// which tokens are offered.
template <typename Before>
class FirstTokens {
 public:
  FirstTokens(int32_t* storage, int64_t limit, Before before)
      : storage_(storage), limit_(limit), before_(before) {}

  void offer(int32_t token) {
    if (size_ < limit_) {
      storage_[size_++] = token;
      std::push_heap(storage_, storage_ + size_, before_);
    } else if (limit_ > 0 && before_(token, storage_[0])) {
      std::pop_heap(storage_, storage_ + size_, before_);
      storage_[size_ - 1] = token;
      std::push_heap(storage_, storage_ + size_, before_);
    }
  }

  std::span<const int32_t> tokens() const { return {storage_, static_cast<size_t>(size_)}; }
  // The same, first one first: a fixed order to sum in.
  std::span<const int32_t> sorted() {
    std::sort_heap(storage_, storage_ + size_, before_);
    return tokens();
  }

 private:
  int32_t* storage_;
  int64_t limit_;
  int64_t size_ = 0;
  Before before_;
};

// A report's counts; pairs and tokens_without_expert follow from the offsets.
struct PairCounts {
  int32_t dropped = 0;
  int32_t added = 0;
  int32_t rounded = 0;
};

// Turns counts of pairs in token_offsets[t + 1] into offsets that end at the number of slots.
// Returns the pairs that found no slot.
int32_t counts_to_offsets(const RouterForwardArgs& args);

// Pads the slots past the last pair and writes the report.
void finish_pairs(const RouterForwardArgs& args, const PairCounts& counts);

// Scores of the pairs that are there: p_te.
void score_pairs_by_softmax(const RouterForwardArgs& args, const StepLoop& loop);

// dlogits of scores p_te: p_j (dscore_j [j is a pair] - sum over the token's pairs of p dscore).
void softmax_pairs_backward(const RouterBackwardArgs& args, const StepLoop& loop);

}  // namespace penstock::cpu
