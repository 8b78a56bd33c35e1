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

  using Operand = NoOperand;

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
        for (int group = 0; group < 8; group += 2) {
          piece.put_two(group, activated(function, params.activation, sums, first / 8 + group));
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
    add_bias<Element, kColumns / 8>(sums, half * kUpGroups, params.bias[half], work.expert, work.n,
                                    params.columns);
#pragma unroll
    for (int first = 0; first < kColumns; first += 64) {
      const int column = work.n + first;
      if (column >= params.columns) break;
#pragma unroll
      for (int group = 0; group < 8; group += 2) {
        const int at = half * kUpGroups + first / 8 + group;
        const auto packed = packed_groups<Element>(sums, at);
        piece.put_two(group, packed);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 rounded = unpack_word<Element>(packed.at[i]);
          sums[4 * at + 2 * i] = rounded.x;
          sums[4 * at + 2 * i + 1] = rounded.y;
        }
      }
      if (params.h.data != nullptr) {
        piece.store(row(params.h, work, place) + half * params.columns + column, params.h.stride,
                    work.rows - place.row, params.columns - column);
      }
    }
  }

  // A of groups `group` and the next.
  template <typename Function>
  static __device__ __forceinline__ typename Piece<Element>::Packed activated(
      Function, const ActivationParams& activation, const Sums& sums, int group) {
    typename Piece<Element>::Packed packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * group + 2 * i;
      if constexpr (kGating == Gating::gated) {
        const int up = at + 4 * kUpGroups;
        packed.at[i] =
            pack_word<Element>(Function::at(sums[at], sums[up], activation).value,
                               Function::at(sums[at + 1], sums[up + 1], activation).value);
      } else {
        packed.at[i] =
            pack_word<Element>(Function::at(sums[at]).value, Function::at(sums[at + 1]).value);
      }
    }
    return packed;
  }
};

}  // namespace penstock::cuda
