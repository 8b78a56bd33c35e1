// SPDX-License-Identifier: Apache-2.0
//
// Orders of tiles for launches that are limited by how fast gathered rows arrive: the thin products
// and the gradients of thin factors. Experts are the fastest axis, so that at any time all experts
// are at about the same tokens, or at the same columns: a token's row then serves all of its
// experts while it is in L2, where expert by expert it comes from memory for each of them. What is
// lost by it, factors shared by neighbours, is small.
//
// The list is static like those of schedule.cuh. CTAs work alone.
#pragma once

#include "backends/cuda/gemm/schedule.cuh"

namespace penstock::cuda {

// Row tiles: the first of every expert, then the second of those that have one, and so on. An
// expert's rows are sorted by token.
template <int kTileM>
class BandSchedule {
 public:
  using Params = RowScheduleParams;
  static constexpr bool kMayBeEmpty = false;

  __device__ explicit BandSchedule(const Params& params)
      : params_(params), tile_(static_cast<int32_t>(blockIdx.x)) {
    load(0);
  }

  __device__ bool next(Work& work) {
    uint32_t live = tiles_here();
    while (tile_ >= __popc(live) * params_.n_tiles) {
      tile_ -= __popc(live) * params_.n_tiles;
      band_has_tiles_ |= live;
      if (base_expert_ + 32 < params_.groups.num_experts) {
        load(base_expert_ + 32);
      } else {
        if (band_has_tiles_ == 0) return false;
        band_has_tiles_ = 0;
        first_row_ += kTileM;
        load(0);
      }
      live = tiles_here();
    }
    const int32_t place = quotient_of(tile_, params_.n_tiles);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bool own = (live >> lane & 1) != 0 && __popc(live & ((1u << lane) - 1)) == place;
    const int source = __ffs(__ballot_sync(~0u, own)) - 1;
    const int32_t count = __shfl_sync(~0u, count_, source);
    work.expert = base_expert_ + source;
    work.m_half = 0;
    work.m = first_row_;
    work.n_half = 0;
    work.n = (tile_ - place * params_.n_tiles) * params_.n_step;
    work.rows = min(kTileM, count - first_row_);
    work.row_begin = params_.groups.offset(work.expert) + first_row_;
    work.k_tiles = params_.k_tiles;
    work.direct = Direct::own;
    tile_ += static_cast<int32_t>(gridDim.x);
    return true;
  }

 private:
  // Which of these 32 experts reach this band.
  __device__ uint32_t tiles_here() const { return __ballot_sync(~0u, count_ > first_row_); }

  __device__ void load(int32_t expert) {
    base_expert_ = expert;
    count_ = params_.groups.count(expert + static_cast<int>(threadIdx.x) % 32);
  }

  const Params& params_;
  int32_t tile_;  // counted from the first of these 32 experts in this band
  int32_t first_row_ = 0;
  uint32_t band_has_tiles_ = 0;
  int32_t base_expert_ = 0;
  int32_t count_ = 0;
};

// Output tiles of gradients: one place in the output for every expert, then the next place. All
// experts then read the same columns of the gathered rows, a slice of the tokens that fits into L2.
template <typename TileType>
class SliceSchedule {
 public:
  using Params = ColumnScheduleParams;
  static constexpr bool kMayBeEmpty = true;  // an expert without rows has none
  static_assert(TileType::kCluster == 1, "neighbours are of different experts");

  __device__ explicit SliceSchedule(const Params& params)
      : params_(params), tile_(static_cast<int32_t>(blockIdx.x)) {}

  __device__ bool next(Work& work) {
    const int32_t across = params_.n.tiles * params_.n.halves;
    const int32_t total = params_.m.tiles * params_.m.halves * across * params_.groups.num_experts;
    for (; tile_ < total; tile_ += static_cast<int32_t>(gridDim.x)) {
      const int32_t slice = quotient_of(tile_, params_.groups.num_experts);
      work.expert = tile_ - slice * params_.groups.num_experts;
      if (params_.trainable != nullptr && params_.trainable[work.expert] == 0) continue;
      const int32_t m = quotient_of(slice, across);
      params_.m.place(m, TileType::kM, work.m_half, work.m);
      params_.n.place(slice - m * across, TileType::kN, work.n_half, work.n);
      work.rows = params_.groups.count(work.expert);
      work.row_begin = params_.groups.offset(work.expert);
      work.k_tiles = (work.rows + 63) / 64;
      work.direct = Direct::own;
      tile_ += static_cast<int32_t>(gridDim.x);
      return true;
    }
    return false;
  }

 private:
  const Params& params_;
  int32_t tile_;
};

}  // namespace penstock::cuda
