// SPDX-License-Identifier: Apache-2.0
//
// Row products with few output columns: limited by how fast the rows arrive, so the tile is narrow
// and the ring deep. The weights are too few to be worth sharing in pairs of blocks.
#pragma once

#include "backends/cuda/gemm/epilogue_store.cuh"
#include "backends/cuda/gemm/launch.cuh"
#include "backends/cuda/gemm/store_products.h"

namespace penstock::cuda {

template <typename Element, template <typename, int> class Producer>
struct ThinLauncher {
  const RowProblem& problem;
  const StoreOutput& output;
  const Context& context;

  template <int kTileM, Major kMajor>
  void run() const {
    using TileType = Tile<Element, kTileM, kThinTileN, Major::k, kMajor, 1>;
    using G = RowGemm<TileType, 1, Producer, StoreEpilogue<TileType>>;
    launch_rows<G, kThinTileN>(problem,
                               {row_target<Element>("output rows", output.out, 1),
                                {bias_of(output.bias), output.scale, rows_of(output.addend)},
                                static_cast<int32_t>(problem.b.n_extent)},
                               context);
  }
};

template <typename Element>
void thin_rows(const RowProblem& problem, const StoreOutput& output, const Context& context) {
  if (problem.a.row_to_token != nullptr) {
    with_row_tile(problem, ThinLauncher<Element, GatheredRows>{problem, output, context});
  } else {
    with_row_tile(problem, ThinLauncher<Element, ContiguousRows>{problem, output, context});
  }
}

}  // namespace penstock::cuda
