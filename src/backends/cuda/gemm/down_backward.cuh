// SPDX-License-Identifier: Apache-2.0
//
// G_r = dO_{token(r)} W2_e and, in its epilogue, dH, A' and the partial sums of dS.
#pragma once

#include "backends/cuda/gemm/adapted_products.h"
#include "backends/cuda/gemm/epilogue_down_backward.cuh"
#include "backends/cuda/gemm/launch.cuh"

namespace penstock::cuda {

template <typename Element, Gating kGating, template <typename, int> class Producer>
struct DownBackwardLauncher {
  const RowProblem& problem;
  const DownBackwardArgs& args;
  const Context& context;

  template <int kTileM, Major kMajor>
  void run() const {
    using TileType =
        Tile<Element, kTileM, kDownBackwardTileN, Major::k, kMajor, kRowCluster<kTileM>>;
    using G = RowGemm<TileType, 1, Producer, DownBackwardEpilogue<TileType, kGating>>;
    constexpr int kHalves = kGating == Gating::gated ? 2 : 1;
    const RowGroups& rows = args.rows;
    launch_rows<G, kDownBackwardTileN>(
        problem,
        {halves_map<Element>("h", args.h, kHalves, kTileM),
         row_target<Element>("dh", args.dh, kHalves),
         row_target<Element>("a_scaled", args.a_scaled, 1), rows_of(args.partials),
         args.scores.present() ? args.scores.template as<float>() : nullptr,
         rows.row_to_slot.present() ? rows.row_to_slot.template as<int32_t>() : nullptr,
         activation_of(args.activation), static_cast<int32_t>(args.a_scaled.size(1))},
        context);
  }
};

template <typename Element>
void down_backward(const DownBackwardArgs& args, const Context& context) {
  const GroupedMatrix& w = args.weights.w;
  const int64_t n = args.a_scaled.size(1);
  const int64_t d = args.d_output.size(1);
  const RowProblem problem = {
      "down_backward",
      {"d_output", args.d_output.data, args.d_output.size(0), args.d_output.stride(0), 1, 0, d,
       args.rows.row_to_token.template as<int32_t>()},
      {"w2",
       w.dtype,
       {w.data, nullptr},
       1,
       args.rows.num_experts(),
       w.expert_stride,
       n,
       w.col_stride,
       d,
       w.row_stride},
      groups_of(args.rows),
      args.rows.row_capacity,
      args.low_rank};
  if (args.low_rank.present()) return adapted_down_backward<Element>(problem, args, context);
  if (is_gated(args.activation.kind)) {
    with_row_tile(problem, DownBackwardLauncher<Element, Gating::gated, GatheredRows>{problem, args,
                                                                                      context});
  } else {
    with_row_tile(problem, DownBackwardLauncher<Element, Gating::plain, GatheredRows>{problem, args,
                                                                                      context});
  }
}

}  // namespace penstock::cuda
