// SPDX-License-Identifier: Apache-2.0
//
// Row products with few output columns: limited by how fast the rows arrive, so the tile is narrow
// and the ring deep.
#pragma once

#include "backends/cuda/gemm/store_launcher.cuh"

namespace penstock::cuda {

template <typename Element>
void thin_rows(const RowProblem& problem, const StoreOutput& output, const Context& context) {
  if (problem.a.row_to_token != nullptr) {
    with_row_tile(problem,
                  StoreLauncher<Element, GatheredRows, kThinTileN>{problem, output, context});
  } else {
    with_row_tile(problem,
                  StoreLauncher<Element, ContiguousRows, kThinTileN>{problem, output, context});
  }
}

}  // namespace penstock::cuda
