// SPDX-License-Identifier: Apache-2.0
//
// See workspace_plan.h. Placement: largest buffer first, each at the lowest aligned offset where
// it meets no buffer that is alive at the same time.
#include "experts/workspace_plan.h"

#include <algorithm>

#include "tensor/checks.h"

namespace penstock {
namespace {

// Launches in order; a buffer is alive from `first` to `last`, both included.
enum ForwardLaunch : int { kUpFactor, kUpProjection, kDownFactor, kDownProjection, kCombine };
enum BackwardLaunch : int {
  kRecompute,
  kDownFactorGradient,
  kDownBackward,
  kScoreGradient,
  kDownWeightGradient,
  kUpFactorGradient,
  kUpAdapterGradients,
  kUpBackward,
  kCombineGradient,
  kUpWeightGradient,
};

int64_t aligned(int64_t offset) {
  return (offset + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

bool alive_together(const Lifetime& a, const Lifetime& b) {
  return a.first <= b.last && b.first <= a.last;
}

int64_t rows_bytes(const ExpertsProblem& problem, int64_t width, DType dtype) {
  return checked_product({problem.row_capacity, width, size_of(dtype)}, "workspace");
}

bool dispatched(const ExpertsProblem& problem) { return problem.rows == RowSource::dispatched; }

// Of every operation, on all columns or on some; fewer columns may be cut differently. An adapter's
// products are at most as large as those of a layer whose sizes cover its rank.
int64_t scratch_of(const ExpertsProblem& problem, const Backend& backend, const Context& context) {
  ExpertsProblem covering = problem;
  for (const int64_t rank : problem.adapter_ranks) {
    covering.hidden_size = std::max(covering.hidden_size, rank);
    covering.intermediate_size = std::max(covering.intermediate_size, rank);
  }
  int64_t bytes = backend.scratch_bytes(covering, context);
  const int64_t columns = columns_at_a_time(covering);
  for (const int64_t block : {columns, covering.hidden_size % columns}) {
    if (block == 0) continue;
    ExpertsProblem part = covering;
    part.hidden_size = block;
    bytes = std::max(bytes, backend.scratch_bytes(part, context));
  }
  return bytes;
}

}  // namespace

int64_t columns_at_a_time(const ExpertsProblem& problem) {
  constexpr int64_t kBlocks = 4;
  constexpr int64_t kWhole = 256;  // columns of a tile: a narrower block would be padded to it
  const int64_t d = problem.hidden_size;
  if (problem.config.order == LaunchOrder::fast || dispatched(problem)) return d;
  const int64_t quarter = (d + kBlocks - 1) / kBlocks;
  return std::min(d, (quarter + kWhole - 1) / kWhole * kWhole);
}

int64_t place(std::vector<Lifetime> lifetimes) {
  std::stable_sort(lifetimes.begin(), lifetimes.end(), [](const Lifetime& a, const Lifetime& b) {
    return a.buffer->bytes > b.buffer->bytes;
  });
  int64_t total = 0;
  for (size_t i = 0; i < lifetimes.size(); ++i) {
    Buffer& buffer = *lifetimes[i].buffer;
    if (buffer.bytes == 0) continue;
    std::vector<Buffer> taken;
    for (size_t j = 0; j < i; ++j)
      if (alive_together(lifetimes[i], lifetimes[j])) taken.push_back(*lifetimes[j].buffer);
    std::sort(taken.begin(), taken.end(),
              [](const Buffer& a, const Buffer& b) { return a.offset < b.offset; });
    buffer.offset = 0;
    for (const Buffer& other : taken)
      if (buffer.offset + buffer.bytes > other.offset)
        buffer.offset = std::max(buffer.offset, aligned(other.offset + other.bytes));
    total = std::max(total, buffer.offset + buffer.bytes);
  }
  return total;
}

ForwardWorkspace plan_forward(const ExpertsProblem& problem, const Backend& backend,
                              const Context& context) {
  ForwardWorkspace plan;
  plan.a.bytes = rows_bytes(problem, problem.intermediate_size, problem.dtype);
  if (!dispatched(problem))
    plan.y.bytes = rows_bytes(problem, columns_at_a_time(problem), problem.dtype);
  const auto [up_rank, down_rank] = problem.adapter_ranks;
  if (problem.config.save == SavePolicy::nothing) {
    plan.u1.bytes = rows_bytes(problem, up_rank, problem.dtype);
    plan.u2.bytes = rows_bytes(problem, down_rank, problem.dtype);
  }
  plan.scratch.bytes = scratch_of(problem, backend, context);
  plan.bytes = place({{&plan.a, kUpProjection, kDownProjection},
                      {&plan.y, kDownProjection, kCombine},
                      {&plan.u1, kUpFactor, kUpProjection},
                      {&plan.u2, kDownFactor, kDownProjection},
                      {&plan.scratch, kUpFactor, kCombine}});
  return plan;
}

BackwardWorkspace plan_backward(const ExpertsProblem& problem, BackwardPass pass,
                                const Backend& backend, const Context& context) {
  BackwardWorkspace plan;
  plan.scratch.bytes = scratch_of(problem, backend, context);
  if (pass == BackwardPass::whole) {
    if (!overwrites_h(problem.config))
      plan.dh.bytes = rows_bytes(problem, problem.preactivation_size(), problem.dtype);
    plan.a_scaled.bytes = rows_bytes(problem, problem.intermediate_size, problem.dtype);
  }
  if (pass != BackwardPass::weights) {
    plan.partials.bytes =
        rows_bytes(problem, backend.score_partials(problem), accumulator_of(problem.dtype));
    if (!dispatched(problem))
      plan.dx_rows.bytes = rows_bytes(problem, columns_at_a_time(problem), problem.dtype);
  }
  const auto [up_rank, down_rank] = problem.adapter_ranks;
  plan.v1.bytes = rows_bytes(problem, up_rank, problem.dtype);
  plan.u2.bytes = plan.v2.bytes = rows_bytes(problem, down_rank, problem.dtype);
  plan.bytes = place({{&plan.dh, kRecompute, kUpWeightGradient},
                      {&plan.a_scaled, kDownBackward, kDownWeightGradient},
                      {&plan.partials, kDownBackward, kScoreGradient},
                      {&plan.dx_rows, kUpBackward, kCombineGradient},
                      {&plan.u2, kDownWeightGradient, kDownWeightGradient},
                      {&plan.v1, kUpFactorGradient, kUpBackward},
                      {&plan.v2, kDownFactorGradient, kDownWeightGradient},
                      {&plan.scratch, kRecompute, kUpWeightGradient}});
  return plan;
}

}  // namespace penstock
