// SPDX-License-Identifier: Apache-2.0
//
// Every expert whose score sigmoid(logit) reaches the threshold, so tokens differ in their number
// of experts. Slots go to tokens in order, within a token by rising id; pairs that find none are
// dropped and reported. A NaN reaches no threshold.
#include "backends/cpu/common/routers/pairs.h"
#include "backends/cpu/common/routers/sigmoid.h"

namespace penstock::cpu {
namespace {

template <typename Logit>
bool passes(const RouterForwardArgs& args, Logit logit) {
  return sigmoid(static_cast<double>(logit)) >= args.options.threshold;
}

template <typename Logit>
void select(const RouterForwardArgs& args, const StepLoop& loop) {
  const int64_t num_tokens = args.logits.size(0);
  const int64_t num_experts = args.logits.size(1);
  int32_t* offsets = args.token_offsets.as<int32_t>();
  loop.for_each(num_tokens, num_experts * kWorkPerLogit, [&](int64_t token) {
    const Logit* logits = row_of<const Logit>(args.logits, token);
    offsets[token + 1] = static_cast<int32_t>(std::count_if(
        logits, logits + num_experts, [&](Logit logit) { return passes(args, logit); }));
  });
  const int32_t dropped = counts_to_offsets(args);
  loop.for_each(num_tokens, num_experts * kWorkPerLogit, [&](int64_t token) {
    const Logit* logits = row_of<const Logit>(args.logits, token);
    int32_t* next = args.ids.as<int32_t>() + offsets[token];
    const int32_t* end = args.ids.as<int32_t>() + offsets[token + 1];
    for (int64_t expert = 0; expert < num_experts && next < end; ++expert)
      if (passes(args, logits[expert])) *next++ = static_cast<int32_t>(expert);
  });
  finish_pairs(args, {.dropped = dropped});
}

template <typename Logit>
void score(const RouterForwardArgs& args, const StepLoop& loop) {
  const int64_t num_experts = args.logits.size(1);
  const int32_t* ids = args.ids.as<const int32_t>();
  Logit* scores = args.scores.as<Logit>();
  loop.for_each(args.logits.size(0), num_experts * kWorkPerLogit, [&](int64_t token) {
    const Logit* logits = row_of<const Logit>(args.logits, token);
    const RowRange slots = slots_of(args.token_offsets, 0, token);
    for (int64_t slot = slots.begin; slot < slots.end; ++slot)
      scores[slot] = names_expert(ids[slot], num_experts)
                         ? static_cast<Logit>(sigmoid(static_cast<double>(logits[ids[slot]])))
                         : Logit(0);
  });
}

void forward(const RouterForwardArgs& args, const StepLoop& loop) {
  visit_accumulator(args.logits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
    if (args.selection == Selection::chosen) select<Logit>(args, loop);
    std::fill_n(args.scores.as<Logit>(), args.scores.numel(), Logit(0));
    score<Logit>(args, loop);
  });
}

void backward(const RouterBackwardArgs& args, const StepLoop& loop) {
  const int64_t num_experts = args.logits.size(1);
  const int32_t* ids = args.ids.as<const int32_t>();
  visit_accumulator(args.logits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
    const Logit* dscores = args.dscores.as<const Logit>();
    loop.for_each(args.logits.size(0), num_experts * kWorkPerLogit, [&](int64_t token) {
      const Logit* logits = row_of<const Logit>(args.logits, token);
      Logit* dlogits = row_of<Logit>(args.dlogits, token);
      std::fill_n(dlogits, num_experts, Logit(0));
      const RowRange slots = slots_of(args.token_offsets, 0, token);
      for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
        if (!names_expert(ids[slot], num_experts)) continue;
        const double s = sigmoid(static_cast<double>(logits[ids[slot]]));
        dlogits[ids[slot]] = static_cast<Logit>(s * (1.0 - s) * static_cast<double>(dscores[slot]));
      }
    });
  });
}

}  // namespace

constinit const Router kThreshold = {nullptr, forward, backward};

}  // namespace penstock::cpu
