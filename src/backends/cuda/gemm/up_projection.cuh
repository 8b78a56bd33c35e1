// SPDX-License-Identifier: Apache-2.0
//
// H_r = X_{token(r)} W1_e^T + b1_e, A_r = act(H_r): gathered rows, one B tile of gate and up rows.
#pragma once

#include "backends/cuda/gemm/adapted_products.h"
#include "backends/cuda/gemm/epilogue_up.cuh"
#include "backends/cuda/gemm/launch.cuh"
#include "backends/cuda/gemm/store_products.h"

namespace penstock::cuda {

template <typename Element, Gating kGating, template <typename, int> class Producer,
          int kWidestTileN = kWideTileN>
struct UpProjectionLauncher {
  const RowProblem& problem;
  const UpEpilogueParams& epilogue;
  const Context& context;

  template <int kTileM, Major kMajor>
  void run() const {
    constexpr int kHalves = kGating == Gating::gated ? 2 : 1;
    // Of one warpgroup's wide tile ptxas would have all of a plain activation under way, and spill.
    constexpr int kTileN =
        kTileM == 64 && kGating == Gating::plain ? kWidestTileN / 2 : kWidestTileN;
    using TileType = Tile<Element, kTileM, kTileN, Major::k, kMajor, kRowCluster<kTileM>>;
    using G = RowGemm<TileType, kHalves, Producer, UpEpilogue<TileType, kGating>>;
    launch_rows<G, kTileN / kHalves>(problem, epilogue, context);
  }
};

template <typename Element>
void gated_up_projection(const RowProblem& problem, const UpEpilogueParams& epilogue,
                         const Context& context) {
  // Only weights in the usual order have narrow tiles: one kernel more.
  if (problem.b.major() == Major::k &&
      narrow_tiles_pay(problem.row_capacity, problem.groups.num_experts, problem.b.n_extent,
                       {kWideTileN / 2, kNarrowUpTileN / 2})) {
    using Narrow = UpProjectionLauncher<Element, Gating::gated, GatheredRows, kNarrowUpTileN>;
    return Narrow{problem, epilogue, context}.template run<64, Major::k>();
  }
  with_row_tile(problem, UpProjectionLauncher<Element, Gating::gated, GatheredRows>{
                             problem, epilogue, context});
}

template <typename Element>
void up_projection(const UpProjectionArgs& args, const Context& context) {
  const UpWeights& w = args.weights;
  const TensorView& out = args.h.present() ? args.h : args.a;
  const int64_t n = args.h.present() ? out.size(1) / w.halves : out.size(1);
  const RowProblem problem = {"up_projection",
                              {"x", args.x.data, args.x.size(0), args.x.stride(0), 1, 0,
                               args.x.size(1), args.rows.row_to_token.template as<int32_t>()},
                              {"w1",
                               w.w[0].dtype,
                               {w.w[0].data, w.w[1].data},
                               w.halves,
                               args.rows.num_experts(),
                               w.w[0].expert_stride,
                               n,
                               w.w[0].row_stride,
                               args.x.size(1),
                               w.w[0].col_stride},
                              groups_of(args.rows),
                              args.rows.row_capacity,
                              args.low_rank};
  const UpEpilogueParams epilogue = {row_target<Element>("h", args.h, w.halves),
                                     row_target<Element>("a", args.a, 1),
                                     {bias_of(w.b[0]), bias_of(w.b[1])},
                                     activation_of(args.activation),
                                     static_cast<int32_t>(n)};
  if (args.low_rank.present()) return adapted_up_projection<Element>(problem, epilogue, context);
  if (!args.a.present() && w.halves == 1 && n <= kThinTileN)
    return thin_rows<Element>(problem, {args.h, w.b[0], nullptr}, context);
  if (w.halves == 2) return gated_up_projection<Element>(problem, epilogue, context);
  with_row_tile(problem, UpProjectionLauncher<Element, Gating::plain, GatheredRows>{
                             problem, epilogue, context});
}

}  // namespace penstock::cuda
