// SPDX-License-Identifier: Apache-2.0
//
// Adapters as the strided matrices that backends read. Their thin rows:
//
//   U1_r = X_t A1_e^T      U2_r = A_r A2_e^T       forward; (R_cap, r1), (R_cap, r2)
//   V2_r = dO_t B2_e       V1_r = dH_r B1_e        backward
#pragma once

#include "backend/ops.h"

namespace penstock {

// An adapter's factor as (rows, columns) of one matrix, and the same read as its transpose.
GroupedMatrix factor_of(const TensorView& view);
GroupedMatrix transposed(const GroupedMatrix& matrix);
// One matrix in the place of W1.
UpWeights single(const GroupedMatrix& matrix);
// The halves of up_b (or its gradient), split as W1's rows are.
UpWeights halves_of(const TensorView& up_b, const ExpertsConfig& config);

}  // namespace penstock
