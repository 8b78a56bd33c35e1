// SPDX-License-Identifier: Apache-2.0
//
// How much scratch a layer's products need: every thread's packed panels and sums, for the largest
// of them. Row counts are bounded by the row capacity.
#include <algorithm>

#include "backends/cpu/fast/operations.h"

namespace penstock::cpu::fast {
namespace {

int64_t largest(const Runtime& runtime, std::initializer_list<ProductExtents> products) {
  int64_t bytes = 0;
  for (const ProductExtents& extents : products)
    bytes = std::max(bytes, scratch_bytes_per_thread(*runtime.kernels, extents));
  return bytes * runtime.threads;
}

}  // namespace

int64_t scratch_bytes(const ExpertsProblem& problem, const Runtime& runtime) {
  const int64_t d = problem.hidden_size;
  const int64_t n = problem.intermediate_size;
  const int64_t h = problem.preactivation_size();
  const int64_t rows = problem.row_capacity;
  const int32_t halves = static_cast<int32_t>(problem.config.halves());
  const bool bf16 = problem.dtype == DType::bfloat16;
  return largest(runtime, {{rows, n, d, halves, bf16},  // up projection
                           {rows, d, n, 1, bf16},       // down projection
                           {rows, n, d, 1, bf16},       // down backward
                           {rows, d, n, 1, bf16},       // up backward, by halves
                           {h, d, rows, 1, bf16},       // dW1
                           {d, h, rows, 1, bf16},       // dW1 of input-major weights
                           {d, n, rows, 1, bf16},       // dW2
                           {n, d, rows, 1, bf16}});
}

int64_t router_scratch_bytes(const RouterProblem& problem, const Runtime& runtime) {
  const int64_t t = problem.num_tokens;
  const int64_t d = problem.hidden_size;
  const int64_t e = problem.num_experts;
  return largest(runtime, {{t, e, d, 1, problem.dtype == DType::bfloat16},  // logits
                           {t, d, e, 1, false},                             // dX
                           {e, d, t, 1, false}});                           // dWr
}

int64_t score_partials(const ExpertsProblem& problem) {
  return std::max<int64_t>(1, (problem.intermediate_size + kColumnUnit - 1) / kColumnUnit);
}

}  // namespace penstock::cpu::fast
