// SPDX-License-Identifier: Apache-2.0
//
// The router: its products through the same driver as the experts' (one group of all tokens, so
// batch-invariant), and the routers that the CPU backends share, on threads.
#include <algorithm>

#include "backends/cpu/common/routers/router.h"
#include "backends/cpu/fast/operands.h"
#include "backends/cpu/fast/operations.h"
#include "backends/cpu/fast/thread_team.h"

namespace penstock::cpu::fast {
namespace {

class StoreMatrix final : public Epilogue {
 public:
  StoreMatrix(const RowKernels& kernels, const TensorView& output, const TensorView& addend)
      : kernels_(kernels), output_(output), addend_(addend) {}

  void apply(const Chunk& chunk) const override {
    for (int64_t i = 0; i < chunk.rows; ++i) {
      if (addend_.present())
        kernels_.add_scaled(addend_.type(), 1.0f, addend_.at(chunk.row_begin + i, chunk.col_begin),
                            chunk.row(i), chunk.cols);
      void* to = output_.at(chunk.row_begin + i, chunk.col_begin);
      kernels_.narrow(output_.type(), chunk.row(i), to, chunk.cols);
    }
  }

 private:
  const RowKernels& kernels_;
  StorageRows output_;
  StorageRows addend_;
};

struct MatrixProduct {
  Operand left;
  Operand right;
  int64_t k;
  TensorView addend = {};  // absent: none
};

void multiply_into(const TensorView& output, const MatrixProduct& operands, Workspace scratch,
                   const Runtime& runtime) {
  GroupedProduct product{.rows = ExpertRows::single(output.size(0))};
  product.n = output.size(1);
  product.segments[0].k = operands.k;
  product.segments[0].left = operands.left;
  product.segments[0].right[0] = operands.right;
  multiply_groups(product, StoreMatrix(runtime.kernels->rows, output, operands.addend), scratch,
                  runtime);
}

// The routers' steps on our threads, some together so that a task is worth its hand-over.
class ThreadedLoop final : public StepLoop {
 public:
  explicit ThreadedLoop(int32_t threads) : threads_(threads) {}

  void for_each(int64_t count, int64_t work, IndexFunction step) const override {
    const int64_t per_task = std::max<int64_t>(1, kWorkPerTask / std::max<int64_t>(1, work));
    const int64_t tasks = (count + per_task - 1) / per_task;
    parallel_for(threads_worth(threads_, count * work), tasks, [&](int64_t task, int32_t) {
      const int64_t end = std::min((task + 1) * per_task, count);
      for (int64_t index = task * per_task; index < end; ++index) step(index);
    });
  }

 private:
  static constexpr int64_t kWorkPerTask = 1 << 14;
  int32_t threads_;
};

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
    multiply_into(args.dx, {left, right, args.dlogits.size(1), args.addend}, args.workspace,
                  runtime);
  }
  if (args.drouter_weight.present()) {
    const Operand left = columns_operand(args.dlogits, nullptr);
    const Operand right = columns_operand(args.x, nullptr);
    multiply_into(args.drouter_weight, {left, right, args.x.size(0)}, args.workspace, runtime);
  }
}

void router_forward(const RouterForwardArgs& args, const Runtime& runtime) {
  route_forward(args, ThreadedLoop(runtime.threads));
}

void router_backward(const RouterBackwardArgs& args, const Runtime& runtime) {
  router_of(args.kind).backward(args, ThreadedLoop(runtime.threads));
}

}  // namespace penstock::cpu::fast
