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
#include "backends/cuda/gemm/warp_store.cuh"

namespace penstock::cuda {

enum class Gating : uint8_t { gated, plain };

struct UpEpilogueParams {
  RowTarget h;
  RowTarget a;
  Bias bias[2];
  ActivationParams activation;
  int32_t columns;  // n
};

template <typename TileType, Gating kGating>
struct UpEpilogue {
  using Element = typename TileType::Element;
  using Params = UpEpilogueParams;
  using Store = WarpStore<Element>;
  static constexpr int kWarpStagingBytes = Store::kBytes;
  static constexpr int kHalves = kGating == Gating::gated ? 2 : 1;
  static constexpr int kColumns = TileType::kN / kHalves;  // intermediate columns of a tile
  static constexpr int kUpGroups = kColumns / 8;           // where the up half starts
  using Sums = float[TileType::kAccumulators];

  using Operand = NoOperand;

  static __device__ int rows_of(const Params&, const Work& work) { return work.rows; }

  static __device__ void run(const Params& params, const Work& work, Sums& sums,
                             const WarpPlace& place) {
    if (work.rows <= place.row) return;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      add_bias<Element, kColumns / 8>(sums, half * kUpGroups, params.bias[half], work.expert,
                                      work.n, params.columns);
    }
    const auto apply = [&](auto function) {
#pragma unroll
      for (int first = 0; first < kColumns; first += 64) {
        if (work.n + first >= params.columns) break;
        store_columns(function, params, work, sums, place, first);
      }
    };
    if constexpr (kGating == Gating::gated) {
      visit_gated(params.activation.kind, apply);
    } else {
      visit_plain(params.activation.kind, apply);
    }
  }

 private:
  // H of 64 columns, a half each.
  struct Rounded {
    PackedGroups half[kHalves][4];
  };

  // H and A of 64 columns: A from the rounded H while that is in registers.
  template <typename Function>
  static __device__ __forceinline__ void store_columns(Function function, const Params& params,
                                                       const Work& work, const Sums& sums,
                                                       const WarpPlace& place, int first) {
    constexpr int kPieces = kHalves + 1;
    const Store store(place.staging);
    const auto row = static_cast<int32_t>(work.row_begin + place.row);
    const SlotExtent extent = {work.rows - place.row, params.columns - work.n - first};
    const int piece = first / 64 * kPieces;
    Rounded h;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      store.piece(
          piece + half,
          [&](int group) {
            h.half[half][group / 2] =
                packed_groups<Element>(sums, half * kUpGroups + first / 8 + group);
            return h.half[half][group / 2];
          },
          [&](uint32_t slot) {
            if (params.h.rows.data == nullptr) return;
            Store::rows(params.h, {work.n + first, half, row}, extent, params.columns, slot);
          });
    }
    store.piece(
        piece + kHalves,
        [&](int group) { return activated(function, params.activation, h, group / 2); },
        [&](uint32_t slot) {
          if (params.a.rows.data == nullptr) return;
          Store::rows(params.a, {work.n + first, 0, row}, extent, 0, slot);
        });
  }

  // A of the two groups of 8 columns at `at`.
  template <typename Function>
  static __device__ __forceinline__ PackedGroups activated(Function,
                                                           const ActivationParams& activation,
                                                           const Rounded& h, int at) {
    PackedGroups packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 first = unpack_word<Element>(h.half[0][at].at[i]);
      if constexpr (kGating == Gating::gated) {
        const float2 up = unpack_word<Element>(h.half[1][at].at[i]);
        packed.at[i] = pack_word<Element>(Function::at(first.x, up.x, activation).value,
                                          Function::at(first.y, up.y, activation).value);
      } else {
        packed.at[i] = pack_word<Element>(Function::at(first.x).value, Function::at(first.y).value);
      }
    }
    return packed;
  }
};

}  // namespace penstock::cuda
