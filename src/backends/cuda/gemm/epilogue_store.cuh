// SPDX-License-Identifier: Apache-2.0
//
// Store: out_r = C_r + b_e, rounded once.
//
// Loads the bias where there is one; stores bf16, fp16 or fp32. Used by the down-projection, by
// dX~ and by the router's logits (fp32, whose E columns need not be a multiple of anything).
#pragma once

#include "backends/cuda/gemm/epilogue.cuh"

namespace penstock::cuda {

// Rows of `Out` narrower than 16 bytes apart cannot be stored as vectors; element by element then.
enum class RowAlignment : uint8_t { vector, element };

template <typename TileType, typename Out, RowAlignment kAlignment>
struct StoreEpilogue {
  using Element = typename TileType::Element;
  static constexpr int kWarpStagingBytes = kPieceBytes;

  struct Params {
    Rows out;
    Bias bias;
    const float* scale;  // null: 1. One factor for all of C, on the device.
    int32_t columns;
  };

  using Operand = NoOperand;

  static __device__ int rows_of(const Params&, const Work& work) { return work.rows; }

  static __device__ void run(const Params& params, const Work& work,
                             float (&sums)[TileType::kAccumulators],
                             const WarpPlace& place) {
    const int rows = work.rows - place.row;
    if (rows <= 0) return;
    if (params.scale == nullptr && params.bias.data == nullptr) {
      store_tile(params, work, rows, place, [&](int group) { return group_of(sums, group); });
      return;
    }
    // Rare, so apart: the common path pays one branch. Values are new ones, because accumulators
    // that anything but wgmma writes would make ptxas serialise the next tile's products.
    const float scale = params.scale == nullptr ? 1.0f : *params.scale;
    store_tile(params, work, rows, place, [&](int group) {
      const float4 v = group_of(sums, group);
      const float2 bias = bias_pair<Element>(params.bias, work.expert,
                                             work.n + group * 8 + Lane::column(), params.columns);
      return make_float4(fmaf(v.x, scale, bias.x), fmaf(v.y, scale, bias.y),
                         fmaf(v.z, scale, bias.x), fmaf(v.w, scale, bias.y));
    });
  }

 private:
  template <typename ValueOf>
  static __device__ __forceinline__ void store_tile(const Params& params, const Work& work,
                                                    int rows, const WarpPlace& place,
                                                    ValueOf value_of) {
    const Piece<Out> piece{place.staging};
    Out* out =
        static_cast<Out*>(params.out.data) + (work.row_begin + place.row) * params.out.stride;
#pragma unroll
    for (int first = 0; first < TileType::kN; first += Piece<Out>::kColumns) {
      const int column = work.n + first;
      if (column >= params.columns) break;
#pragma unroll
      for (int group = 0; group < Piece<Out>::kGroups; group += 2) {
        piece.put_two(group, value_of(first / 8 + group), value_of(first / 8 + group + 1));
      }
      store(piece, out + column, params.out.stride, rows, params.columns - column);
    }
  }

  static __device__ void store(const Piece<Out>& piece, Out* out, int64_t stride, int rows,
                               int columns) {
    if constexpr (kAlignment == RowAlignment::vector) {
      piece.store(out, stride, rows, columns);
    } else {
      __syncwarp();
      piece.each_vector(rows, columns, [&](const uint4& vector, int row, int column) {
        const Out* values = reinterpret_cast<const Out*>(&vector);
        for (int i = 0; i < Piece<Out>::kVector && column + i < columns; ++i) {
          out[row * stride + column + i] = values[i];
        }
      });
      __syncwarp();
    }
  }
};

}  // namespace penstock::cuda
