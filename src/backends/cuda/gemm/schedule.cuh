// SPDX-License-Identifier: Apache-2.0
//
// Which tile a CTA computes next. The order is static: CTA b takes tiles b, b + grid, ... of one
// list that every warp derives from the experts' counts on the device, so nothing is read on the
// host and nothing depends on timing.
//
// RowSchedule (token rows are the tile's rows): expert by expert, inside an expert rows fastest,
// so that tiles which share weights run together. ColumnSchedule (token rows are the reduced axis):
// the same number of tiles for every expert. All lanes of a warp call next() together.
#pragma once

#include <cstdint>

namespace penstock::cuda {

// Rows of each expert. Without counts there is one group of `uniform_rows` rows.
struct Groups {
  const int32_t* counts;
  const int32_t* offsets;
  int32_t num_experts;
  int32_t uniform_rows;

  __device__ int32_t count(int32_t expert) const {
    if (expert >= num_experts) return 0;
    return counts == nullptr ? uniform_rows : counts[expert];
  }
  __device__ int64_t offset(int32_t expert) const {
    return offsets == nullptr ? 0 : offsets[expert];
  }
};

// One tile. For row tiles `rows` is the rows of the tile that exist, for column tiles the rows of
// the expert, which is the length of the reduction.
struct Work {
  int32_t expert;
  int32_t m_half;
  int32_t m;  // first row inside the half (column tiles) or the expert (row tiles)
  int32_t n_half;
  int32_t n;  // first column inside its half
  int32_t rows;
  int64_t row_begin;  // first row of the row arrays
  int32_t k_tiles;
};

struct RowScheduleParams {
  Groups groups;
  int32_t n_tiles;
  int32_t n_step;  // columns of one half that a tile covers
  int32_t k_tiles;
};

template <int kTileM>
class RowSchedule {
 public:
  using Params = RowScheduleParams;
  static constexpr bool kMayBeEmpty = false;  // every tile has k tiles

  __device__ explicit RowSchedule(const Params& params)
      : params_(params), tile_(static_cast<int32_t>(blockIdx.x)), lane_(threadIdx.x % 32) {
    load(0);
  }

  __device__ bool next(Work& work) {
    while (tile_ >= base_tile_ + total_) {
      if (base_expert_ + 32 >= params_.groups.num_experts) return false;
      base_tile_ += total_;
      load(base_expert_ + 32);
    }
    const int32_t local = tile_ - base_tile_;
    const int source = __ffs(__ballot_sync(~0u, inclusive_ > local)) - 1;
    const int32_t count = __shfl_sync(~0u, count_, source);
    const int32_t m_tiles = (count + kTileM - 1) / kTileM;
    const int32_t first = __shfl_sync(~0u, inclusive_, source) - m_tiles * params_.n_tiles;
    const int32_t index = local - first;
    const int32_t n_tile = index / m_tiles;
    work.expert = base_expert_ + source;
    work.m_half = 0;
    work.m = (index - n_tile * m_tiles) * kTileM;
    work.n_half = 0;
    work.n = n_tile * params_.n_step;
    work.rows = min(kTileM, count - work.m);
    work.row_begin = params_.groups.offset(work.expert) + work.m;
    work.k_tiles = params_.k_tiles;
    tile_ += static_cast<int32_t>(gridDim.x);
    return true;
  }

 private:
  // Counts of 32 experts, one a lane, and the inclusive sum of their tiles.
  __device__ void load(int32_t expert) {
    base_expert_ = expert;
    count_ = params_.groups.count(expert + lane_);
    inclusive_ = (count_ + kTileM - 1) / kTileM * params_.n_tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t below = __shfl_up_sync(~0u, inclusive_, distance);
      if (lane_ >= distance) inclusive_ += below;
    }
    total_ = __shfl_sync(~0u, inclusive_, 31);
  }

  const Params& params_;
  int32_t tile_;
  int32_t lane_;
  int32_t base_expert_ = 0;
  int32_t base_tile_ = 0;
  int32_t count_ = 0;
  int32_t inclusive_ = 0;
  int32_t total_ = 0;
};

struct ColumnScheduleParams {
  Groups groups;
  const uint8_t* trainable;  // null: all experts
  int32_t m_tiles;           // per half
  int32_t m_halves;
  int32_t n_tiles;  // per half
  int32_t n_halves;
};

template <int kTileM, int kTileN>
class ColumnSchedule {
 public:
  using Params = ColumnScheduleParams;
  static constexpr bool kMayBeEmpty = true;  // an expert without rows has none

  __device__ explicit ColumnSchedule(const Params& params)
      : params_(params), tile_(static_cast<int32_t>(blockIdx.x)) {}

  __device__ bool next(Work& work) {
    const int32_t m_tiles = params_.m_tiles * params_.m_halves;
    const int32_t per_expert = m_tiles * params_.n_tiles * params_.n_halves;
    for (; tile_ < per_expert * params_.groups.num_experts; tile_ += gridDim.x) {
      work.expert = tile_ / per_expert;
      if (params_.trainable != nullptr && params_.trainable[work.expert] == 0) continue;
      const int32_t index = tile_ - work.expert * per_expert;
      const int32_t n_tile = index / m_tiles;
      const int32_t m_tile = index - n_tile * m_tiles;
      work.m_half = m_tile / params_.m_tiles;
      work.m = (m_tile - work.m_half * params_.m_tiles) * kTileM;
      work.n_half = n_tile / params_.n_tiles;
      work.n = (n_tile - work.n_half * params_.n_tiles) * kTileN;
      work.rows = params_.groups.count(work.expert);
      work.row_begin = params_.groups.offset(work.expert);
      work.k_tiles = (work.rows + 63) / 64;
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
