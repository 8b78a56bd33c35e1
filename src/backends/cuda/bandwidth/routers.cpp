// SPDX-License-Identifier: Apache-2.0
//
// Which router runs which kernels on the GPU, and which it has none for.
#include <string>

#include "backends/cuda/bandwidth/bandwidth_ops.h"
#include "backends/cuda/bandwidth/pair_routers.h"
#include "backends/cuda/bandwidth/sigmoid_topk.h"

namespace penstock::cuda {
namespace {

bool is_softmax(RouterKind kind) {
  return kind == RouterKind::softmax_topk || kind == RouterKind::topk_softmax ||
         kind == RouterKind::topk_softmax_normalized;
}

std::string too_many(std::string_view what, int64_t value, int64_t most) {
  return std::string(what) + " " + std::to_string(value) + " is above " + std::to_string(most);
}

}  // namespace

std::string why_not_router(const RouteProblem& problem) {
  if (is_softmax(problem.kind)) {
    if (problem.num_experts > kMaxExperts)
      return too_many("num_experts", problem.num_experts, kMaxExperts);
    return problem.top_k > kMaxTopK ? too_many("top_k", problem.top_k, kMaxTopK) : std::string();
  }
  const bool sigmoid = problem.kind == RouterKind::sigmoid_topk;
  const int64_t most = sigmoid ? kMaxSigmoidExperts : kMaxPairExperts;
  if (problem.num_experts > most) return too_many("num_experts", problem.num_experts, most);
  if (sigmoid && problem.options.num_groups > kMaxSigmoidGroups)
    return too_many("num_groups", problem.options.num_groups, kMaxSigmoidGroups);
  return {};
}

int64_t route_scratch_bytes(const RouteProblem& problem, const Context& context) {
  return has_fixed_top_k(problem.kind) ? 0 : pair_scratch_bytes(problem, context);
}

void route_forward(const RouterForwardArgs& args, const Context& context) {
  if (is_softmax(args.kind)) return softmax_topk_forward(args, context);
  if (args.kind == RouterKind::sigmoid_topk) return sigmoid_topk_forward(args, context);
  pair_router_forward(args, context);
}

void route_backward(const RouterBackwardArgs& args, const Context& context) {
  if (is_softmax(args.kind)) return softmax_topk_backward(args, context);
  if (args.kind == RouterKind::sigmoid_topk) return sigmoid_topk_backward(args, context);
  pair_router_backward(args, context);
}

}  // namespace penstock::cuda
