// SPDX-License-Identifier: Apache-2.0
//
// The producer warpgroup of the weight gradients: both operands are token rows, reduced over, so
// both tiles are MN-major (64 rows of k, 128 bytes of columns a block).
//
// One side is gathered through row_to_token (or the identity) by 16-byte cp.async, the other side
// is contiguous and comes by TMA. The last stage of an expert that is not 64 rows long is
// zero-filled on both sides, by cp.async: the rows after it belong to another expert, and 0 times
// its NaN would be NaN.
#pragma once

#include "backends/cuda/gemm/load_rows.cuh"

namespace penstock::cuda {

// One side: (row, half, column) with `extent` columns in a half.
struct ColumnSide {
  CUtensorMap map;  // (column, half, row), of the contiguous side only
  const void* data;
  int64_t row_stride;
  int64_t half_stride;
  int32_t extent;
};

struct ColumnOperands {
  ColumnSide left;
  ColumnSide right;
  const int32_t* row_to_token;
};

enum class Gathered : uint8_t { left, right };

template <typename TileType, Gathered kGathered>
struct GatheredColumns {
  static constexpr Fill kFill = Fill::mixed;
  static constexpr int kArrivals = 1 + kWarpgroup;
  static constexpr int kRegisters = 56;
  using Params = ColumnOperands;
  using Element = typename TileType::Element;
  static_assert(TileType::kMajorA == Major::mn && TileType::kMajorB == Major::mn,
                "the reduced axis is the row axis of both operands");

  template <typename Tiles, typename RingType, typename Operand>
  static __device__ void run(const Params& params, Tiles& tiles, const RingType& ring,
                             const Operand&) {
    static_assert(Operand::kStages == 0, "only gathered rows bring an epilogue's operand");
    const int thread = threadIdx.x;
    const int first_row = thread / 8;
    typename RingType::State state;
    Work work;
    while (tiles.next(work)) {
      const Target left{&params.left, work.m_half, work.m};
      const Target right{&params.right, work.n_half, work.n};
      const Target& gathered = kGathered == Gathered::left ? left : right;
      const Target& direct = kGathered == Gathered::left ? right : left;
      Rows tokens = rows_of(params.row_to_token, work, first_row);
      for (int tile = 0; tile < work.k_tiles; ++tile) {
        const int row = tile * 64 + first_row;
        const Rows next = rows_of(params.row_to_token, work, row + 64);
        arch::barrier_wait(ring.empty(state.stage()), state.parity() ^ 1);
        const uint32_t full = ring.full(state.stage());
        const uint32_t to_left = ring.a(state.stage());
        const uint32_t to_right = ring.b(state.stage());
        const uint32_t to_gathered = kGathered == Gathered::left ? to_left : to_right;
        const uint32_t to_direct = kGathered == Gathered::left ? to_right : to_left;
        if (tile * 64 + 64 <= work.rows) {
          if (thread == 0) {
            arch::barrier_arrive_expect(full, kDirectBlocks * kBlockBytes);
            copy_block_rows(direct, static_cast<int32_t>(work.row_begin) + tile * 64, to_direct,
                            full);
          }
        } else {
          if (thread == 0) arch::barrier_arrive(full);
          copy_rows<kDirectBlocks>(direct, rows_of(nullptr, work, row), to_direct);
        }
        copy_rows<kGatheredBlocks>(gathered, tokens, to_gathered);
        arch::copy_async_arrive(full);
        tokens = next;
        state.advance();
      }
      tiles.look_ahead();
    }
  }

 private:
  static constexpr int kBlocksA = TileType::kM / 64;
  static constexpr int kBlocksB = TileType::kN / 64;
  static constexpr int kGatheredBlocks = kGathered == Gathered::left ? kBlocksA : kBlocksB;
  static constexpr int kDirectBlocks = kGathered == Gathered::left ? kBlocksB : kBlocksA;

  struct Target {
    const ColumnSide* side;
    int32_t half;
    int32_t column;
  };
  struct Rows {
    int32_t row[4];  // of the operand, -1: past the end
  };

  // The four rows of the stage that this thread copies, `first` being inside the expert.
  static __device__ Rows rows_of(const int32_t* map, const Work& work, int32_t first) {
    Rows rows;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t row = first + 16 * i;
      const int64_t at = work.row_begin + row;
      rows.row[i] = row >= work.rows ? -1 : map == nullptr ? static_cast<int32_t>(at) : map[at];
    }
    return rows;
  }

  static __device__ void copy_block_rows(const Target& target, int32_t row, uint32_t destination,
                                         uint32_t barrier) {
#pragma unroll
    for (int block = 0; block < kDirectBlocks / TileType::kCluster; ++block) {
      if constexpr (TileType::kCluster == 1) {
        arch::tma_load(destination + block * kBlockBytes, &target.side->map, barrier,
                       {target.column + block * 64, target.half, row});
      } else {
        // The neighbour's tile lies along the gathered side: it needs the same columns of this one.
        const int own = block + static_cast<int>(blockIdx.x % 2) * (kDirectBlocks / 2);
        arch::tma_load_multicast(destination + own * kBlockBytes, &target.side->map, barrier,
                                 {target.column + own * 64, target.half, row}, uint16_t{3});
      }
    }
  }

  template <int kBlocks>
  static __device__ void copy_rows(const Target& target, const Rows& rows, uint32_t destination) {
    const int first_row = threadIdx.x / 8;
    const int chunk = threadIdx.x % 8;
    const uint32_t offset = first_row * 128 + ((chunk ^ (first_row & 7)) << 4);
    const ColumnSide& side = *target.side;
    const int32_t column = target.column + chunk * 8;
    const Element* data =
        static_cast<const Element*>(side.data) + target.half * side.half_stride + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // A size of 0 leaves the address unread, so it need not be a valid one.
      const Element* line = data + rows.row[i] * side.row_stride;
      const int32_t left = rows.row[i] >= 0 ? side.extent - column : 0;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        arch::copy_async_16(destination + block * kBlockBytes + i * 16 * 128 + offset,
                            line + block * 64, block * 64 < left ? 16 : 0);
      }
    }
  }
};

}  // namespace penstock::cuda
