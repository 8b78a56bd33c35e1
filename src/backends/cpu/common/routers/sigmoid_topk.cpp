// SPDX-License-Identifier: Apache-2.0
//
// DeepSeek-V3's router (arXiv 2412.19437, eq. 12-16 and section 4.2): s = sigmoid(logits); a token
// ranks experts by s plus a bias that steers the choice and never the weights. With groups, the
// experts are cut into runs of equal length, and only the token's best groups take part, a group
// being worth the sum of its two best biased scores.
//   score_k = scale * s_k / sum of the chosen s, or scale * s_k
#include <array>

#include "backend/ranking.h"
#include "backends/cpu/common/elements.h"
#include "backends/cpu/common/router_math.h"
#include "backends/cpu/common/routers/router.h"
#include "backends/cpu/common/routers/sigmoid.h"

namespace penstock::cpu {
namespace {

// Scratch of one token.
template <typename Logit>
struct TokenScratch {
  Logit* biased;        // (E)
  Logit* groups;        // (num_groups)
  int32_t* best;        // (num_groups) ids of the groups that take part, first
  uint8_t* takes_part;  // (num_groups)
};

int64_t aligned(int64_t bytes) { return (bytes + 7) / 8 * 8; }

int64_t token_bytes(int64_t num_experts, int64_t num_groups, DType dtype) {
  return aligned(size_of(dtype) * (num_experts + num_groups)) + aligned(4 * num_groups) +
         aligned(num_groups);
}

int64_t scratch_bytes(const RouteProblem& problem) {
  if (problem.selection == Selection::given) return 0;
  return problem.num_tokens *
         token_bytes(problem.num_experts, problem.options.num_groups, problem.dtype);
}

template <typename Logit>
TokenScratch<Logit> scratch_of(const RouterForwardArgs& args, int64_t token) {
  const int64_t experts = args.logits.size(1);
  const int64_t groups = args.options.num_groups;
  auto* base = static_cast<std::byte*>(args.workspace.data) +
               token * token_bytes(experts, groups, args.logits.dtype);
  TokenScratch<Logit> scratch = {};
  scratch.biased = reinterpret_cast<Logit*>(base);
  scratch.groups = scratch.biased + experts;
  scratch.best =
      reinterpret_cast<int32_t*>(base + aligned((experts + groups) * int64_t{sizeof(Logit)}));
  scratch.takes_part =
      reinterpret_cast<uint8_t*>(scratch.best) + aligned(groups * int64_t{sizeof(int32_t)});
  return scratch;
}

// The sum of the two best scores of a group; of the only one, where it has one.
template <typename Logit>
Logit group_worth(const Logit* biased, int64_t size) {
  std::array<int32_t, 2> best = {};
  const int64_t counted = std::min<int64_t>(2, size);
  choose_top_k(biased, size, best.data(), counted);
  return counted == 1 ? biased[best[0]] : biased[best[0]] + biased[best[1]];
}

// The sigmoid that experts are ranked by.
float ranking_sigmoid(float logit) { return ranking::sigmoid(logit); }
double ranking_sigmoid(double logit) { return sigmoid(logit); }

// The K best of the experts of the groups that take part, best first, ties to the lower id.
template <typename Logit>
void choose(const RouterForwardArgs& args, const TokenScratch<Logit>& scratch, int32_t* ids) {
  const int64_t groups = args.options.num_groups;
  const int64_t size = args.logits.size(1) / groups;
  for (int64_t group = 0; group < groups; ++group) {
    scratch.groups[group] = group_worth(scratch.biased + group * size, size);
    scratch.takes_part[group] = 0;
  }
  choose_top_k(scratch.groups, groups, scratch.best, args.options.top_groups);
  for (int32_t i = 0; i < args.options.top_groups; ++i) scratch.takes_part[scratch.best[i]] = 1;
  TopKChoice<Logit> choice(scratch.biased, ids, args.ids.size(1));
  for (int64_t expert = 0; expert < groups * size; ++expert)
    if (scratch.takes_part[expert / size] != 0) choice.offer(expert);
}

template <typename Logit>
void choose_token(const RouterForwardArgs& args, int64_t token) {
  const TokenScratch<Logit> scratch = scratch_of<Logit>(args, token);
  const Logit* logits = row_of<const Logit>(args.logits, token);
  for (int64_t expert = 0; expert < args.logits.size(1); ++expert) {
    const Logit bias = args.bias.present() ? value_at<Logit>(args.bias, expert) : Logit(0);
    scratch.biased[expert] = ranking_sigmoid(logits[expert]) + bias;
  }
  choose(args, scratch, row_of<int32_t>(args.ids, token));
}

// Sigmoids of the chosen; 0 for an id that names no expert.
template <typename Logit>
double chosen_sigmoid(const Logit* logits, int64_t num_experts, int32_t id) {
  return names_expert(id, num_experts) ? sigmoid(static_cast<double>(logits[id])) : 0.0;
}

template <typename Logit>
double chosen_sum(const Logit* logits, int64_t num_experts, const int32_t* ids, int64_t top_k) {
  double sum = 0.0;
  for (int64_t k = 0; k < top_k; ++k) sum += chosen_sigmoid(logits, num_experts, ids[k]);
  return sum;
}

template <typename Logit>
void score_token(const RouterForwardArgs& args, int64_t token) {
  const int64_t num_experts = args.logits.size(1);
  const int64_t top_k = args.ids.size(1);
  const Logit* logits = row_of<const Logit>(args.logits, token);
  const int32_t* ids = row_of<const int32_t>(args.ids, token);
  Logit* scores = row_of<Logit>(args.scores, token);
  const double sum = args.options.scaling == ScoreScaling::normalized
                         ? chosen_sum(logits, num_experts, ids, top_k)
                         : 1.0;
  for (int64_t k = 0; k < top_k; ++k) {
    const double share = chosen_sigmoid(logits, num_experts, ids[k]) / sum;
    scores[k] = static_cast<Logit>(args.options.scale * share);
  }
}

void forward(const RouterForwardArgs& args, const StepLoop& loop) {
  visit_accumulator(args.logits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
    loop.for_each(args.logits.size(0), args.logits.size(1) * kWorkPerLogit, [&](int64_t token) {
      if (args.selection == Selection::chosen) choose_token<Logit>(args, token);
      score_token<Logit>(args, token);
    });
  });
}

// d score_k / d logit_j = s'_j / sum * (scale * 1[j = k] - score_k), s' = s (1 - s); without the
// sum it is scale * s'_j * 1[j = k].
template <typename Logit>
void backward_token(const RouterBackwardArgs& args, int64_t token) {
  const int64_t num_experts = args.logits.size(1);
  const int64_t top_k = args.ids.size(1);
  const Logit* logits = row_of<const Logit>(args.logits, token);
  const int32_t* ids = row_of<const int32_t>(args.ids, token);
  const Logit* scores = row_of<const Logit>(args.scores, token);
  const Logit* dscores = row_of<const Logit>(args.dscores, token);
  Logit* dlogits = row_of<Logit>(args.dlogits, token);
  double sum = 1.0;
  double dot = 0.0;
  if (args.options.scaling == ScoreScaling::normalized) {
    sum = chosen_sum(logits, num_experts, ids, top_k);
    for (int64_t k = 0; k < top_k; ++k)
      dot += static_cast<double>(scores[k]) * static_cast<double>(dscores[k]);
  }
  std::fill_n(dlogits, num_experts, Logit(0));
  for (int64_t k = 0; k < top_k; ++k) {
    if (!names_expert(ids[k], num_experts)) continue;
    const double s = sigmoid(static_cast<double>(logits[ids[k]]));
    const double direct = args.options.scale * static_cast<double>(dscores[k]);
    dlogits[ids[k]] = static_cast<Logit>(s * (1.0 - s) / sum * (direct - dot));
  }
}

void backward(const RouterBackwardArgs& args, const StepLoop& loop) {
  visit_accumulator(args.logits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
    loop.for_each(args.logits.size(0), args.logits.size(1) * kWorkPerLogit,
                  [&](int64_t token) { backward_token<Logit>(args, token); });
  });
}

}  // namespace

constinit const Router kSigmoidTopK = {scratch_bytes, forward, backward};

}  // namespace penstock::cpu
