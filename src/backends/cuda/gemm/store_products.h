// SPDX-License-Identifier: Apache-2.0
//
// A row product with the store epilogue, for the launchers that share its kernels.
#pragma once

#include "backend/ops.h"

namespace penstock::cuda {

struct RowProblem;

struct StoreOutput {
  TensorView out;
  GroupedVector bias;
  const float* scale;      // null: 1
  TensorView addend = {};  // as out; absent: none
};

template <typename Element>
void store_rows(const RowProblem& problem, const StoreOutput& output, const Context& context);
// The same, rows gathered or not, on tiles of kThinTileN columns: for outputs no wider, such as the
// factors of adapters, of which a wide tile would multiply mostly zeros, and for few rows.
template <typename Element>
void thin_rows(const RowProblem& problem, const StoreOutput& output, const Context& context);

}  // namespace penstock::cuda
