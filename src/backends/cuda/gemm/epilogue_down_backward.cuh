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
  Rows partials;              // fp32, a column per n tile
  const float* scores;        // null: 1
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

  static __device__ void run(const Params& params, const Work& work, Sums& sums,
                             const WarpPlace& place) {
    if (work.rows <= place.row) return;
    const auto apply = [&](auto function) { columns(function, params, work, sums, place); };
    if constexpr (kGating == Gating::gated) {
      visit_gated(params.activation.kind, apply);
    } else {
      visit_plain(params.activation.kind, apply);
    }
  }

 private:
  // Scores and running partial sums of the lane's two rows.
  struct RowPair {
    float score[2];
    float partial[2];
  };

  template <typename Function>
  static __device__ void columns(Function function, const Params& params, const Work& work,
                                 const Sums& sums, const WarpPlace& place) {
    const int rows = work.rows - place.row;
    const int64_t first_row = work.row_begin + place.row;
    RowPair pair = {{score_of(params, first_row, Lane::row(), rows),
                     score_of(params, first_row, Lane::row() + 8, rows)},
                    {0.0f, 0.0f}};
    const Piece<Element> scaled{place.staging + kHalves * kPieceBytes};
    Element* a = static_cast<Element*>(params.a_scaled.data) + first_row * params.a_scaled.stride;
#pragma unroll
    for (int first = 0; first < TileType::kN; first += 64) {
      const int column = work.n + first;
      if (column >= params.columns) break;
      const int valid = params.columns - column;
      const Element* h = static_cast<const Element*>(params.h.data) + first_row * params.h.stride;
      Element* dh = static_cast<Element*>(params.dh.data) + first_row * params.dh.stride;
      for (int half = 0; half < kHalves; ++half) {
        Piece<Element>{place.staging + half * kPieceBytes}.load(
            h + half * params.columns + column, params.h.stride, rows, valid);
      }
      __syncwarp();
#pragma unroll
      for (int group = 0; group < 8; ++group) {
        if (group * 8 >= valid) break;
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          if (Lane::row() + lower * 8 >= rows) continue;
          const int at = 4 * (first / 8 + group) + 2 * lower;
          differentiate(function, params.activation, place, group, lower, {sums[at], sums[at + 1]},
                        pair);
        }
      }
      for (int half = 0; half < kHalves; ++half) {
        Piece<Element>{place.staging + half * kPieceBytes}.store(
            dh + half * params.columns + column, params.dh.stride, rows, valid);
      }
      scaled.store(a + column, params.a_scaled.stride, rows, valid);
    }
    if (params.partials.data != nullptr) store_partials(params, work, place, pair);
  }

  // Two neighbouring columns of one row: H in the pieces becomes dH, A' goes to the last piece.
  template <typename Function>
  static __device__ void differentiate(Function, const ActivationParams& activation,
                                       const WarpPlace& place, int group, int lower, float2 g,
                                       RowPair& pair) {
    const Piece<Element> first{place.staging};
    const Piece<Element> scaled{place.staging + kHalves * kPieceBytes};
    const float score = lower == 0 ? pair.score[0] : pair.score[1];
    const float2 h = Pair<Element>::unpack(first.pair(group, lower));
    float2 value;
    if constexpr (kGating == Gating::gated) {
      const Piece<Element> second{place.staging + kPieceBytes};
      const float2 up = Pair<Element>::unpack(second.pair(group, lower));
      const GatedGradient low = Function::at(h.x, up.x, activation);
      const GatedGradient high = Function::at(h.y, up.y, activation);
      first.pair(group, lower) =
          Pair<Element>::pack(low.gate * (score * g.x), high.gate * (score * g.y));
      second.pair(group, lower) =
          Pair<Element>::pack(low.up * (score * g.x), high.up * (score * g.y));
      value = {low.value, high.value};
    } else {
      const PlainGradient low = Function::at(h.x);
      const PlainGradient high = Function::at(h.y);
      first.pair(group, lower) =
          Pair<Element>::pack(low.input * (score * g.x), high.input * (score * g.y));
      value = {low.value, high.value};
    }
    scaled.pair(group, lower) = Pair<Element>::pack(score * value.x, score * value.y);
    const float sum = g.x * value.x + g.y * value.y;
    if (lower == 0) {
      pair.partial[0] += sum;
    } else {
      pair.partial[1] += sum;
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
