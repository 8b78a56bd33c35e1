// SPDX-License-Identifier: Apache-2.0
//
// out_e (+)= sum over the rows of e of left_r^T right_r. The side whose columns are contiguous in
// the output is the kernel's right side; weights kept the other way round swap the two sides.
#pragma once

#include "backends/cuda/gemm/epilogue_weight_gradient.cuh"
#include "backends/cuda/gemm/launch.cuh"
#include "backends/cuda/gemm/schedule_thin.cuh"

namespace penstock::cuda {

// One side as the op names it.
struct GradientSide {
  const char* what;
  const TensorView& view;
  RowAccess access;
  int32_t halves;
};

template <typename Element>
ColumnSide column_side(const GradientSide& side, int64_t row_capacity) {
  const int64_t extent = side.view.size(1) / side.halves;
  ColumnSide result = {};
  require_vectors(side.what, side.view.data, {side.view.stride(0), extent});
  if (side.access == RowAccess::direct) {
    const int64_t rows = std::min(row_capacity, side.view.size(0));
    result.map = make_tensor_map({side.what,
                                  side.view.data,
                                  kDTypeOf<Element>,
                                  {extent, side.halves, rows},
                                  {extent, side.view.stride(0)},
                                  {64, 1, 64}});
  }
  result.data = side.view.data;
  result.row_stride = side.view.stride(0);
  result.half_stride = extent;
  result.extent = static_cast<int32_t>(extent);
  return result;
}

// Tiles by which side is gathered.
template <typename Element, Gathered kGathered, int kGatheredSize, int kDirectSize, int kCluster>
using GradientTile =
    Tile<Element, kGathered == Gathered::left ? kGatheredSize : kDirectSize,
         kGathered == Gathered::left ? kDirectSize : kGatheredSize, Major::mn, Major::mn, kCluster>;

template <typename Element, Gathered kGathered>
struct WideGradient {
  using Tile = GradientTile<Element, kGathered, kGatheredTile, kDirectTile, 2>;
  using Schedule = ColumnSchedule<Tile, kGathered == Gathered::left ? Axis::m : Axis::n>;
};

// The direct side is the thin one, of an adapter's factor: as few columns of it as a block has,
// and the order that reads the other side from memory once.
template <typename Element, Gathered kGathered>
struct ThinGradient {
  using Tile = GradientTile<Element, kGathered, kThinGradientTile, kThinTileN, 1>;
  using Schedule = SliceSchedule<Tile>;
};

template <typename Element, template <typename, Gathered> class Form, Gathered kGathered>
void launch_gradient(const GradientSide& left, const GradientSide& right,
                     const WeightGradientArgs& args, const WeightGradientEpilogueParams& epilogue,
                     const Context& context) {
  using TileType = typename Form<Element, kGathered>::Tile;
  using G = Gemm<TileType, typename Form<Element, kGathered>::Schedule,
                 GatheredColumns<TileType, kGathered>, WeightGradientEpilogue<TileType>>;
  const GradientSide& gathered = kGathered == Gathered::left ? left : right;
  typename G::Params params = {};
  params.operands.left = column_side<Element>(left, args.rows.row_capacity);
  params.operands.right = column_side<Element>(right, args.rows.row_capacity);
  params.operands.row_to_token = gathered.access == RowAccess::gathered
                                     ? args.rows.row_to_token.template as<int32_t>()
                                     : nullptr;
  const auto tiles = [](int64_t extent, int64_t tile) {
    return static_cast<int32_t>((extent + tile - 1) / tile);
  };
  params.schedule = {groups_of(args.rows),
                     args.trainable.present() ? args.trainable.template as<uint8_t>() : nullptr,
                     {tiles(epilogue.rows, TileType::kM), left.halves},
                     {tiles(epilogue.columns, TileType::kN), right.halves}};
  params.epilogue = epilogue;
  const auto along = [](const AxisTiles& axis) { return int64_t{axis.tiles} * axis.halves; };
  // An odd axis gets one more tile, so this bound counts both axes as if they did.
  const int64_t per_expert = (along(params.schedule.m) + 1) * (along(params.schedule.n) + 1);
  launch<G>("weight_gradient", params, per_expert * args.rows.num_experts(), context);
}

// One half of the output where TMA stores it; fp32 gradients and added ones are stored by threads.
template <typename Element>
CUtensorMap gradient_map(const WeightGradientEpilogueParams& epilogue, const GroupedMatrix& out,
                         int64_t stride, int64_t num_experts) {
  if (epilogue.type == GradientType::fp32) return {};
  return make_tensor_map({"weight gradient",
                          out.data,
                          kDTypeOf<Element>,
                          {epilogue.columns, epilogue.rows, num_experts},
                          {stride, num_experts == 1 ? 8 : out.expert_stride},
                          {64, kSlotRows, 1}});
}

template <typename Element>
void weight_gradient(const WeightGradientArgs& args, const Context& context) {
  if (args.left_access == RowAccess::gathered && args.right_access == RowAccess::gathered) {
    throw Error(ErrorCode::unsupported,
                {"weight_gradient", "both sides gathered", "at most one gathered side",
                 "Gather one side beforehand."});
  }
  const bool swap = args.out[0].col_stride != 1 && args.out[0].row_stride == 1;
  const GradientSide left_op = {"left", args.left, args.left_access, args.halves};
  const GradientSide right_op = {"right", args.right, args.right_access, 1};
  const GradientSide& left = swap ? right_op : left_op;
  const GradientSide& right = swap ? left_op : right_op;
  WeightGradientEpilogueParams epilogue = {};
  epilogue.rows = static_cast<int32_t>(left.view.size(1) / left.halves);
  epilogue.columns = static_cast<int32_t>(right.view.size(1) / right.halves);
  epilogue.accumulate = args.mode == GradMode::accumulate ? Accumulate::yes : Accumulate::no;
  epilogue.type = args.out[0].dtype == DType::float32 ? GradientType::fp32 : GradientType::element;
  const int64_t num_experts = args.rows.num_experts();
  const int64_t fp32_vectors = args.out[0].dtype == DType::float32 ? 2 : 1;
  for (size_t half = 0; half < static_cast<size_t>(args.halves); ++half) {
    const GroupedMatrix& out = args.out[half];
    const int64_t stride = swap ? out.col_stride : out.row_stride;
    if ((swap ? out.row_stride : out.col_stride) != 1) {
      throw Error(
          ErrorCode::unsupported,
          {"weight gradient",
           "strides " + std::to_string(out.row_stride) + " and " + std::to_string(out.col_stride),
           "one axis with stride 1", "Pass gradients whose rows or columns are contiguous."});
    }
    require_vectors(
        "weight gradient", out.data,
        {stride * fp32_vectors, num_experts == 1 ? 0 : out.expert_stride * fp32_vectors});
    epilogue.out[half] = {gradient_map<Element>(epilogue, out, stride, num_experts), out.data,
                          out.expert_stride, stride};
  }
  if (right.access == RowAccess::direct && epilogue.columns <= kThinTileN) {
    launch_gradient<Element, ThinGradient, Gathered::left>(left, right, args, epilogue, context);
  } else if (left.access == RowAccess::direct && epilogue.rows <= kThinTileN) {
    launch_gradient<Element, ThinGradient, Gathered::right>(left, right, args, epilogue, context);
  } else if (left.access == RowAccess::gathered) {
    launch_gradient<Element, WideGradient, Gathered::left>(left, right, args, epilogue, context);
  } else {
    launch_gradient<Element, WideGradient, Gathered::right>(left, right, args, epilogue, context);
  }
}

}  // namespace penstock::cuda
