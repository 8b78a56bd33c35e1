// SPDX-License-Identifier: Apache-2.0
//
// Down-projection backward. With G the accumulators (dO_t W2_e, never stored), A = act(H) and s the
// row's score:
//   partials_{r, tile} = sum over the tile's columns of G A     (fp32, both unrounded)
//   dH_r = act'(H_r) (s G_r)        A'_r = s A_r                (each rounded once)
//
// Loads H and the score; stores dH ([gate | up], may be H itself: a warp reads its H before it
// writes) and A'; reduces the partial sums over a quad's columns in fixed order.
#pragma once

#include "backends/cuda/gemm/epilogue_up.cuh"

namespace penstock::cuda {

struct DownBackwardEpilogueParams {
  Rows h;
  Rows dh;
  Rows a_scaled;
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
  static constexpr int kWarpStagingBytes = (kHalves + 1) * kPieceBytes;
  using Sums = float[TileType::kAccumulators];

  static __device__ int rows_of(const Params&, const Work& work) { return work.rows; }

  // Scores of the lane's two rows, loaded while the products are formed, when the rest of what the
  // epilogue reads, H, is brought into L2: beside 128 accumulators there are no registers for it, and
  // shared memory is worth more as stages of the main loop.
  struct Early {
    float score[2];
  };

  static __device__ __forceinline__ Early prefetch(const Params& params, const Work& work,
                                                   const WarpPlace& place) {
    Early early;
    const int rows = work.rows - place.row;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      early.score[lower] =
          score_of(params, work.row_begin + place.row, Lane::row() + 8 * lower, rows);
    }
    // A lane takes one half of one row, a line of 128 bytes at a time.
    const int row = Lane::id() % 16;
    const int half = Lane::id() / 16;
    if (row < rows && half < kHalves) {
      const Element* line = row_of(params.h, work, place) + row * params.h.stride + work.n +
                            half * params.columns;
#pragma unroll
      for (int first = 0; first < TileType::kN; first += 64) {
        if (work.n + first < params.columns) arch::prefetch_l2(line + first);
      }
    }
    return early;
  }

  static __device__ void run(const Params& params, const Work& work, Sums& sums, const Early& early,
                             const WarpPlace& place) {
    if (work.rows <= place.row) return;
    const auto apply = [&](auto function) { columns(function, params, work, sums, early, place); };
    if constexpr (kGating == Gating::gated) {
      visit_gated(params.activation.kind, apply);
    } else {
      visit_plain(params.activation.kind, apply);
    }
  }

 private:
  static __device__ __forceinline__ Element* row_of(const Rows& matrix, const Work& work,
                                                    const WarpPlace& place) {
    return static_cast<Element*>(matrix.data) + (work.row_begin + place.row) * matrix.stride;
  }

  // Pieces: dH by half, then A'.
  static __device__ __forceinline__ Piece<Element> piece_of(const WarpPlace& place, int index) {
    return {place.staging + index * kPieceBytes};
  }

  // Pairs of H in the accumulator layout, of groups `group` and the next, in both halves. Columns
  // past the end and rows past the expert are read from the last that exists: they are neither
  // summed nor stored.
  using Packed = typename Piece<Element>::Packed;
  struct Batch {
    Packed half[kHalves];
    Packed scaled;  // A', once it is known
  };
  struct Source {
    const Element* h;
    int32_t row[2];  // offsets of the lane's rows: 32 bits, because registers are scarce here
    int32_t half;    // from one half to the other
    int32_t columns;  // of the tile that exist
  };
  static __device__ __forceinline__ Batch load(const Source& source, int group) {
    Batch batch;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = min((group + i / 2) * 8, source.columns - 8) + Lane::column();
        batch.half[half].at[i] = *reinterpret_cast<const uint32_t*>(
            source.h + (source.row[i % 2] + half * source.half + column));
      }
    }
    return batch;
  }

  // Scores and running partial sums of the lane's two rows.
  struct RowPair {
    float score[2];
    float partial[2];
  };

  template <typename Function>
  static __device__ __forceinline__ void columns(Function function, const Params& params,
                                                 const Work& work, const Sums& sums,
                                                 const Early& early, const WarpPlace& place) {
    const int rows = work.rows - place.row;
    RowPair pair = {{early.score[0], early.score[1]}, {0.0f, 0.0f}};
    const auto stride = static_cast<int32_t>(params.h.stride);
    const Source source = {
        row_of(params.h, work, place) + work.n,
        {min(Lane::row(), rows - 1) * stride, min(Lane::row() + 8, rows - 1) * stride},
        params.columns,
        min(params.columns - work.n, TileType::kN)};
    Batch batch = load(source, 0);
#pragma unroll
    for (int chunk = 0; chunk < TileType::kN / 64; ++chunk) {
      const int column = work.n + chunk * 64;
      if (column >= params.columns) break;
      const int valid = params.columns - column;
#pragma unroll
      for (int group = 0; group < 8; group += 2) {
        const int at = 8 * chunk + group;
        // One batch ahead of what is worked on.
        const Batch next = at + 2 < TileType::kN / 8 ? load(source, at + 2) : batch;
        differentiate(function, params.activation, sums, {at, valid - group * 8}, batch, pair);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          piece_of(place, half).put_two(group, batch.half[half]);
        }
        piece_of(place, kHalves).put_two(group, batch.scaled);
        batch = next;
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        piece_of(place, half)
            .store(row_of(params.dh, work, place) + half * params.columns + column,
                   params.dh.stride, rows, valid);
      }
      piece_of(place, kHalves)
          .store(row_of(params.a_scaled, work, place) + column, params.a_scaled.stride, rows,
                 valid);
    }
    if (params.partials.data != nullptr) store_partials(params, work, place, pair);
  }

  // Two groups of 8 columns: which, and how many of their columns exist.
  struct Groups2 {
    int first;
    int valid;
  };

  // H of the batch becomes dH, A' its scaled words, <G, A> joins the partial sums. No branch: eight
  // elements a lane have long chains, which must overlap.
  template <typename Function>
  static __device__ __forceinline__ void differentiate(Function,
                                                       const ActivationParams& activation,
                                                       const Sums& sums, const Groups2& groups,
                                                       Batch& batch, RowPair& pair) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * groups.first + 2 * i;
      const int row = i % 2;
      const float score = pair.score[row];
      const float2 g = {sums[at], sums[at + 1]};
      const float2 first = unpack_word<Element>(batch.half[0].at[i]);
      float2 value;
      if constexpr (kGating == Gating::gated) {
        const float2 up = unpack_word<Element>(batch.half[1].at[i]);
        const GatedGradient low = Function::at(first.x, up.x, activation);
        const GatedGradient high = Function::at(first.y, up.y, activation);
        batch.half[0].at[i] = pack_word<Element>(low.gate * (score * g.x), high.gate * (score * g.y));
        batch.half[1].at[i] = pack_word<Element>(low.up * (score * g.x), high.up * (score * g.y));
        value = {low.value, high.value};
      } else {
        const PlainGradient low = Function::at(first.x);
        const PlainGradient high = Function::at(first.y);
        batch.half[0].at[i] =
            pack_word<Element>(low.input * (score * g.x), high.input * (score * g.y));
        value = {low.value, high.value};
      }
      batch.scaled.at[i] = pack_word<Element>(score * value.x, score * value.y);
      pair.partial[row] += i / 2 * 8 < groups.valid ? g.x * value.x + g.y * value.y : 0.0f;
    }
  }

  static __device__ float score_of(const Params& params, int64_t first_row, int row, int rows) {
    if (row >= rows || params.scores == nullptr) return 1.0f;
    const int64_t at = first_row + row;
    return params.scores[params.row_to_slot == nullptr ? at : params.row_to_slot[at]];
  }

  static __device__ void store_partials(const Params& params, const Work& work,
                                        const WarpPlace& place, RowPair& pair) {
    float* out = static_cast<float*>(params.partials.data) + work.n / TileType::kN;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      float sum = pair.partial[lower];
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
