// SPDX-License-Identifier: Apache-2.0
//
// Which file has which router.
#include "backends/cpu/common/routers/router.h"

#include "backends/cpu/common/plan.h"

namespace penstock::cpu {

const Router& router_of(RouterKind kind) {
  switch (kind) {
    case RouterKind::softmax_topk:
    case RouterKind::topk_softmax:
    case RouterKind::topk_softmax_normalized:
      break;
    case RouterKind::sigmoid_topk:
      return kSigmoidTopK;
    case RouterKind::token_rounding:
      return kTokenRounding;
    case RouterKind::expert_choice:
      return kExpertChoice;
    case RouterKind::threshold:
      return kThreshold;
  }
  return kSoftmaxTopK;
}

void route_forward(const RouterForwardArgs& args, const StepLoop& loop) {
  router_of(args.kind).forward(args, loop);
  if (args.plan.present()) build_plan({chosen_routing(args), args.plan, {}});
}

std::string why_not_router(const RouteProblem&) { return {}; }

int64_t route_scratch_bytes(const RouteProblem& problem, const Context&) {
  const Router& router = router_of(problem.kind);
  return router.scratch_bytes == nullptr ? 0 : router.scratch_bytes(problem);
}

}  // namespace penstock::cpu
