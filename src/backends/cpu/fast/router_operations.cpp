// SPDX-License-Identifier: Apache-2.0
//
// The router: its products through the same driver as the experts' (one group of all tokens, so
// batch-invariant), and choice, scores and gradient token by token with the shared scalar code.
#include <algorithm>

#include "backends/cpu/common/router_math.h"
#include "backends/cpu/fast/operands.h"
#include "backends/cpu/fast/operations.h"
#include "backends/cpu/fast/thread_team.h"
#include "tensor/dispatch.h"

namespace penstock::cpu::fast {
namespace {

class StoreMatrix final : public Epilogue {
 public:
  StoreMatrix(const RowKernels& kernels, const TensorView& output)
      : kernels_(kernels), output_(output) {}

  void apply(const Chunk& chunk) const override {
    for (int64_t i = 0; i < chunk.rows; ++i) {
      void* to = output_.at(chunk.row_begin + i, chunk.col_begin);
      kernels_.narrow(output_.type(), chunk.row(i), to, chunk.cols);
    }
  }

 private:
  const RowKernels& kernels_;
  StorageRows output_;
};

struct MatrixProduct {
  Operand left;
  Operand right;
  int64_t k;
};

void multiply_into(const TensorView& output, const MatrixProduct& operands, Workspace scratch,
                   const Runtime& runtime) {
  GroupedProduct product{.rows = ExpertRows::single(output.size(0))};
  product.n = output.size(1);
  product.segments[0].k = operands.k;
  product.segments[0].left = operands.left;
  product.segments[0].right[0] = operands.right;
  multiply_groups(product, StoreMatrix(runtime.kernels->rows, output), scratch, runtime);
}

template <typename Function>
void for_each_token(int64_t num_tokens, int64_t work_per_token, const Runtime& runtime,
                    const Function& function) {
  constexpr int64_t kTokensPerTask = 16;
  const int64_t tasks = (num_tokens + kTokensPerTask - 1) / kTokensPerTask;
  parallel_for(threads_worth(runtime.threads, num_tokens * work_per_token), tasks,
               [&](int64_t task, int32_t) {
                 const int64_t begin = task * kTokensPerTask;
                 const int64_t end = std::min(begin + kTokensPerTask, num_tokens);
                 for (int64_t token = begin; token < end; ++token) function(token);
               });
}

constexpr int64_t kWorkPerLogit = 16;  // an exponential, a few comparisons

}  // namespace

void router_logits(const RouterLogitsArgs& args, const Runtime& runtime) {
  const Operand left = rows_operand(args.x, nullptr);
  const Operand right = rows_operand(args.router_weight, nullptr);
  multiply_into(args.logits, {left, right, args.x.size(1)}, args.workspace, runtime);
}

void router_logits_backward(const RouterLogitsBackwardArgs& args, const Runtime& runtime) {
  if (args.dx.present()) {
    const Operand left = rows_operand(args.dlogits, nullptr);
    const Operand right = columns_operand(args.router_weight, nullptr);
    multiply_into(args.dx, {left, right, args.dlogits.size(1)}, args.workspace, runtime);
  }
  if (args.drouter_weight.present()) {
    const Operand left = columns_operand(args.dlogits, nullptr);
    const Operand right = columns_operand(args.x, nullptr);
    multiply_into(args.drouter_weight, {left, right, args.x.size(0)}, args.workspace, runtime);
  }
}

void router_forward(const RouterForwardArgs& args, const Runtime& runtime) {
  const int64_t num_experts = args.logits.size(1);
  const int64_t top_k = args.ids.size(1);
  const auto route = [&](int64_t token) {
    const float* logits = args.logits.as<const float>() + token * args.logits.stride(0);
    float* scores = args.scores.as<float>() + token * top_k;
    int32_t* ids = args.ids.as<int32_t>() + token * top_k;
    route_token<float>(args.kind, {logits, num_experts, scores, ids, top_k});
  };
  for_each_token(args.logits.size(0), num_experts * kWorkPerLogit, runtime, route);
}

void router_backward(const RouterBackwardArgs& args, const Runtime& runtime) {
  const int64_t num_experts = args.logits.size(1);
  const int64_t top_k = args.ids.size(1);
  const auto route = [&](int64_t token) {
    TokenGradients<float> gradients = {};
    gradients.logits = args.logits.as<const float>() + token * args.logits.stride(0);
    gradients.num_experts = num_experts;
    gradients.scores = args.scores.as<const float>() + token * args.scores.stride(0);
    gradients.ids = args.ids.as<const int32_t>() + token * args.ids.stride(0);
    gradients.dscores = args.dscores.as<const float>() + token * args.dscores.stride(0);
    gradients.top_k = top_k;
    gradients.dlogits = args.dlogits.as<float>() + token * args.dlogits.stride(0);
    route_token_backward<float>(args.kind, gradients);
  };
  for_each_token(args.logits.size(0), num_experts * kWorkPerLogit, runtime, route);
}

}  // namespace penstock::cpu::fast
