// SPDX-License-Identifier: Apache-2.0
//
// What all epilogues share: one warp's 16 rows of accumulators, and the piece of shared memory
// through which they become 16-byte accesses of whole rows. Each warp works alone, so an epilogue
// needs no barrier but __syncwarp.
//
// A piece is 16 rows of 128 bytes, 144 bytes apart: neither the 4-byte writes of the accumulator
// layout nor the 16-byte reads of a row meet a bank conflict.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backends/cuda/gemm/schedule.cuh"
#include "backends/cuda/gemm/tile.cuh"

namespace penstock::cuda {

inline constexpr int kPieceStride = 144;
inline constexpr int kPieceBytes = 16 * kPieceStride;

// Where a consumer warp works: its staging and its first row of the tile.
struct WarpPlace {
  uint8_t* staging;
  int row;
};

// A row-major matrix in global memory: element (row, column) at data + row * stride + column.
struct Rows {
  void* data;  // null: not wanted
  int64_t stride;
};

struct Bias {
  const void* data;  // null: none
  int64_t expert_stride;
  int64_t stride;
};

template <typename Element>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ Type pack(float low, float high) { return __floats2bfloat162_rn(low, high); }
  static __device__ float2 unpack(Type pair) { return __bfloat1622float2(pair); }
};
template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ Type pack(float low, float high) { return __floats2half2_rn(low, high); }
  static __device__ float2 unpack(Type pair) { return __half22float2(pair); }
};
template <>
struct Pair<float> {
  using Type = float2;
  static __device__ Type pack(float low, float high) { return {low, high}; }
  static __device__ float2 unpack(Type pair) { return pair; }
};

template <typename Element>
__device__ __forceinline__ float to_float(Element value) {
  return static_cast<float>(value);
}

// The accumulator layout inside a warp: a lane holds columns column() and column() + 1 of every
// group of 8, in rows row() and row() + 8.
struct Lane {
  static __device__ int id() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ int row() { return id() / 4; }
  static __device__ int column() { return id() % 4 * 2; }
};

// 16 rows x 128 bytes of `Element` in shared memory.
template <typename Element>
struct Piece {
  static constexpr int kColumns = 128 / sizeof(Element);
  static constexpr int kGroups = kColumns / 8;
  static constexpr int kVector = 16 / sizeof(Element);
  using PairType = typename Pair<Element>::Type;

  uint8_t* base;

  // The lane's two columns of group `group`, in row row() + 8 * lower.
  __device__ PairType& pair(int group, int lower) const {
    return *reinterpret_cast<PairType*>(base + (Lane::row() + lower * 8) * kPieceStride +
                                        (group * 8 + Lane::column()) * sizeof(Element));
  }

  __device__ void put(int group, float4 v) const {
    pair(group, 0) = Pair<Element>::pack(v.x, v.y);
    pair(group, 1) = Pair<Element>::pack(v.z, v.w);
  }

  // Calls `access(shared 16 bytes, row, column)` for each 16 bytes whose row and column exist, a
  // whole row of the piece by 8 neighbouring lanes.
  template <typename Access>
  __device__ void each_vector(int rows, int columns, Access access) const {
    const int column = Lane::id() % 8 * kVector;
    if (column >= columns) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 4 + Lane::id() / 8;
      if (row < rows) {
        access(*reinterpret_cast<uint4*>(base + row * kPieceStride + Lane::id() % 8 * 16), row,
               column);
      }
    }
  }

  // Every lane of the warp calls these; the piece is free to be rewritten afterwards.
  __device__ void store(Element* destination, int64_t stride, int rows, int columns) const {
    __syncwarp();
    each_vector(rows, columns, [&](const uint4& vector, int row, int column) {
      *reinterpret_cast<uint4*>(destination + row * stride + column) = vector;
    });
    __syncwarp();
  }

  __device__ void load(const Element* source, int64_t stride, int rows, int columns) const {
    each_vector(rows, columns, [&](uint4& vector, int row, int column) {
      vector = *reinterpret_cast<const uint4*>(source + row * stride + column);
    });
  }
};

// The bias of two neighbouring columns, zeros without one or past the end.
template <typename Element>
__device__ __forceinline__ float2 bias_pair(const Bias& bias, int32_t expert, int column,
                                            int extent) {
  if (bias.data == nullptr || column >= extent) return {0.0f, 0.0f};
  const Element* values = static_cast<const Element*>(bias.data) + expert * bias.expert_stride;
  return {to_float(values[column * bias.stride]), to_float(values[(column + 1) * bias.stride])};
}

__device__ __forceinline__ float4 with_bias(float4 v, float2 bias) {
  return {v.x + bias.x, v.y + bias.y, v.z + bias.x, v.w + bias.y};
}

// The four accumulators of group `group` of 8 columns.
template <int kCount>
__device__ __forceinline__ float4 group_of(const float (&sums)[kCount], int group) {
  return {sums[4 * group], sums[4 * group + 1], sums[4 * group + 2], sums[4 * group + 3]};
}

}  // namespace penstock::cuda
