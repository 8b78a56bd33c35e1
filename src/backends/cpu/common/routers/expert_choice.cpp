// SPDX-License-Identifier: Apache-2.0
//
// Expert choice (Zhou et al., arXiv 2202.09368): p = softmax over the experts of a token, and each
// expert takes the C tokens with its largest p, C = slots / E. Ties go to the lower token, NaN
// ranks last. A token's pairs are by rising id; some tokens have none.
//
// Scratch: keys (T, E) of the logits' dtype, picked (T, E) bytes, best (E, C) int32.
#include "backends/cpu/common/routers/pairs.h"

namespace penstock::cpu {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 7) / 8 * 8; }

int64_t scratch_bytes(const RouteProblem& problem) {
  if (problem.selection == Selection::given) return 0;
  const int64_t pairs = problem.num_tokens * problem.num_experts;
  return aligned(pairs * size_of(problem.dtype)) + aligned(pairs) +
         problem.num_slots * int64_t{sizeof(int32_t)};
}

template <typename Logit>
struct Scratch {
  explicit Scratch(const RouterForwardArgs& args)
      : num_experts(args.logits.size(1)), keys(static_cast<Logit*>(args.workspace.data)) {
    const int64_t pairs = args.logits.size(0) * num_experts;
    auto* base = static_cast<std::byte*>(args.workspace.data);
    base += aligned(pairs * int64_t{sizeof(Logit)});
    picked = reinterpret_cast<uint8_t*>(base);
    best = reinterpret_cast<int32_t*>(base + aligned(pairs));
  }

  int64_t num_experts;
  Logit* keys;      // (T, E)
  uint8_t* picked;  // (T, E)
  int32_t* best;    // (E, C)
};

template <typename Logit>
void pick_tokens(const RouterForwardArgs& args, const Scratch<Logit>& scratch, int64_t expert) {
  const int64_t capacity = args.ids.numel() / scratch.num_experts;
  const TokenRank<Logit> rank(scratch.keys, scratch.num_experts, expert);
  FirstTokens first(scratch.best + expert * capacity, capacity,
                    [&](int32_t a, int32_t b) { return rank.before(a, b); });
  for (int64_t token = 0; token < args.logits.size(0); ++token)
    first.offer(static_cast<int32_t>(token));
  for (const int32_t token : first.tokens())
    scratch.picked[token * scratch.num_experts + expert] = 1;
}

template <typename Logit>
void select(const RouterForwardArgs& args, const StepLoop& loop) {
  const Scratch<Logit> scratch(args);
  const int64_t num_tokens = args.logits.size(0);
  const int64_t num_experts = scratch.num_experts;
  const int64_t work = num_experts * kWorkPerLogit;
  loop.for_each(num_tokens, work, [&](int64_t token) {
    ranking_softmax(row_of<const Logit>(args.logits, token), num_experts,
                    scratch.keys + token * num_experts);
    std::fill_n(scratch.picked + token * num_experts, num_experts, uint8_t{0});
  });
  const int64_t steps = (num_experts + kExpertsPerStep - 1) / kExpertsPerStep;
  loop.for_each(steps, num_tokens * kExpertsPerStep * kWorkPerLogit, [&](int64_t step) {
    const int64_t end = std::min(num_experts, (step + 1) * kExpertsPerStep);
    for (int64_t expert = step * kExpertsPerStep; expert < end; ++expert)
      pick_tokens(args, scratch, expert);
  });
  int32_t* offsets = args.token_offsets.as<int32_t>();
  loop.for_each(num_tokens, num_experts, [&](int64_t token) {
    const uint8_t* row = scratch.picked + token * num_experts;
    offsets[token + 1] = static_cast<int32_t>(std::count(row, row + num_experts, uint8_t{1}));
  });
  counts_to_offsets(args);
  loop.for_each(num_tokens, num_experts, [&](int64_t token) {
    const uint8_t* row = scratch.picked + token * num_experts;
    int32_t* next = args.ids.as<int32_t>() + offsets[token];
    for (int64_t expert = 0; expert < num_experts; ++expert)
      if (row[expert] != 0) *next++ = static_cast<int32_t>(expert);
  });
  finish_pairs(args, {});
}

void forward(const RouterForwardArgs& args, const StepLoop& loop) {
  visit_accumulator(args.logits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
    if (args.selection == Selection::chosen) select<Logit>(args, loop);
    std::fill_n(args.scores.as<Logit>(), args.scores.numel(), Logit(0));
  });
  score_pairs_by_softmax(args, loop);
}

}  // namespace

constinit const Router kExpertChoice = {scratch_bytes, forward, softmax_pairs_backward};

}  // namespace penstock::cpu
