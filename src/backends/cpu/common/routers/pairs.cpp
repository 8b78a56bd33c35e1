// SPDX-License-Identifier: Apache-2.0
//
// See pairs.h.
#include "backends/cpu/common/routers/pairs.h"

namespace penstock::cpu {

int32_t counts_to_offsets(const RouterForwardArgs& args) {
  int32_t* offsets = args.token_offsets.as<int32_t>();
  const int64_t num_slots = args.ids.numel();
  int64_t pairs = 0;
  offsets[0] = 0;
  for (int64_t token = 0; token < args.logits.size(0); ++token) {
    pairs += offsets[token + 1];
    offsets[token + 1] = static_cast<int32_t>(std::min(pairs, num_slots));
  }
  return static_cast<int32_t>(pairs - std::min(pairs, num_slots));
}

void finish_pairs(const RouterForwardArgs& args, const PairCounts& counts) {
  const int32_t* offsets = args.token_offsets.as<const int32_t>();
  const int64_t num_tokens = args.logits.size(0);
  const int32_t pairs = offsets[num_tokens];
  std::fill_n(args.ids.as<int32_t>() + pairs, args.ids.numel() - pairs, -1);
  if (!args.report.present()) return;
  int32_t without_expert = 0;
  for (int64_t token = 0; token < num_tokens; ++token)
    without_expert += offsets[token + 1] == offsets[token] ? 1 : 0;
  int32_t* report = args.report.as<int32_t>();
  const auto entry = [&](RouterReport which) -> int32_t& {
    return report[static_cast<int64_t>(which)];
  };
  entry(RouterReport::pairs) = pairs;
  entry(RouterReport::tokens_without_expert) = without_expert;
  entry(RouterReport::dropped) = counts.dropped;
  entry(RouterReport::added) = counts.added;
  entry(RouterReport::rounded) = counts.rounded;
}

void score_pairs_by_softmax(const RouterForwardArgs& args, const StepLoop& loop) {
  const int64_t num_experts = args.logits.size(1);
  const int32_t* ids = args.ids.as<const int32_t>();
  visit_accumulator(args.logits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
    Logit* scores = args.scores.as<Logit>();
    loop.for_each(args.logits.size(0), num_experts * kWorkPerLogit, [&](int64_t token) {
      const TokenSoftmax softmax(row_of<const Logit>(args.logits, token), num_experts);
      const RowRange slots = slots_of(args.token_offsets, 0, token);
      for (int64_t slot = slots.begin; slot < slots.end; ++slot)
        scores[slot] = names_expert(ids[slot], num_experts)
                           ? static_cast<Logit>(softmax.probability(ids[slot]))
                           : Logit(0);
    });
  });
}

void softmax_pairs_backward(const RouterBackwardArgs& args, const StepLoop& loop) {
  visit_accumulator(args.logits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
    loop.for_each(args.logits.size(0), args.logits.size(1) * kWorkPerLogit, [&](int64_t token) {
      const RowRange slots = slots_of(args.token_offsets, 0, token);
      route_token_backward<Logit>(RouterKind::topk_softmax,
                                  {.logits = row_of<const Logit>(args.logits, token),
                                   .num_experts = args.logits.size(1),
                                   .scores = args.scores.as<const Logit>() + slots.begin,
                                   .ids = args.ids.as<const int32_t>() + slots.begin,
                                   .dscores = args.dscores.as<const Logit>() + slots.begin,
                                   .top_k = slots.end - slots.begin,
                                   .dlogits = row_of<Logit>(args.dlogits, token)});
    });
  });
}

}  // namespace penstock::cpu
