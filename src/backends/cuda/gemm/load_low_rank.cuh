// SPDX-License-Identifier: Apache-2.0
//
// A producer of row products with one more segment behind the weights' k tiles: the thin rows of a
// low-rank term (R_cap, rank) and its thin matrix an expert, both by TMA, which fills ranks that
// end inside a stage with zeros on both sides. Consumers see a longer reduction, and multiply of
// its last stage what the rank reaches.
#pragma once

#include "backends/cuda/gemm/load_rows.cuh"
#include "backends/cuda/gemm/multiply.cuh"

namespace penstock::cuda {

struct AdaptedRowOperands {
  RowOperands base;
  RowOperands term;  // contiguous rows, whatever the base's are
};

template <typename Base>
struct WithLowRank {
  static constexpr Fill kFill = Base::kFill;
  static constexpr int kArrivals = Base::kArrivals;
  static constexpr int kRegisters = Base::kRegisters;
  using Params = AdaptedRowOperands;
  using Tile = typename Base::Tile;
  using Weights = typename Base::Weights;

  // The steps of the term's last stage that the rank reaches.
  static __device__ FirstSteps last_steps(const Params& params) {
    const int32_t rest = params.term.k_extent - (params.term.k_tiles - 1) * kTileK;
    return {(rest + 15) / 16};
  }

  template <typename Tiles, typename RingType, typename Operand>
  static __device__ void run(const Params& params, Tiles& tiles, const RingType& ring,
                             const Operand& operand) {
    static_assert(Operand::kStages == 0 || kFill == Fill::mixed,
                  "only gathered rows bring an epilogue's operand");
    if (threadIdx.x >= Base::kThreads) return;
    typename RingType::State state;
    Work work;
    while (tiles.next(work)) {
      Base::fill(params.base, work, work.k_tiles - params.term.k_tiles, ring, state);
      fill_term(params.term, work, ring, state);
      fill_operand(operand, work, ring, state);
      tiles.look_ahead();
    }
  }

 private:
  template <typename RingType>
  static __device__ __forceinline__ void fill_term(const RowOperands& term, const Work& work,
                                                   const RingType& ring,
                                                   typename RingType::State& state) {
    for (int tile = 0; tile < term.k_tiles; ++tile) {
      arch::barrier_wait(ring.empty(state.stage()), state.parity() ^ 1);
      const uint32_t full = ring.full(state.stage());
      if (threadIdx.x == 0) {
        arch::barrier_arrive_expect(full, Tile::kBytesA + Weights::kBytes);
        arch::tma_load(ring.a(state.stage()), &term.rows, full,
                       {tile * kTileK, 0, static_cast<int32_t>(work.row_begin)});
        Weights::issue(term.weights, work, {0, tile * kTileK}, ring.b(state.stage()), full);
      }
      // The barrier counts every lane that copies the base's rows; here they have nothing to copy.
      if constexpr (kFill == Fill::mixed) arch::barrier_arrive(full);
      state.advance();
    }
  }
};

template <typename TileType, int kHalvesN>
using AdaptedContiguousRows = WithLowRank<ContiguousRows<TileType, kHalvesN>>;
template <typename TileType, int kHalvesN>
using AdaptedGatheredRows = WithLowRank<GatheredRows<TileType, kHalvesN>>;

}  // namespace penstock::cuda
