// SPDX-License-Identifier: Apache-2.0
//
// The producer warpgroup of the row products: fills stages with an A tile of token rows and a B
// tile of weights.
//
// ContiguousRows: one thread issues TMA for both. Rows past the expert's end belong to another
// expert; they only reach accumulators that are never stored. GatheredRows: four warps copy 16
// bytes a lane through row_to_token (or the identity) while one thread issues the weights' TMA.
// Both zero-fill k past its end.
#pragma once

#include "backends/cuda/gemm/load_weights.cuh"

namespace penstock::cuda {

// How a stage's full barrier completes, and whether consumers must fence generic writes.
enum class Fill : uint8_t { tma, mixed };

struct RowOperands {
  WeightMaps weights;
  CUtensorMap rows;  // (k, half, row); ContiguousRows only
  const void* data;  // GatheredRows only, with what follows
  int64_t row_stride;
  const int32_t* row_to_token;
  int32_t k_extent;  // of one half
  int32_t k_tiles;   // of one half
};

template <typename TileType, int kHalvesN>
struct ContiguousRows {
  static constexpr Fill kFill = Fill::tma;
  static constexpr int kThreads = 32;
  static constexpr int kArrivals = 1;
  static constexpr int kRegisters = 40;
  using Params = RowOperands;
  using Tile = TileType;
  using Weights = LoadWeights<TileType, kHalvesN>;

  template <typename Tiles, typename RingType, typename Operand>
  static __device__ void run(const Params& params, Tiles& tiles, const RingType& ring,
                             const Operand&) {
    static_assert(Operand::kStages == 0, "only gathered rows bring an epilogue's operand");
    if (threadIdx.x >= kThreads) return;
    typename RingType::State state;
    Work work;
    while (tiles.next(work)) {
      fill(params, work, work.k_tiles, ring, state);
      tiles.look_ahead();
    }
  }

  // The first `k_tiles` stages of one tile.
  template <typename RingType>
  static __device__ __forceinline__ void fill(const Params& params, const Work& work,
                                              int32_t k_tiles, const RingType& ring,
                                              typename RingType::State& state) {
    StageK at{0, 0};
    for (int tile = 0; tile < k_tiles; ++tile) {
      arch::barrier_wait(ring.empty(state.stage()), state.parity() ^ 1);
      if (threadIdx.x == 0) {
        const uint32_t full = ring.full(state.stage());
        arch::barrier_arrive_expect(full, TileType::kBytesA + Weights::kBytes);
        arch::tma_load(ring.a(state.stage()), &params.rows, full,
                       {at.k, at.half, static_cast<int32_t>(work.row_begin)});
        Weights::issue(params.weights, work, at, ring.b(state.stage()), full);
      }
      state.advance();
      at.k += kTileK;
      if (at.k >= params.k_tiles * kTileK) at = {at.half + 1, 0};
    }
  }
};

// The stages of an epilogue's operand behind a tile's k tiles, by all threads of a producer that
// gathers.
template <typename Operand, typename RingType>
__device__ __forceinline__ void fill_operand(const Operand& operand, const Work& work,
                                             const RingType& ring,
                                             typename RingType::State& state) {
  if constexpr (Operand::kStages > 0) {
    for (int i = 0; i < Operand::kStages; ++i) {
      arch::barrier_wait(ring.empty(state.stage()), state.parity() ^ 1);
      const uint32_t full = ring.full(state.stage());
      if (threadIdx.x == 0) {
        arch::barrier_arrive_expect(full, Operand::kBytes);
        operand.load(work, i, ring.a(state.stage()), full);
      }
      arch::barrier_arrive(full);  // in place of the lane's copies
      state.advance();
    }
  }
}

template <typename TileType, int kHalvesN>
struct GatheredRows {
  static constexpr Fill kFill = Fill::mixed;
  static constexpr int kThreads = kWarpgroup;
  static constexpr int kArrivals = 1 + kThreads;
  // 16 more than where TMA copies, for the rows' addresses; consumers of 128 accumulators need them
  // more, and the producer's code still fits.
  static constexpr int kRegisters = TileType::kAccumulators == 128 ? 40 : 56;
  static constexpr int kRowsPerThread = TileType::kM / 16;
  using Params = RowOperands;
  using Tile = TileType;
  using Element = typename TileType::Element;
  using Weights = LoadWeights<TileType, kHalvesN>;
  static_assert(TileType::kMajorA == Major::k, "token rows are contiguous along k");

  template <typename Tiles, typename RingType, typename Operand>
  static __device__ void run(const Params& params, Tiles& tiles, const RingType& ring,
                             const Operand& operand) {
    typename RingType::State state;
    Work work;
    while (tiles.next(work)) {
      fill(params, work, work.k_tiles, ring, state);
      fill_operand(operand, work, ring, state);
      tiles.look_ahead();
    }
  }

  // The first `k_tiles` stages of one tile.
  template <typename RingType>
  static __device__ __forceinline__ void fill(const Params& params, const Work& work,
                                              int32_t k_tiles, const RingType& ring,
                                              typename RingType::State& state) {
    const int thread = threadIdx.x;
    const int first_row = thread / 8;
    const int chunk = thread % 8;  // 16 bytes of the row's 128
    const uint32_t offset = first_row * 128 + ((chunk ^ (first_row & 7)) << 4);
    // Where the rows start, formed once a tile so that a copy costs an addition; rows past the
    // end keep a size of 0, whose address is never read.
    const Element* rows[kRowsPerThread];
    uint32_t valid = 0;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int row = first_row + 16 * i;
      const bool exists = row < work.rows;
      const int64_t token = exists ? token_of(params, work.row_begin + row) : 0;
      rows[i] = static_cast<const Element*>(params.data) + token * params.row_stride + chunk * 8;
      valid |= (exists ? 1u : 0u) << i;
    }
    for (int tile = 0; tile < k_tiles; ++tile) {
      arch::barrier_wait(ring.empty(state.stage()), state.parity() ^ 1);
      const uint32_t full = ring.full(state.stage());
      if (thread == 0) {
        arch::barrier_arrive_expect(full, Weights::kBytes);
        Weights::issue(params.weights, work, {0, tile * kTileK}, ring.b(state.stage()), full);
      }
      const int32_t k = tile * kTileK;
      const uint32_t live = k + chunk * 8 < params.k_extent ? valid : 0;
      const uint32_t destination = ring.a(state.stage()) + offset;
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        arch::copy_async_16(destination + i * 16 * 128, rows[i] + k, (live >> i & 1) * 16);
      }
      arch::copy_async_arrive(full);
      state.advance();
    }
  }

 private:
  static __device__ int32_t token_of(const Params& params, int64_t row) {
    return params.row_to_token == nullptr ? static_cast<int32_t>(row) : params.row_to_token[row];
  }
};

}  // namespace penstock::cuda
