// SPDX-License-Identifier: Apache-2.0
//
// Experts with low-rank adapters (LoRA, arXiv 2106.09685) beside frozen weights.
//
//   H_r = X_t W1_e^T + (X_t A1_e^T) B1_e^T + b1_e    A_r = act(H_r)
//   Y_r = A_r W2_e^T + (A_r A2_e^T) B2_e^T + b2_e    O_t = sum_r S_r Y_r
//
// The adapters' terms are summed inside the products of the weights: no expert's weight is copied
// or changed, and the adapters' scale is part of B. Kept for backward: what experts.h keeps, and
// the adapters' thin rows, r1 + r2 numbers a row. All gradients but those of the frozen weights and
// biases are there. These passes run in the fast order and preserve H, whatever the config says.
#pragma once

#include "penstock/experts.h"

namespace penstock {

// Adapters, or their gradients. Each projection has both factors or neither; ranks may differ, and
// may be larger than the sizes. Layouts as for weights: stride 1 in one of the last two axes. The
// rows of up_b are in the order of W1's, so gate_layout holds for them too.
struct ExpertAdapters {
  TensorView up_a;    // (E, r1, d)
  TensorView up_b;    // (E, h, r1)
  TensorView down_a;  // (E, r2, n)
  TensorView down_b;  // (E, d, r2)
};

// The rows between an adapter's factors, which forward leaves for backward: present exactly where
// the projection has an adapter, unless save is `nothing`.
struct AdapterRows {
  TensorView up;    // (R_cap, r1)  X_t A1^T, dtype of x
  TensorView down;  // (R_cap, r2)  A_r A2^T
};

struct AdaptedProblem {
  ExpertsProblem experts;
  int64_t up_rank = 0;    // r1, 0: no adapter on this projection
  int64_t down_rank = 0;  // r2
};

struct AdaptedForwardArgs {
  ExpertsForwardArgs experts;
  ExpertAdapters adapters;
  AdapterRows rows;  // out
};

struct AdaptedBackwardArgs {
  ExpertsBackwardArgs experts;  // without weight gradients and without `delayed`
  ExpertAdapters adapters;
  AdapterRows rows;      // as forward left them
  ExpertAdapters grads;  // out, overwritten, dtype of x; absent: not wanted
};

PENSTOCK_API int64_t adapted_forward_workspace_bytes(const AdaptedProblem& problem,
                                                     const Context& context);
PENSTOCK_API int64_t adapted_backward_workspace_bytes(const AdaptedProblem& problem,
                                                      const Context& context);

PENSTOCK_API void adapted_experts_forward(const AdaptedForwardArgs& args, const Context& context);
PENSTOCK_API void adapted_experts_backward(const AdaptedBackwardArgs& args, const Context& context);

}  // namespace penstock
