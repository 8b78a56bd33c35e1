// SPDX-License-Identifier: Apache-2.0
//
// Weight gradient: out_e (+)= C_e, in the weights' type or in fp32 (main gradients).
//
// Loads the accumulator where there is one; adds in fp32, rounds once, stores (by TMA where there
// is none and the type is the weights'). An expert without rows writes exact zeros, or leaves its
// accumulator untouched. Rows of C are columns of the left
// operand and belong to the half the tile lies in.
#pragma once

#include "backends/cuda/gemm/warp_store.cuh"

namespace penstock::cuda {

enum class Accumulate : uint8_t { no, yes };
enum class GradientType : uint8_t { element, fp32 };

// out of one half: (row, column) of expert e at data + e * expert_stride + row * stride + column.
struct GradientMatrix {
  CUtensorMap map;  // (column, row, expert), boxes of 64 x 16
  void* data;
  int64_t expert_stride;
  int64_t stride;
};

struct WeightGradientEpilogueParams {
  GradientMatrix out[2];
  int32_t rows;     // of one half
  int32_t columns;  // of one half
  Accumulate accumulate;
  GradientType type;
};

template <typename TileType>
struct WeightGradientEpilogue {
  using Element = typename TileType::Element;
  using Params = WeightGradientEpilogueParams;
  using Store = WarpStore<Element>;
  static constexpr int kWarpStagingBytes = Store::kBytes;
  static_assert(kPieceBytes <= kWarpStagingBytes, "fp32 is staged in the same place");
  using Sums = float[TileType::kAccumulators];

  using Operand = NoOperand;

  static __device__ int rows_of(const Params& params, const Work& work) {
    return params.rows - work.m;
  }

  static __device__ void run(const Params& params, const Work& work, Sums& sums,
                             const WarpPlace& place) {
    if (params.rows - work.m <= place.row) return;
    if (params.type == GradientType::fp32) {
      store<float>(params, work, sums, place);
    } else if (params.accumulate == Accumulate::yes) {
      store<Element>(params, work, sums, place);
    } else {
      store_rounded(params, work, sums, place);
    }
  }

  // An expert without rows.
  static __device__ void run_empty(const Params& params, const Work& work, const WarpPlace& place) {
    if (params.rows - work.m <= place.row || params.accumulate == Accumulate::yes) return;
    if (params.type == GradientType::fp32) {
      zero<float>(params, work, place);
    } else {
      zero<Element>(params, work, place);
    }
  }

 private:
  template <typename Out>
  static __device__ Out* first_row(const Params& params, const Work& work, const WarpPlace& place) {
    const GradientMatrix& matrix = params.out[work.m_half + work.n_half];
    return static_cast<Out*>(matrix.data) + work.expert * matrix.expert_stride +
           (work.m + place.row) * matrix.stride;
  }

  template <typename Out>
  static __device__ void zero(const Params& params, const Work& work, const WarpPlace& place) {
    constexpr int kVector = 16 / sizeof(Out);
    const int64_t stride = params.out[work.m_half + work.n_half].stride;
    Out* out = first_row<Out>(params, work, place) + work.n;
    const int rows = min(16, params.rows - work.m - place.row);
    const int columns = min(TileType::kN, params.columns - work.n);
    for (int row = 0; row < rows; ++row) {
      for (int column = Lane::id() * kVector; column < columns; column += 32 * kVector) {
        *reinterpret_cast<uint4*>(out + row * stride + column) = make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Nothing to add: rounded first. TMA drops what lies past the half's rows and columns.
  static __device__ void store_rounded(const Params& params, const Work& work, const Sums& sums,
                                       const WarpPlace& place) {
    const CUtensorMap* map = &params.out[work.m_half + work.n_half].map;
    const Store store(place.staging);
#pragma unroll
    for (int first = 0; first < TileType::kN; first += 64) {
      store.piece(
          first / 64, [&](int group) { return packed_groups<Element>(sums, first / 8 + group); },
          [&](uint32_t slot) {
            if (arch::elect_one()) {
              arch::tma_store(slot, map, {work.n + first, work.m + place.row, work.expert});
            }
          });
    }
  }

  // Staged in fp32, 32 columns at a time, so that an accumulator is added before the one rounding.
  template <typename Out>
  static __device__ void store(const Params& params, const Work& work, Sums& sums,
                               const WarpPlace& place) {
    const int64_t stride = params.out[work.m_half + work.n_half].stride;
    Out* out = first_row<Out>(params, work, place);
    const int rows = params.rows - work.m - place.row;
    arch::bulk_wait_read<0>();  // an earlier tile's copies may still read the staging
    __syncwarp();
    const WidePiece piece{place.staging};
#pragma unroll
    for (int first = 0; first < TileType::kN; first += 32) {
      const int column = work.n + first;
      if (column >= params.columns) break;
#pragma unroll
      for (int group = 0; group < 4; ++group) piece.put(group, group_of(sums, first / 8 + group));
      __syncwarp();
      piece.each_vector(rows, params.columns - column, [&](const float4& staged, int row, int at) {
        write(out + row * stride + column + at, staged, params.accumulate);
      });
      __syncwarp();
    }
  }

  static __device__ void write(float* out, float4 v, Accumulate accumulate) {
    float4* target = reinterpret_cast<float4*>(out);
    if (accumulate == Accumulate::yes) {
      const float4 old = *target;
      v = {old.x + v.x, old.y + v.y, old.z + v.z, old.w + v.w};
    }
    *target = v;
  }

  static __device__ void write(Element* out, float4 v, Accumulate accumulate) {
    using PairOf = Pair<Element>;
    struct alignas(8) Four {
      typename PairOf::Type low, high;
    };
    Four* target = reinterpret_cast<Four*>(out);
    if (accumulate == Accumulate::yes) {
      const Four old = *target;
      const float2 low = PairOf::unpack(old.low);
      const float2 high = PairOf::unpack(old.high);
      v = {low.x + v.x, low.y + v.y, high.x + v.z, high.y + v.w};
    }
    *target = {PairOf::pack(v.x, v.y), PairOf::pack(v.z, v.w)};
  }
};

}  // namespace penstock::cuda
