// SPDX-License-Identifier: Apache-2.0
//
// Row products with few output columns: limited by how fast the rows arrive, so the tile is narrow
// and the ring deep, and gathered rows are visited in the order of tokens.
#pragma once

#include "backends/cuda/gemm/schedule_thin.cuh"
#include "backends/cuda/gemm/store_launcher.cuh"

namespace penstock::cuda {

template <typename Element>
struct GatheredThinLauncher {
  const RowProblem& problem;
  const StoreOutput& output;
  const Context& context;

  template <int kTileM, Major kMajor>
  void run() const {
    using TileType = Tile<Element, kTileM, kThinTileN, Major::k, kMajor, 1>;
    launch_store<
        Gemm<TileType, BandSchedule<kTileM>, GatheredRows<TileType, 1>, StoreEpilogue<TileType>>>(
        problem, output, context);
  }
};

template <typename Element>
void thin_rows(const RowProblem& problem, const StoreOutput& output, const Context& context) {
  if (problem.a.row_to_token != nullptr) {
    with_row_tile(problem, GatheredThinLauncher<Element>{problem, output, context});
  } else {
    with_row_tile(problem,
                  StoreLauncher<Element, ContiguousRows, kThinTileN>{problem, output, context});
  }
}

}  // namespace penstock::cuda
