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

#include <type_traits>

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

  static constexpr int kChunks = TileType::kN / 64;
  // H of the warp's rows in 64 columns.
  struct Chunk {
    typename Piece<Element>::Vectors half[kHalves];
  };
  // Of a warpgroup with one block, H is loaded while the products are formed: it stays in
  // registers, of which 64 accumulators leave enough. With two blocks there are too few; then the
  // other warpgroup's products hide the loads.
  struct AllChunks {
    Chunk at[kChunks];
  };
  static constexpr bool kEarly = TileType::kBlocks == 1;
  using Early = std::conditional_t<kEarly, AllChunks, NoPrefetch>;

  static __device__ __forceinline__ Early prefetch(const Params& params, const Work& work,
                                                   const WarpPlace& place) {
    Early early;
    if constexpr (kEarly) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        early.at[chunk] = load(params, work, place, chunk * 64);
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
  static __device__ __forceinline__ Chunk load(const Params& params, const Work& work,
                                               const WarpPlace& place, int first) {
    Chunk chunk;
    const Element* h = static_cast<const Element*>(params.h.data) +
                       (work.row_begin + place.row) * params.h.stride + work.n + first;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      chunk.half[half] =
          Piece<Element>::load(h + half * params.columns, params.h.stride, work.rows - place.row,
                               params.columns - work.n - first);
    }
    return chunk;
  }

  // Pieces: H and then dH by half, and A'.
  static __device__ __forceinline__ Piece<Element> piece_of(const WarpPlace& place, int index) {
    return {place.staging + index * kPieceBytes};
  }

  // What is worked on at a time: two groups of 8 columns. All of it is read before any of it is
  // written over, and no branch divides it: its eight elements a lane have long chains, which must
  // overlap. More elements do not fit in the registers.
  struct Batch {
    typename Piece<Element>::Packed half[kHalves];
    typename Piece<Element>::Packed scaled;  // A', once it is known
  };

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
    const int64_t first_row = work.row_begin + place.row;
    RowPair pair = {{score_of(params, first_row, Lane::row(), rows),
                     score_of(params, first_row, Lane::row() + 8, rows)},
                    {0.0f, 0.0f}};
    Element* a = static_cast<Element*>(params.a_scaled.data) + first_row * params.a_scaled.stride;
#pragma unroll
    for (int first = 0; first < TileType::kN; first += 64) {
      const int column = work.n + first;
      if (column >= params.columns) break;
      const int valid = params.columns - column;
      Element* dh = static_cast<Element*>(params.dh.data) + first_row * params.dh.stride;
      const Chunk chunk = [&] {
        if constexpr (kEarly) {
          return early.at[first / 64];
        } else {
          return load(params, work, place, first);
        }
      }();
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        piece_of(place, half).put(chunk.half[half]);
      }
      __syncwarp();
#pragma unroll
      for (int group = 0; group < 8; group += 2) {
        Batch batch;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          batch.half[half] = piece_of(place, half).get_two(group);
        }
        differentiate(function, params.activation, sums, {first / 8 + group, valid - group * 8},
                      batch, pair);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          piece_of(place, half).put_two(group, batch.half[half]);
        }
        piece_of(place, kHalves).put_two(group, batch.scaled);
      }
      for (int half = 0; half < kHalves; ++half) {
        piece_of(place, half)
            .store(dh + half * params.columns + column, params.dh.stride, rows, valid);
      }
      piece_of(place, kHalves).store(a + column, params.a_scaled.stride, rows, valid);
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
  static __device__ __forceinline__ void differentiate(Function, const ActivationParams& activation,
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
        batch.half[0].at[i] =
            pack_word<Element>(low.gate * (score * g.x), high.gate * (score * g.y));
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
