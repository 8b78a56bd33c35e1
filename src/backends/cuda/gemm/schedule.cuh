// SPDX-License-Identifier: Apache-2.0
//
// Which tile a CTA computes next. The order is static: a cluster of c CTAs takes tiles b .. b + c -
// 1, then those `grid` further on, of one list that every warp derives from the experts' counts on
// the device, so nothing is read on the host and nothing depends on timing.
//
// RowSchedule (token rows are the tile's rows): expert by expert, inside an expert rows fastest,
// so that tiles which share weights run together. ColumnSchedule (token rows are the reduced axis):
// the same number of tiles for every expert. The CTAs of a cluster step together: where one has no
// tile it gets an empty one beside its neighbour's. All lanes of a warp call next() together.
#pragma once

#include <cstdint>

namespace penstock::cuda {

// index / tiles for 0 <= index, 0 < tiles and a quotient below 2^20: the estimate is then off by at
// most one. The integer division is 20 instructions that wait for each other, and with two of them
// a tile's lookup was an eighth of the down-projection at n = 256.
__device__ __forceinline__ int32_t quotient_of(int32_t index, int32_t tiles) {
  auto quotient =
      static_cast<int32_t>(__fdividef(static_cast<float>(index), static_cast<float>(tiles)));
  const int32_t rest = index - quotient * tiles;
  if (rest < 0) --quotient;
  if (rest >= tiles) ++quotient;
  return quotient;
}

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

// Whether the neighbour in the cluster reads the same direct operand (weights, or the side of a
// weight gradient that is not gathered).
enum class Direct : uint8_t { own, shared };

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
  Direct direct;
};

struct RowScheduleParams {
  Groups groups;
  int32_t n_tiles;
  int32_t n_step;  // columns of one half that a tile covers
  int32_t k_tiles;
};

template <int kTileM, int kCluster>
class RowSchedule {
 public:
  using Params = RowScheduleParams;
  static constexpr bool kMayBeEmpty = false;  // every tile has k tiles

  __device__ explicit RowSchedule(const Params& params)
      : params_(params), tile_(static_cast<int32_t>(blockIdx.x) / kCluster * kCluster) {
    load(0);
  }

  __device__ bool next(Work& work) {
    int32_t total = tiles();
    while (tile_ >= listed(total)) {
      if (base_expert_ + 32 >= params_.groups.num_experts) return false;
      tile_ -= listed(total);
      load(base_expert_ + 32);
      total = tiles();
    }
    Place place = locate(tile_);
    Direct direct = Direct::own;
    if constexpr (kCluster == 2) {
      Place second = place;
      if (tile_ + 1 == total) {
        second.rows = 0;  // past the last tile of these experts: the neighbour's, without rows
      } else if (place.m + kTileM < place.count) {
        second.m += kTileM;
        second.rows = min(kTileM, place.count - second.m);
      } else {
        second = locate(tile_ + 1);
      }
      if (second.expert == place.expert && second.n == place.n) direct = Direct::shared;
      if (blockIdx.x % 2 == 1) place = second;
    }
    work.expert = place.expert;
    work.m_half = 0;
    work.m = place.m;
    work.n_half = 0;
    work.n = place.n;
    work.rows = place.rows;
    work.row_begin = params_.groups.offset(place.expert) + place.m;
    work.k_tiles = params_.k_tiles;
    work.direct = direct;
    tile_ += static_cast<int32_t>(gridDim.x);
    return true;
  }

 private:
  struct Place {
    int32_t expert;
    int32_t m;
    int32_t n;
    int32_t rows;
    int32_t count;  // of the expert
  };

  // Tiles of these 32 experts, and what they take of the list: whole clusters.
  __device__ int32_t tiles() const { return __shfl_sync(~0u, inclusive_, 31); }
  static __device__ int32_t listed(int32_t tiles) {
    return (tiles + kCluster - 1) / kCluster * kCluster;
  }

  __device__ Place locate(int32_t local) const {
    const int source = __ffs(__ballot_sync(~0u, inclusive_ > local)) - 1;
    const int32_t count = __shfl_sync(~0u, count_, source);
    const int32_t m_tiles = (count + kTileM - 1) / kTileM;
    const int32_t index =
        local - (__shfl_sync(~0u, inclusive_, source) - m_tiles * params_.n_tiles);
    const int32_t n_tile = quotient_of(index, m_tiles);
    const int32_t m = (index - n_tile * m_tiles) * kTileM;
    return {base_expert_ + source, m, n_tile * params_.n_step, min(kTileM, count - m), count};
  }

  // Counts of 32 experts, one a lane, and the inclusive sum of their tiles.
  __device__ void load(int32_t expert) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    base_expert_ = expert;
    count_ = params_.groups.count(expert + lane);
    inclusive_ = (count_ + kTileM - 1) / kTileM * params_.n_tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      // The instruction's own predicate: comparisons of the lane would be kept for the whole
      // kernel, five of a thread's seven predicates, and the epilogues' would be spilled.
      asm volatile(
          "{\n"
          ".reg .pred exists;\n"
          ".reg .s32 below;\n"
          "shfl.sync.up.b32 below|exists, %0, %1, 0, 0xffffffff;\n"
          "@exists add.s32 %0, %0, below;\n"
          "}"
          : "+r"(inclusive_)
          : "r"(distance));
    }
  }

  const Params& params_;
  int32_t tile_;  // counted from the first of these 32 experts
  int32_t base_expert_ = 0;
  int32_t count_ = 0;
  int32_t inclusive_ = 0;
};

// Tiles of one axis of an output: `tiles` per half.
struct AxisTiles {
  int32_t tiles;
  int32_t halves;

  // The half and the first index inside it of a tile of `size`.
  __device__ void place(int32_t tile, int32_t size, int32_t& half, int32_t& first) const {
    half = tile < tiles || halves == 1 ? 0 : 1;
    first = (tile - half * tiles) * size;
  }
};

struct ColumnScheduleParams {
  Groups groups;
  const uint8_t* trainable;  // null: all experts
  AxisTiles m;
  AxisTiles n;
};

enum class Axis : uint8_t { m, n };

// kFastest is the axis along which neighbours lie: that of the gathered side, so that the other,
// direct side is the same for both.
template <typename TileType, Axis kFastest>
class ColumnSchedule {
 public:
  using Params = ColumnScheduleParams;
  static constexpr bool kMayBeEmpty = true;  // an expert without rows has none
  static constexpr int kCluster = TileType::kCluster;

  __device__ explicit ColumnSchedule(const Params& params)
      : params_(params), tile_(static_cast<int32_t>(blockIdx.x)) {}

  __device__ bool next(Work& work) {
    const AxisTiles& fast = kFastest == Axis::m ? params_.m : params_.n;
    const AxisTiles& slow = kFastest == Axis::m ? params_.n : params_.m;
    // Whole clusters: a tile past the axis loads zeros and stores nothing.
    const int32_t listed = (fast.tiles * fast.halves + kCluster - 1) / kCluster * kCluster;
    const int32_t per_expert = listed * slow.tiles * slow.halves;
    for (; tile_ < per_expert * params_.groups.num_experts; tile_ += gridDim.x) {
      work.expert = quotient_of(tile_, per_expert);
      if (params_.trainable != nullptr && params_.trainable[work.expert] == 0) continue;
      const int32_t index = tile_ - work.expert * per_expert;
      const int32_t across = quotient_of(index, listed);
      const int32_t along = index - across * listed;
      params_.m.place(kFastest == Axis::m ? along : across, TileType::kM, work.m_half, work.m);
      params_.n.place(kFastest == Axis::m ? across : along, TileType::kN, work.n_half, work.n);
      work.rows = params_.groups.count(work.expert);
      work.row_begin = params_.groups.offset(work.expert);
      work.k_tiles = (work.rows + 63) / 64;
      work.direct = kCluster == 2 ? Direct::shared : Direct::own;
      tile_ += static_cast<int32_t>(gridDim.x);
      return true;
    }
    return false;
  }

 private:
  const Params& params_;
  int32_t tile_;
};

// The tiles of one warp, each looked up when it is asked for.
template <typename Schedule>
class Tiles {
 public:
  __device__ explicit Tiles(const typename Schedule::Params& params) : schedule_(params) {}
  __device__ __forceinline__ bool next(Work& work) { return schedule_.next(work); }
  __device__ void look_ahead() {}

 private:
  Schedule schedule_;
};

// The same, each looked up while the one before is worked on: a lookup is a chain of 550 cycles,
// and a tile of four stages takes 6000.
template <typename Schedule>
class TilesAhead {
 public:
  __device__ explicit TilesAhead(const typename Schedule::Params& params) : schedule_(params) {
    look_ahead();
  }

  // look_ahead() comes once before the next call.
  __device__ __forceinline__ bool next(Work& work) const {
    work = ahead_;
    return more_;
  }
  __device__ __forceinline__ void look_ahead() { more_ = schedule_.next(ahead_); }

 private:
  Schedule schedule_;
  Work ahead_;
  bool more_;
};

}  // namespace penstock::cuda
