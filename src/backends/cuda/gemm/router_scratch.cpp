// SPDX-License-Identifier: Apache-2.0
//
// The layout declared in router_scratch.h; pieces are 256-byte aligned relative to the workspace.
#include "backends/cuda/gemm/router_scratch.h"

#include "backends/cuda/gemm/config.h"
#include "backends/cuda/gemm/gemm_ops.h"

namespace penstock::cuda {

RouterScratch router_scratch(const RouterProblem& problem) {
  RouterScratch scratch = {};
  scratch.padded_experts = (problem.num_experts + 7) / 8 * 8;
  scratch.slices = router_gradient_slices(problem);
  int64_t next = 0;
  const auto take = [&next](int64_t bytes) {
    const int64_t at = next;
    next += (bytes + 255) / 256 * 256;
    return at;
  };
  scratch.scale = take(8);
  scratch.counts = take(4 * scratch.slices);
  scratch.offsets = take(4 * scratch.slices);
  scratch.terms = take(4 * problem.num_tokens * scratch.padded_experts);
  scratch.partials = take(8 * scratch.slices * scratch.padded_experts * problem.hidden_size);
  scratch.bytes = next;
  return scratch;
}

int64_t router_products_scratch_bytes(const RouterProblem& problem) {
  return router_scratch(problem).bytes;
}

}  // namespace penstock::cuda
