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

  static __device__ int rows_of(const Params&, const Work& work) { return work.rows; }

  static __device__ void run(const Params& params, const Work& work,
                             float (&sums)[TileType::kAccumulators], const WarpPlace& place) {
    const int rows = work.rows - place.row;
    if (rows <= 0) return;
    const float scale = params.scale == nullptr ? 1.0f : *params.scale;
    const Piece<Out> piece{place.staging};
    Out* out = static_cast<Out*>(params.out.data) +
               (work.row_begin + place.row) * params.out.stride;
#pragma unroll
    for (int first = 0; first < TileType::kN; first += Piece<Out>::kColumns) {
      const int column = work.n + first;
      if (column >= params.columns) break;
#pragma unroll
      for (int group = 0; group < Piece<Out>::kGroups; ++group) {
        float4 v = group_of(sums, first / 8 + group);
        v = {v.x * scale, v.y * scale, v.z * scale, v.w * scale};
        piece.put(group, with_bias(v, bias_pair<Element>(params.bias, work.expert,
                                                         column + group * 8 + Lane::column(),
                                                         params.columns)));
      }
      store(piece, out + column, params.out.stride, rows, params.columns - column);
    }
  }

 private:
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
