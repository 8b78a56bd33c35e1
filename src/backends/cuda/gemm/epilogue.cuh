// SPDX-License-Identifier: Apache-2.0
//
// What all epilogues share: one warp's 16 rows of accumulators, how they are packed, and the piece
// of shared memory through which fp32 results become 16-byte accesses of whole rows (results of the
// tile's own type: warp_store.cuh). Each warp works alone, so an epilogue needs no barrier but
// __syncwarp.
//
// A piece is 16 rows of 128 bytes, 144 bytes apart: neither writes in the accumulator layout
// nor the 16-byte reads of a row meet a bank conflict.
#pragma once

#include "backends/cuda/arch/copy.cuh"
#include "backends/cuda/gemm/schedule.cuh"
#include "backends/cuda/gemm/tile.cuh"
#include "backends/cuda/pair.cuh"

namespace penstock::cuda {

inline constexpr int kPieceStride = 144;
inline constexpr int kPieceBytes = 16 * kPieceStride;

// Where a consumer warp works: its staging and its first row of the tile.
struct WarpPlace {
  uint8_t* staging;
  int row;
};

// Of an epilogue that reads nothing through the ring.
struct NoOperand {
  static constexpr int kStages = 0;
  template <typename Params>
  __device__ explicit NoOperand(const Params&) {}
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

// Two neighbouring elements as one word.
template <typename Element>
__device__ __forceinline__ uint32_t pack_word(float low, float high) {
  const auto pair = Pair<Element>::pack(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <typename Element>
__device__ __forceinline__ float2 unpack_word(uint32_t word) {
  return Pair<Element>::unpack(reinterpret_cast<const typename Pair<Element>::Type&>(word));
}

// Two neighbouring groups of 8 columns as a lane holds them, rounded and packed: (group, upper
// row), (group, lower row), then the next group's. What stmatrix stores and ldmatrix loads at a
// time.
struct PackedGroups {
  uint32_t at[4];
};

template <typename Element>
__device__ __forceinline__ PackedGroups pack_groups(float4 first, float4 second) {
  return {{pack_word<Element>(first.x, first.y), pack_word<Element>(first.z, first.w),
           pack_word<Element>(second.x, second.y), pack_word<Element>(second.z, second.w)}};
}

// 16 rows x 32 columns of fp32 in shared memory, written in the accumulator layout and read by
// rows.
struct WidePiece {
  static constexpr int kColumns = 32;
  static constexpr int kGroups = kColumns / 8;
  static constexpr int kVector = 4;

  uint8_t* base;

  __device__ void put(int group, float4 v) const {
    pair(group, 0) = {v.x, v.y};
    pair(group, 1) = {v.z, v.w};
  }

  // Calls `access(shared 16 bytes, row, column)` for each 16 bytes whose row and column exist, a
  // whole row of the piece by neighbouring lanes.
  template <typename Access>
  __device__ void each_vector(int rows, int columns, Access access) const {
    const int column = Lane::id() % 8 * kVector;
    if (column >= columns) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 4 + Lane::id() / 8;
      if (row < rows) {
        access(*reinterpret_cast<const float4*>(base + row * kPieceStride + Lane::id() % 8 * 16),
               row, column);
      }
    }
  }

 private:
  // The lane's two columns of a group, in row row() + 8 * lower.
  __device__ float2& pair(int group, int lower) const {
    return *reinterpret_cast<float2*>(base + (Lane::row() + lower * 8) * kPieceStride +
                                      (group * 8 + Lane::column()) * sizeof(float));
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

// Adds the bias of `kGroups` groups of 8 columns from `column` on to the accumulators of `sums`
// from group `first` on. Rare, so it is a pass of its own and costs the others one branch a tile.
template <typename Element, int kGroups, int kCount>
__device__ __forceinline__ void add_bias(float (&sums)[kCount], int first, const Bias& bias,
                                         int32_t expert, int column, int extent) {
  if (bias.data == nullptr) return;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const float2 b = bias_pair<Element>(bias, expert, column + group * 8 + Lane::column(), extent);
    const int at = 4 * (first + group);
    sums[at] += b.x;
    sums[at + 1] += b.y;
    sums[at + 2] += b.x;
    sums[at + 3] += b.y;
  }
}

// The four accumulators of group `group` of 8 columns.
template <int kCount>
__device__ __forceinline__ float4 group_of(const float (&sums)[kCount], int group) {
  return {sums[4 * group], sums[4 * group + 1], sums[4 * group + 2], sums[4 * group + 3]};
}

// Groups `group` and the next, rounded.
template <typename Element, int kCount>
__device__ __forceinline__ PackedGroups packed_groups(const float (&sums)[kCount], int group) {
  return pack_groups<Element>(group_of(sums, group), group_of(sums, group + 1));
}

}  // namespace penstock::cuda
