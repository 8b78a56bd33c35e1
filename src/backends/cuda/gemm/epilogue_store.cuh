// SPDX-License-Identifier: Apache-2.0
//
// Store: out_r = C_r + b_e, rounded once.
//
// StoreEpilogue stores the tile's own type and loads the bias where there is one: the
// down-projection, dX~. StoreWideEpilogue stores fp32: the router's logits, whose E columns need
// not be a multiple of anything.
#pragma once

#include "backends/cuda/gemm/warp_store.cuh"

namespace penstock::cuda {

// What is added to and multiplied into the sums on the way out: rare, so the common path pays one
// branch. Values are new ones, because accumulators that anything but wgmma writes would make ptxas
// serialise the next tile's products.
struct StoreChange {
  Bias bias;
  const float* scale;  // null: 1. One factor for all of C, on the device.
  Rows addend;         // null: none

  __device__ bool none() const {
    return scale == nullptr && bias.data == nullptr && addend.data == nullptr;
  }
};

// The change of one warp's 16 rows.
template <typename Element>
struct WarpChange {
  const StoreChange& change;
  int32_t expert;
  int64_t row;  // first of the warp
  int rows;     // that exist, 1 or more
  int32_t columns;
  float factor;

  // Of the lane's part of a group of 8 columns, whose first column is `column`.
  __device__ __forceinline__ float4 apply(float4 v, int column) const {
    const float2 b = bias_pair<Element>(change.bias, expert, column, columns);
    const float2 upper = addend(Lane::row(), column);
    const float2 lower = addend(Lane::row() + 8, column);
    return {fmaf(v.x, factor, b.x) + upper.x, fmaf(v.y, factor, b.y) + upper.y,
            fmaf(v.z, factor, b.x) + lower.x, fmaf(v.w, factor, b.y) + lower.y};
  }

 private:
  __device__ __forceinline__ float2 addend(int local, int column) const {
    if (change.addend.data == nullptr || local >= rows || column >= columns) return {0.0f, 0.0f};
    const Element* at = static_cast<const Element*>(change.addend.data) +
                        (row + local) * change.addend.stride + column;
    return unpack_word<Element>(*reinterpret_cast<const uint32_t*>(at));
  }
};

template <typename TileType>
struct StoreEpilogue {
  using Element = typename TileType::Element;
  using Store = WarpStore<Element>;
  static constexpr int kWarpStagingBytes = Store::kBytes;
  using Sums = float[TileType::kAccumulators];

  struct Params {
    RowTarget out;
    StoreChange change;
    int32_t columns;
  };

  using Operand = NoOperand;

  static __device__ int rows_of(const Params&, const Work& work) { return work.rows; }

  static __device__ void run(const Params& params, const Work& work, Sums& sums,
                             const WarpPlace& place) {
    if (work.rows <= place.row) return;
    if (params.change.none()) {
      store_tile(params, work, place,
                 [&](int group) { return packed_groups<Element>(sums, group); });
      return;
    }
    const WarpChange<Element> change = {
        params.change,
        work.expert,
        work.row_begin + place.row,
        work.rows - place.row,
        params.columns,
        params.change.scale == nullptr ? 1.0f : *params.change.scale};
    store_tile(params, work, place, [&](int group) {
      const int column = work.n + group * 8 + Lane::column();
      return pack_groups<Element>(change.apply(group_of(sums, group), column),
                                  change.apply(group_of(sums, group + 1), column + 8));
    });
  }

 private:
  template <typename Packed>
  static __device__ __forceinline__ void store_tile(const Params& params, const Work& work,
                                                    const WarpPlace& place, Packed packed) {
    const Store store(place.staging);
    const auto row = static_cast<int32_t>(work.row_begin + place.row);
#pragma unroll
    for (int first = 0; first < TileType::kN; first += 64) {
      store.piece(
          first / 64, [&](int group) { return packed(first / 8 + group); },
          [&](uint32_t slot) {
            Store::rows(params.out, {work.n + first, 0, row},
                        {work.rows - place.row, params.columns - work.n - first}, 0, slot);
          });
    }
  }
};

// Rows narrower than 16 bytes apart cannot be stored as vectors; element by element then.
enum class RowAlignment : uint8_t { vector, element };

template <typename TileType, RowAlignment kAlignment>
struct StoreWideEpilogue {
  using Element = typename TileType::Element;
  using Sums = float[TileType::kAccumulators];
  using PieceType = WidePiece;
  static constexpr int kWarpStagingBytes = kPieceBytes;

  struct Params {
    Rows out;
    int32_t columns;
  };

  using Operand = NoOperand;

  static __device__ int rows_of(const Params&, const Work& work) { return work.rows; }

  static __device__ void run(const Params& params, const Work& work, Sums& sums,
                             const WarpPlace& place) {
    if (work.rows <= place.row) return;
    const PieceType piece{place.staging};
    float* out =
        static_cast<float*>(params.out.data) + (work.row_begin + place.row) * params.out.stride;
#pragma unroll
    for (int first = 0; first < TileType::kN; first += PieceType::kColumns) {
      const int column = work.n + first;
      if (column >= params.columns) break;
#pragma unroll
      for (int group = 0; group < PieceType::kGroups; ++group) {
        piece.put(group, group_of(sums, first / 8 + group));
      }
      __syncwarp();
      store(piece, out + column, params.out.stride, work.rows - place.row, params.columns - column);
      __syncwarp();
    }
  }

  static __device__ void store(const PieceType& piece, float* out, int64_t stride, int rows,
                               int columns) {
    piece.each_vector(rows, columns, [&](const float4& vector, int row, int column) {
      if constexpr (kAlignment == RowAlignment::vector) {
        *reinterpret_cast<float4*>(out + row * stride + column) = vector;
      } else {
        const float* values = reinterpret_cast<const float*>(&vector);
        for (int i = 0; i < PieceType::kVector && column + i < columns; ++i) {
          out[row * stride + column + i] = values[i];
        }
      }
    });
  }
};

}  // namespace penstock::cuda
