// SPDX-License-Identifier: Apache-2.0
//
// Down-projection backward. With G the accumulators (dO_t W2_e, never stored), A = act(H) and s the
// row's score:
//   partials_{r, tile} = sum over the tile's columns of G A     (fp32, both unrounded)
//   dH_r = act'(H_r) (s G_r)        A'_r = s A_r                (each rounded once)
//
// H comes through the ring, 64 columns of gate and of up a stage, so that the producer fetches it
// while products run. A warp turns its 16 rows of a stage into dH where they are, writes A' behind
// them, and lets TMA store both; the stage goes back once they are read. dH may be H itself: a
// tile's H has arrived before any of it is written. The partial sums are reduced over a quad's
// columns in fixed order.
#pragma once

#include "backends/cuda/gemm/epilogue_up.cuh"
#include "backends/cuda/gemm/warp_store.cuh"

namespace penstock::cuda {

struct DownBackwardEpilogueParams {
  CUtensorMap h;  // (column, half, row), a box of 64 columns and the tile's rows
  RowTarget dh;
  RowTarget a_scaled;
  Rows partials;               // fp32, a column per n tile
  const float* scores;         // null: 1
  const int32_t* row_to_slot;  // null: scores are per row
  ActivationParams activation;
  int32_t columns;  // n
};

template <typename TileType, Gating kGating>
struct DownBackwardEpilogue {
  using Element = typename TileType::Element;
  using Params = DownBackwardEpilogueParams;
  static constexpr int kHalves = kGating == Gating::gated ? 2 : 1;
  static constexpr int kWarpStagingBytes = 0;
  using Sums = float[TileType::kAccumulators];

  // A stage holds gate, up and A' of the tile's rows in 64 columns, swizzled like an A tile.
  static constexpr int kPartBytes = TileType::kM * 128;
  static_assert((kHalves + 1) * kPartBytes <= TileType::kStageBytes, "A' lies behind H");
  struct Operand {
    static constexpr int kStages = TileType::kN / 64;
    static constexpr int kBytes = kHalves * kPartBytes;
    const Params& params;

    __device__ void load(const Work& work, int stage, uint32_t destination,
                         uint32_t barrier) const {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        arch::tma_load(destination + half * kPartBytes, &params.h, barrier,
                       {work.n + stage * 64, half, static_cast<int32_t>(work.row_begin)});
      }
    }
  };

  // Scores of the lane's two rows.
  struct Early {
    float score[2];
  };
  // Where they are; -1: the score is 1.
  struct Slots {
    int64_t at[2];
  };

  static __device__ int rows_of(const Params&, const Work& work) { return work.rows; }

  static __device__ __forceinline__ Slots find(const Params& params, const Work& work,
                                               const WarpPlace& place) {
    Slots slots;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int row = place.row + Lane::row() + lower * 8;
      const int64_t at = work.row_begin + row;
      slots.at[lower] = row >= work.rows || params.scores == nullptr ? -1
                        : params.row_to_slot == nullptr              ? at
                                                                     : params.row_to_slot[at];
    }
    return slots;
  }

  static __device__ __forceinline__ Early fetch(const Params& params, const Slots& slots) {
    Early early;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      early.score[lower] = slots.at[lower] < 0 ? 1.0f : params.scores[slots.at[lower]];
    }
    return early;
  }

  template <typename Stages>
  static __device__ __forceinline__ void run(const Params& params, const Work& work,
                                             const Sums& sums, const Early& early,
                                             const WarpPlace& place, Stages& stages) {
    const Task task = {params, work, place};
    const auto apply = [&](auto function) { columns(function, task, sums, early, stages); };
    if constexpr (kGating == Gating::gated) {
      visit_gated(params.activation.kind, apply);
    } else {
      visit_plain(params.activation.kind, apply);
    }
  }

 private:
  // What is worked on at a time: two groups of 8 columns. All of it is read before any of it is
  // written over, and no branch divides it: its eight elements a lane have long chains, which must
  // overlap.
  struct Batch {
    uint32_t half[kHalves][4];
    uint32_t scaled[4];  // A'
  };

  struct Task {
    const Params& params;
    const Work& work;
    const WarpPlace& place;
  };
  // Scores and running partial sums of the lane's two rows.
  struct RowPair {
    Early early;
    float partial[2];
  };

  template <typename Function, typename Stages>
  static __device__ __forceinline__ void columns(Function function, const Task& task,
                                                 const Sums& sums, const Early& early,
                                                 Stages& stages) {
    const auto& [params, work, place] = task;
    RowPair rows = {early, {0.0f, 0.0f}};
    const uint32_t offset = slot_lane_offset();
#pragma unroll
    for (int chunk = 0; chunk < Operand::kStages; ++chunk) {
      const uint32_t slab = stages.take() + place.row * 128;
      const int valid = params.columns - work.n - chunk * 64;
      if (valid > 0) {
#pragma unroll
        for (int group = 0; group < 8; group += 2) {
          Batch batch;
          const uint32_t at = (slab + offset) ^ (group * 16);
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            arch::load_matrix(at + half * kPartBytes, batch.half[half]);
          }
          differentiate(function, params.activation, sums, {chunk * 8 + group, valid - group * 8},
                        batch, rows);
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            arch::store_matrix(at + half * kPartBytes, batch.half[half]);
          }
          arch::store_matrix(at + kHalves * kPartBytes, batch.scaled);
        }
      }
      arch::fence_proxy_async_shared();
      arch::bulk_wait_read<0>();
      if (chunk > 0) stages.give_back_second_last();
      __syncwarp();
      store(task, slab, chunk * 64);
    }
    if (params.partials.data != nullptr) store_partials(task, rows.partial);
    arch::bulk_wait_read<0>();
    stages.give_back_last();
  }

  // Two groups of 8 columns: which, and how many of their columns exist.
  struct Groups2 {
    int first;
    int valid;
  };

  // H of the batch becomes dH, A' its scaled words, <G, A> joins the partial sums.
  template <typename Function>
  static __device__ __forceinline__ void differentiate(Function, const ActivationParams& activation,
                                                       const Sums& sums, const Groups2& groups,
                                                       Batch& batch, RowPair& rows) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * groups.first + 2 * i;
      const float score = rows.early.score[i % 2];
      const float2 g = {sums[at], sums[at + 1]};
      const float2 first = unpack_word<Element>(batch.half[0][i]);
      float2 value;
      if constexpr (kGating == Gating::gated) {
        const float2 up = unpack_word<Element>(batch.half[1][i]);
        const GatedGradient low = Function::at(first.x, up.x, activation);
        const GatedGradient high = Function::at(first.y, up.y, activation);
        batch.half[0][i] = pack_word<Element>(low.gate * (score * g.x), high.gate * (score * g.y));
        batch.half[1][i] = pack_word<Element>(low.up * (score * g.x), high.up * (score * g.y));
        value = {low.value, high.value};
      } else {
        const PlainGradient low = Function::at(first.x);
        const PlainGradient high = Function::at(first.y);
        batch.half[0][i] =
            pack_word<Element>(low.input * (score * g.x), high.input * (score * g.y));
        value = {low.value, high.value};
      }
      batch.scaled[i] = pack_word<Element>(score * value.x, score * value.y);
      rows.partial[i % 2] += i / 2 * 8 < groups.valid ? g.x * value.x + g.y * value.y : 0.0f;
    }
  }

  // dH and A' of one stage, columns `first` on of the tile.
  static __device__ __forceinline__ void store(const Task& task, uint32_t slab, int first) {
    const auto& [params, work, place] = task;
    const SlotExtent extent = {work.rows - place.row, params.columns - work.n - first};
    const auto row = static_cast<int32_t>(work.row_begin + place.row);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      WarpStore<Element>::rows(params.dh, {work.n + first, half, row}, extent, params.columns,
                               slab + half * kPartBytes);
    }
    WarpStore<Element>::rows(params.a_scaled, {work.n + first, 0, row}, extent, 0,
                             slab + kHalves * kPartBytes);
    arch::bulk_commit();
  }

  static __device__ void store_partials(const Task& task, const float (&partial)[2]) {
    const auto& [params, work, place] = task;
    float* out = static_cast<float*>(params.partials.data) + work.n / TileType::kN;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      float sum = partial[lower];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int row = Lane::row() + lower * 8;
      if (Lane::column() == 0 && place.row + row < work.rows) {
        out[(work.row_begin + place.row + row) * params.partials.stride] = sum;
      }
    }
  }
};

}  // namespace penstock::cuda
