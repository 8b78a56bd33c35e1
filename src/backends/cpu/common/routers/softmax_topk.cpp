// SPDX-License-Identifier: Apache-2.0
//
// The three softmax routers: each token takes its K largest logits. router_math.h has the
// arithmetic of one token.
#include "backends/cpu/common/elements.h"
#include "backends/cpu/common/router_math.h"
#include "backends/cpu/common/routers/router.h"

namespace penstock::cpu {
namespace {

void forward(const RouterForwardArgs& args, const StepLoop& loop) {
  visit_accumulator(args.logits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
    loop.for_each(args.logits.size(0), args.logits.size(1) * kWorkPerLogit, [&](int64_t token) {
      const TokenScores<Logit> row = {.logits = row_of<const Logit>(args.logits, token),
                                      .num_experts = args.logits.size(1),
                                      .scores = row_of<Logit>(args.scores, token),
                                      .ids = row_of<int32_t>(args.ids, token),
                                      .top_k = args.ids.size(1)};
      if (args.selection == Selection::chosen) {
        route_token(args.kind, row);
      } else {
        score_given(args.kind, row);
      }
    });
  });
}

void backward(const RouterBackwardArgs& args, const StepLoop& loop) {
  visit_accumulator(args.logits.dtype, [&]<typename Logit>(StorageTag<Logit>) {
    loop.for_each(args.logits.size(0), args.logits.size(1) * kWorkPerLogit, [&](int64_t token) {
      route_token_backward<Logit>(args.kind, {.logits = row_of<const Logit>(args.logits, token),
                                              .num_experts = args.logits.size(1),
                                              .scores = row_of<const Logit>(args.scores, token),
                                              .ids = row_of<const int32_t>(args.ids, token),
                                              .dscores = row_of<const Logit>(args.dscores, token),
                                              .top_k = args.ids.size(1),
                                              .dlogits = row_of<Logit>(args.dlogits, token)});
    });
  });
}

}  // namespace

constinit const Router kSoftmaxTopK = {nullptr, forward, backward};

}  // namespace penstock::cpu
