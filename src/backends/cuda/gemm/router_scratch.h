// SPDX-License-Identifier: Apache-2.0
//
// Scratch of the router's backward products, laid out once for the size query and the launches.
//
// dlogits are fp32 and the tensor cores take 2-byte operands, so dlogits = hi + lo, two terms of
// the storage type (16 or 22 bits together), a token's [hi | lo] in one row, E padded to 8. dX
// reduces over both; the product for dWr has both as its rows, so that a tile of 256 is full from
// 128 experts on, and reduces over the tokens, cut into slices.
#pragma once

#include <cstdint>

#include "penstock/routing.h"

namespace penstock::cuda {

struct RouterScratch {
  int64_t padded_experts;
  int32_t slices;
  // Byte offsets.
  int64_t scale;     // (2) fp32: factor of the split and its inverse; before that, the largest bits
  int64_t counts;    // (slices) int32
  int64_t offsets;   // (slices) int32
  int64_t terms;     // (T, 2, padded_experts) storage type
  int64_t partials;  // (slices, 2, padded_experts, d) fp32
  int64_t bytes;
};

RouterScratch router_scratch(const RouterProblem& problem);

}  // namespace penstock::cuda
