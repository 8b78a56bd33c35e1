// SPDX-License-Identifier: Apache-2.0
//
// The two products that only store: Y_r = A_r W2_e^T + b2_e and dX~_r = dH_r W1_e, the latter over
// both halves of the reduced axis. They share their kernels, which the router's dX uses as well.
#pragma once

#include "backends/cuda/gemm/adapted_products.h"
#include "backends/cuda/gemm/store_launcher.cuh"

namespace penstock::cuda {

template <typename Element>
void store_rows(const RowProblem& problem, const StoreOutput& output, const Context& context) {
  if (output.addend.present())
    require_vectors("addend", output.addend.data, {output.addend.stride(0)});
  if (problem.low_rank.present()) return adapted_store_rows<Element>(problem, output, context);
  if (problem.b.n_extent <= kThinTileN ||
      narrow_tiles_pay(problem.row_capacity, problem.groups.num_experts, problem.b.n_extent,
                       {kWideTileN, kThinTileN}))
    return thin_rows<Element>(problem, output, context);
  with_row_tile(problem, StoreLauncher<Element, ContiguousRows>{problem, output, context});
}

template <typename Element>
void down_projection(const DownProjectionArgs& args, const Context& context) {
  const GroupedMatrix& w = args.weights.w;
  const int64_t n = args.a.size(1);
  const int64_t d = args.y.size(1);
  store_rows<Element>({"down_projection",
                       {"a", args.a.data, args.rows.row_capacity, args.a.stride(0), 1, 0, n},
                       {"w2",
                        w.dtype,
                        {w.data, nullptr},
                        1,
                        args.rows.num_experts(),
                        w.expert_stride,
                        d,
                        w.row_stride,
                        n,
                        w.col_stride},
                       groups_of(args.rows),
                       args.rows.row_capacity,
                       args.low_rank},
                      {args.y, args.weights.b, nullptr}, context);
}

template <typename Element>
void up_backward(const UpBackwardArgs& args, const Context& context) {
  const UpWeights& w = args.weights;
  const int64_t n = args.dh.size(1) / w.halves;
  const int64_t d = args.dx_rows.size(1);
  store_rows<Element>(
      {"up_backward",
       {"dh", args.dh.data, args.rows.row_capacity, args.dh.stride(0), w.halves, n, n},
       {"w1",
        w.w[0].dtype,
        {w.w[0].data, w.w[1].data},
        w.halves,
        args.rows.num_experts(),
        w.w[0].expert_stride,
        d,
        w.w[0].col_stride,
        n,
        w.w[0].row_stride},
       groups_of(args.rows),
       args.rows.row_capacity,
       args.low_rank},
      {args.dx_rows, {}, nullptr}, context);
}

}  // namespace penstock::cuda
