// SPDX-License-Identifier: Apache-2.0
//
// Launches a row product that only stores, on tiles kTileN columns wide.
#pragma once

#include "backends/cuda/gemm/epilogue_store.cuh"
#include "backends/cuda/gemm/launch.cuh"
#include "backends/cuda/gemm/store_products.h"

namespace penstock::cuda {

template <typename G>
void launch_store(const RowProblem& problem, const StoreOutput& output, const Context& context) {
  using TileType = typename G::Tile;
  launch_rows<G, TileType::kN>(
      problem,
      {row_target<typename TileType::Element>("output rows", output.out, 1),
       {bias_of(output.bias), output.scale, rows_of(output.addend)},
       static_cast<int32_t>(problem.b.n_extent)},
      context);
}

template <typename Element, template <typename, int> class Producer, int kTileN = kWideTileN>
struct StoreLauncher {
  const RowProblem& problem;
  const StoreOutput& output;
  const Context& context;

  template <int kTileM, Major kMajor>
  void run() const {
    // The weights of a narrow tile are too few to be worth sharing in pairs of blocks.
    constexpr int kCluster = kTileN == kWideTileN ? kRowCluster<kTileM> : 1;
    using TileType = Tile<Element, kTileM, kTileN, Major::k, kMajor, kCluster>;
    launch_store<RowGemm<TileType, 1, Producer, StoreEpilogue<TileType>>>(problem, output, context);
  }
};

}  // namespace penstock::cuda
