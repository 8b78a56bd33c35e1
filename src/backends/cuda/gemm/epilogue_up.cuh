// SPDX-License-Identifier: Apache-2.0
//
// Up-projection: H_r = C_r + b1_e, rounded once; A_r = act(H_r as rounded), rounded once.
//
// Loads the bias where there is one; stores H (columns [gate | up] whatever the weights' layout)
// and A, each only if wanted. Gated: accumulator columns j and j + kN / 2 are gate and up of the
// same intermediate column. A is made from the rounded H, so recomputing it in the backward pass
// from the stored H gives the same bits.
#pragma once

#include "backends/cuda/gemm/activation.cuh"
#include "backends/cuda/gemm/epilogue.cuh"

namespace penstock::cuda {

enum class Gating : uint8_t { gated, plain };

struct UpEpilogueParams {
  Rows h;
  Rows a;
  Bias bias[2];
  ActivationParams activation;
  int32_t columns;  // n
};

template <typename TileType, Gating kGating>
struct UpEpilogue {
  using Element = typename TileType::Element;
  using Params = UpEpilogueParams;
  static constexpr int kWarpStagingBytes = kPieceBytes;
  static constexpr int kHalves = kGating == Gating::gated ? 2 : 1;
  static constexpr int kColumns = TileType::kN / kHalves;  // intermediate columns of a tile
  static constexpr int kUpGroups = kColumns / 8;           // where the up half starts
  using Sums = float[TileType::kAccumulators];

  static __device__ int rows_of(const Params&, const Work& work) { return work.rows; }

  static __device__ void run(const Params& params, const Work& work, Sums& sums,
                             const WarpPlace& place) {
    const int rows = work.rows - place.row;
    if (rows <= 0) return;
    const Piece<Element> piece{place.staging};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) round_and_store(params, work, sums, place, half);
    if (params.a.data == nullptr) return;
    Element* a = row(params.a, work, place);
    const auto activate = [&](auto function) {
#pragma unroll
      for (int first = 0; first < kColumns; first += 64) {
        const int column = work.n + first;
        if (column >= params.columns) break;
#pragma unroll
        for (int group = 0; group < 8; ++group) {
          piece.put(group, value_of(function, params.activation, sums, first / 8 + group));
        }
        piece.store(a + column, params.a.stride, rows, params.columns - column);
      }
    };
    if constexpr (kGating == Gating::gated) {
      visit_gated(params.activation.kind, activate);
    } else {
      visit_plain(params.activation.kind, activate);
    }
  }

 private:
  static __device__ Element* row(const Rows& matrix, const Work& work, const WarpPlace& place) {
    return static_cast<Element*>(matrix.data) + (work.row_begin + place.row) * matrix.stride;
  }

  // H of one half: adds the bias, rounds the accumulators in place, stores.
  static __device__ void round_and_store(const Params& params, const Work& work, Sums& sums,
                                         const WarpPlace& place, int half) {
    const Piece<Element> piece{place.staging};
#pragma unroll
    for (int first = 0; first < kColumns; first += 64) {
      const int column = work.n + first;
      if (column >= params.columns) break;
#pragma unroll
      for (int group = 0; group < 8; ++group) {
        const int at = half * kUpGroups + first / 8 + group;
        const float4 v = with_bias(
            group_of(sums, at),
            bias_pair<Element>(params.bias[half], work.expert,
                               column + group * 8 + Lane::column(), params.columns));
        const auto upper = Pair<Element>::pack(v.x, v.y);
        const auto lower = Pair<Element>::pack(v.z, v.w);
        piece.pair(group, 0) = upper;
        piece.pair(group, 1) = lower;
        const float2 rounded_upper = Pair<Element>::unpack(upper);
        const float2 rounded_lower = Pair<Element>::unpack(lower);
        sums[4 * at] = rounded_upper.x;
        sums[4 * at + 1] = rounded_upper.y;
        sums[4 * at + 2] = rounded_lower.x;
        sums[4 * at + 3] = rounded_lower.y;
      }
      if (params.h.data != nullptr) {
        piece.store(row(params.h, work, place) + half * params.columns + column, params.h.stride,
                    work.rows - place.row, params.columns - column);
      }
    }
  }

  template <typename Function>
  static __device__ float4 value_of(Function, const ActivationParams& activation, const Sums& sums,
                                    int group) {
    const float4 g = group_of(sums, group);
    if constexpr (kGating == Gating::gated) {
      const float4 u = group_of(sums, kUpGroups + group);
      return {Function::at(g.x, u.x, activation).value, Function::at(g.y, u.y, activation).value,
              Function::at(g.z, u.z, activation).value, Function::at(g.w, u.w, activation).value};
    } else {
      return {Function::at(g.x).value, Function::at(g.y).value, Function::at(g.z).value,
              Function::at(g.w).value};
    }
  }
};

}  // namespace penstock::cuda
