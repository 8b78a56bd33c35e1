// SPDX-License-Identifier: Apache-2.0
//
// From op structs to kernel parameters: groups, weight maps, grids, and the launch itself with its
// error named. Included by the products' translation units only.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "backend/ops.h"
#include "backends/cuda/gemm/activation.cuh"
#include "backends/cuda/gemm/config.h"
#include "backends/cuda/gemm/epilogue.cuh"
#include "backends/cuda/gemm/kernel.cuh"
#include "backends/cuda/gemm/load_columns.cuh"
#include "backends/cuda/gemm/load_rows.cuh"
#include "backends/cuda/gemm/products.h"
#include "backends/cuda/gemm/tensor_map.h"
#include "backends/cuda/gemm/warp_store.cuh"
#include "backends/cuda/launch.h"
#include "penstock/error.h"

namespace penstock::cuda {

template <typename Element>
inline constexpr DType kDTypeOf = DType::bfloat16;
template <>
inline constexpr DType kDTypeOf<__half> = DType::float16;

// `tiles` is an upper bound; a CTA without a tile ends at once.
template <typename G>
void launch(const char* name, const typename G::Params& params, int64_t tiles,
            const Context& context) {
  if (tiles == 0) return;
  constexpr int64_t kCluster = G::Tile::kCluster;
  const auto kernel = grouped_gemm<G>;
  check(name,
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSharedBytes));
  const int64_t most = std::max(multiprocessors(context) / kCluster, int64_t{1});
  const int64_t clusters = std::min((tiles + kCluster - 1) / kCluster, most);
  const auto ctas = static_cast<unsigned>(clusters * kCluster);
  launch_dependent({name, dim3(ctas), G::Tile::kThreads, G::kSharedBytes, kCluster}, context,
                   kernel, params);
}

inline Groups groups_of(const RowGroups& rows) {
  return {rows.expert_counts.as<int32_t>(), rows.expert_offsets.as<int32_t>(),
          static_cast<int32_t>(rows.num_experts()), 0};
}

inline Rows rows_of(const TensorView& view) {
  return view.present() ? Rows{view.data, view.stride(0)} : Rows{nullptr, 0};
}

// A matrix of `halves` times n columns as TMA sees it, in boxes of 64 columns.
template <typename Element>
CUtensorMap halves_map(const char* what, const TensorView& view, int64_t halves, int32_t rows) {
  const int64_t n = view.size(1) / halves;
  require_vectors(what, view.data, {view.stride(0)});
  return make_tensor_map({what,
                          view.data,
                          kDTypeOf<Element>,
                          {n, halves, view.size(0)},
                          {n, view.stride(0)},
                          {64, 1, rows}});
}

// Where epilogues store rows of `halves` times n columns; absent: not wanted.
template <typename Element>
RowTarget row_target(const char* what, const TensorView& view, int64_t halves) {
  if (!view.present()) return {};
  return {halves_map<Element>(what, view, halves, kSlotRows), rows_of(view)};
}

inline Bias bias_of(const GroupedVector& bias) {
  return {bias.data, bias.expert_stride, bias.stride};
}

inline ActivationParams activation_of(const ActivationSpec& spec) {
  return {spec.kind, spec.clamp_alpha, spec.clamp_limit};
}

// Weights as the B operand: n is the output column, k the reduced axis.
struct WeightOperand {
  const char* what;
  DType dtype;
  std::array<const void*, 2> data;  // by half
  int32_t halves;
  int64_t num_experts;
  int64_t expert_stride;
  int64_t n_extent;
  int64_t n_stride;
  int64_t k_extent;
  int64_t k_stride;

  Major major() const {
    if (k_stride == 1) return Major::k;
    if (n_stride == 1) return Major::mn;
    throw Error(ErrorCode::unsupported,
                {what, "strides " + std::to_string(n_stride) + " and " + std::to_string(k_stride),
                 "one axis with stride 1",
                 "Pass weights whose rows or columns are contiguous, or run on the CPU."});
  }

  CUtensorMap map(int half, int32_t columns) const {
    const bool k_major = major() == Major::k;
    // A single expert's stride is never stepped over, but must still be a legal one.
    const int64_t outer = num_experts == 1 ? 8 : expert_stride;
    const void* base = data[static_cast<size_t>(half < halves ? half : 0)];
    if (k_major)
      return make_tensor_map({what,
                              base,
                              dtype,
                              {k_extent, n_extent, num_experts},
                              {n_stride, outer},
                              {kTileK, columns, 1}});
    return make_tensor_map(
        {what, base, dtype, {n_extent, k_extent, num_experts}, {k_stride, outer}, {64, kTileK, 1}});
  }

  // `columns` of one half are what one copy brings.
  WeightMaps maps(int32_t columns) const { return {{map(0, columns), map(1, columns)}}; }
};

// The A operand of a row product: (row, half, k).
struct RowOperand {
  const char* what;
  const void* data;
  int64_t rows;
  int64_t row_stride;
  int64_t halves;
  int64_t half_stride;
  int64_t k_extent;  // of one half
  const int32_t* row_to_token = nullptr;
};

template <typename TileType>
RowOperands row_operands(const RowOperand& a, const WeightOperand& b, int32_t columns) {
  require_vectors(a.what, a.data, {a.row_stride});
  RowOperands operands = {};
  operands.weights = b.maps(columns / TileType::kCluster);
  operands.rows = make_tensor_map({a.what,
                                   a.data,
                                   b.dtype,
                                   {a.k_extent, a.halves, a.rows},
                                   {a.halves == 1 ? 8 : a.half_stride, a.row_stride},
                                   {kTileK, 1, TileType::kM}});
  operands.data = a.data;
  operands.row_stride = a.row_stride;
  operands.row_to_token = a.row_to_token;
  operands.k_extent = static_cast<int32_t>(a.k_extent);
  operands.k_tiles = static_cast<int32_t>((a.k_extent + kTileK - 1) / kTileK);
  return operands;
}

// One product over token rows. `columns` is what a tile covers of one half of the output.
struct RowProblem {
  const char* name;
  RowOperand a;
  WeightOperand b;
  Groups groups;
  int64_t row_capacity;
  LowRankTerm low_rank = {};
};

// Fills in what the producer reads; returns the k tiles of one output tile.
template <typename TileType>
int32_t set_operands(const RowProblem& problem, int32_t columns, RowOperands& operands) {
  operands = row_operands<TileType>(problem.a, problem.b, columns);
  return static_cast<int32_t>(operands.k_tiles * problem.a.halves);
}

template <typename G, int kColumns>
void launch_rows(const RowProblem& problem, const typename G::Epilogue::Params& epilogue,
                 const Context& context) {
  if (problem.row_capacity == 0) return;
  typename G::Params params = {};
  const int32_t k_tiles = set_operands<typename G::Tile>(problem, kColumns, params.operands);
  const int64_t n_tiles = (problem.b.n_extent + kColumns - 1) / kColumns;
  params.schedule = {problem.groups, static_cast<int32_t>(n_tiles), kColumns, k_tiles};
  params.epilogue = epilogue;
  const int64_t m_tiles =
      row_tiles_bound(problem.row_capacity, problem.groups.num_experts, G::Tile::kM);
  launch<G>(problem.name, params, m_tiles * n_tiles, context);
}

// Calls launcher.template run<TileM, kMajor>() for the tile of the problem.
template <Major kMajor, typename Launcher>
void with_token_tile(const RowProblem& problem, const Launcher& launcher) {
  if (token_tile(problem.row_capacity, problem.groups.num_experts) == 64)
    return launcher.template run<64, kMajor>();
  return launcher.template run<128, kMajor>();
}

// The same for the problem's weight order as well.
template <typename Launcher>
void with_row_tile(const RowProblem& problem, const Launcher& launcher) {
  return problem.b.major() == Major::k ? with_token_tile<Major::k>(problem, launcher)
                                       : with_token_tile<Major::mn>(problem, launcher);
}

// CTAs of a cluster over row tiles of kTileM: 64 rows are too few to share weights over.
template <int kTileM>
inline constexpr int kRowCluster = kTileM == 64 ? 1 : 2;

template <typename TileType, int kHalvesN, template <typename, int> class Producer,
          typename Epilogue>
using RowGemm = Gemm<TileType, RowSchedule<TileType::kM, TileType::kCluster>,
                     Producer<TileType, kHalvesN>, Epilogue>;

}  // namespace penstock::cuda
