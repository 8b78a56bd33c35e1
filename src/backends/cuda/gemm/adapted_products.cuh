// SPDX-License-Identifier: Apache-2.0
//
// The products declared in adapted_products.h: the plain launchers with a producer that appends the
// term. One instruction multiplies the weights and the term's matrix, so both must lie the same
// way: k contiguous in the forward pass, the output's columns in the backward pass.
// why_not_adapters (config.h) keeps the weights to that order.
#pragma once

#include "backends/cuda/gemm/adapted_products.h"
#include "backends/cuda/gemm/down_backward.cuh"
#include "backends/cuda/gemm/load_low_rank.cuh"
#include "backends/cuda/gemm/store_products.cuh"
#include "backends/cuda/gemm/up_projection.cuh"

namespace penstock::cuda {

inline WeightOperand term_matrix(const RowProblem& problem) {
  const LowRankTerm& term = problem.low_rank;
  const WeightOperand matrix = {"factor of an adapter",
                                term.matrix[0].dtype,
                                {term.matrix[0].data, term.matrix[1].data},
                                term.matrix[1].present() ? 2 : 1,
                                problem.b.num_experts,
                                term.matrix[0].expert_stride,
                                problem.b.n_extent,
                                term.matrix[0].row_stride,
                                term.rows.size(1),
                                term.matrix[0].col_stride};
  if (matrix.major() != problem.b.major())
    throw Error(ErrorCode::unsupported,
                {problem.name, "a factor of an adapter whose other axis is contiguous",
                 "the last axis contiguous in weights and in factors",
                 "Pass contiguous factors, or run on the CPU."});
  return matrix;
}

template <typename TileType>
int32_t set_operands(const RowProblem& problem, int32_t columns, AdaptedRowOperands& operands) {
  const TensorView& rows = problem.low_rank.rows;
  operands.term = row_operands<TileType>(
      {"low-rank rows", rows.data, problem.row_capacity, rows.stride(0), 1, 0, rows.size(1)},
      term_matrix(problem), columns);
  return set_operands<TileType>(problem, columns, operands.base) + operands.term.k_tiles;
}

template <typename Element>
void adapted_up_projection(const RowProblem& problem, const UpEpilogueParams& epilogue,
                           const Context& context) {
  if (problem.b.halves == 2) {
    with_token_tile<Major::k>(problem,
                              UpProjectionLauncher<Element, Gating::gated, AdaptedGatheredRows>{
                                  problem, epilogue, context});
  } else {
    with_token_tile<Major::k>(problem,
                              UpProjectionLauncher<Element, Gating::plain, AdaptedGatheredRows>{
                                  problem, epilogue, context});
  }
}

template <typename Element>
void adapted_store_rows(const RowProblem& problem, const StoreOutput& output,
                        const Context& context) {
  with_row_tile(problem, StoreLauncher<Element, AdaptedContiguousRows>{problem, output, context});
}

template <typename Element>
void adapted_down_backward(const RowProblem& problem, const DownBackwardArgs& args,
                           const Context& context) {
  if (is_gated(args.activation.kind)) {
    with_token_tile<Major::mn>(
        problem,
        DownBackwardLauncher<Element, Gating::gated, AdaptedGatheredRows>{problem, args, context});
  } else {
    with_token_tile<Major::mn>(
        problem,
        DownBackwardLauncher<Element, Gating::plain, AdaptedGatheredRows>{problem, args, context});
  }
}

}  // namespace penstock::cuda
