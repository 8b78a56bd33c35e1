// SPDX-License-Identifier: Apache-2.0
//
// Scratch of the router's backward products, laid out once for the size query and the launches.
//
// dlogits are fp32 and the tensor cores take 2-byte operands, so dlogits = hi + lo, two terms of
// the storage type (16 or 22 bits together): hi of all tokens, then lo of all tokens, each (T, E)
// with E padded to 8. dX reduces over [hi | lo]; dWr over the 2 T rows, cut into slices.
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
  int64_t rows;      // (2 T) int32: the token of a stacked row
  int64_t terms;     // (2, T, padded_experts) storage type
  int64_t partials;  // (slices, padded_experts, d) fp32
  int64_t bytes;
};

RouterScratch router_scratch(const RouterProblem& problem);

}  // namespace penstock::cuda
