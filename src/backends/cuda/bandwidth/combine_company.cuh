// SPDX-License-Identifier: Apache-2.0
//
// dX's combine as company of a product: dX_t = sum over the slots of t, in slot order, of dX~_row,
// by the last CTAs of the product's grid. Bits are combine_kernel's: each sum has the slots' order.
//
// A CTA has a multiprocessor to itself and must keep some 100 KB of reads in flight to use its
// share of memory. Bulk copies do that without registers: a warp sums kColumns columns of one token
// after the other, and its rows come a group of eight at a time into one half of its shared memory
// while it sums the other half.
#pragma once

#include "backends/cuda/arch/barrier.cuh"
#include "backends/cuda/arch/copy.cuh"
#include "backends/cuda/bandwidth/combine.cuh"

namespace penstock::cuda {

struct CompanyShape {
  static constexpr int kColumns = 512;  // of a row that one copy brings at most
  static constexpr int kGroup = 8;      // copies that one barrier counts
  static constexpr int kGroups = 2;     // of a warp in flight
  static constexpr int kSlotBytes = kColumns * 2;
  static constexpr int kWarpBytes = kGroups * kGroup * kSlotBytes;
  static constexpr int kBarrierBytes = kGroups * 8;
  static constexpr int kLaneVectors = kColumns / (32 * kVector);
};

// What one warp combines: the pieces (token, kColumns columns) first, first + step, ...
template <typename Element>
class CombiningWarp {
 public:
  struct Place {
    const uint8_t* memory;  // kWarpBytes
    uint32_t barriers;      // kGroups
    int64_t first;
    int64_t step;
  };

  __device__ CombiningWarp(const CombineParams& params, const Place& place)
      : params_(params),
        place_(place),
        segments_((params.vectors * kVector + Shape::kColumns - 1) / Shape::kColumns),
        pieces_(params.num_tokens * segments_),
        ahead_{place.first, lane()},
        here_{place.first, 0} {}

  __device__ void run() {
    if (lane() == 0) {
      for (int group = 0; group < Shape::kGroups; ++group) arch::barrier_init(barrier(group), 1);
      arch::fence_barrier_init();
    }
    __syncwarp();
    Copy copies[Shape::kGroups];
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      copies[group] = look_up();
      start(group, copies[group]);
    }
    Copy next = look_up();
    for (uint32_t parity = 0; here_.piece < pieces_; parity ^= 1) {
#pragma unroll
      for (int group = 0; group < Shape::kGroups; ++group) {
        arch::barrier_wait(barrier(group), parity);
        add(group, copies[group]);
        __syncwarp();
        arch::fence_proxy_async_shared();  // reads of the slots before the copies over them
        copies[group] = next;
        start(group, next);
        next = look_up();
      }
    }
  }

 private:
  using Shape = CompanyShape;

  // A row's part on its way; no bytes: the slot has no row, or there is no such slot.
  struct Copy {
    const Element* source = nullptr;
    uint32_t bytes = 0;
  };
  // A slot of a piece's token.
  struct Cursor {
    int64_t piece;
    int32_t choice;
  };

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ uint32_t barrier(int group) const { return place_.barriers + group * 8; }
  __device__ const uint8_t* slot(int group, int index) const {
    return place_.memory + (group * Shape::kGroup + index) * Shape::kSlotBytes;
  }
  __device__ int32_t column_of(int64_t piece) const {
    return static_cast<int32_t>(piece % segments_) * Shape::kColumns;
  }

  // The copy that this lane, one of the first eight, makes for the next group.
  __device__ Copy look_up() {
    Copy copy;
    if (lane() >= Shape::kGroup) return copy;
    for (; ahead_.choice >= params_.top_k; ahead_.choice -= params_.top_k) {
      ahead_.piece += place_.step;
    }
    if (ahead_.piece < pieces_) {
      const int64_t token = ahead_.piece / segments_;
      const int32_t row = params_.slot_to_row[token * params_.top_k + ahead_.choice];
      if (row >= 0) {
        const int32_t column = column_of(ahead_.piece);
        copy.source = static_cast<const Element*>(params_.rows) + row * params_.row_stride + column;
        copy.bytes = min(params_.vectors * kVector - column, Shape::kColumns) * 2;
      }
    }
    ahead_.choice += Shape::kGroup;
    return copy;
  }

  __device__ void start(int group, const Copy& copy) const {
    const uint32_t bytes = __reduce_add_sync(~0u, copy.bytes);
    if (lane() == 0) arch::barrier_arrive_expect(barrier(group), bytes);
    __syncwarp();
    if (copy.bytes == 0) return;
    arch::bulk_load(arch::shared_address(slot(group, lane())), copy.source, copy.bytes,
                    barrier(group));
  }

  // The rows of a group that has arrived, in order; a token's last one stores its sum.
  __device__ void add(int group, const Copy& copies) {
#pragma unroll
    for (int index = 0; index < Shape::kGroup; ++index) {
      if (here_.piece >= pieces_) return;
      if (__shfl_sync(~0u, copies.bytes, index) != 0) {
        const auto* row = reinterpret_cast<const uint4*>(slot(group, index));
#pragma unroll
        for (int vector = 0; vector < Shape::kLaneVectors; ++vector) {
          const Float8 value = widen<Element>(row[vector * 32 + lane()]);
#pragma unroll
          for (int c = 0; c < kVector; ++c) sums_[vector].v[c] += value.v[c];
        }
      }
      if (++here_.choice < params_.top_k) continue;
      store();
      here_ = {here_.piece + place_.step, 0};
    }
  }

  __device__ void store() {
    const int64_t token = here_.piece / segments_;
    Element* row = static_cast<Element*>(params_.output) + token * params_.output_stride;
#pragma unroll
    for (int vector = 0; vector < Shape::kLaneVectors; ++vector) {
      const int32_t column = column_of(here_.piece) + (vector * 32 + lane()) * kVector;
      if (column < params_.vectors * kVector) {
        *reinterpret_cast<uint4*>(row + column) = narrow<Element>(sums_[vector]);
      }
      sums_[vector] = {};
    }
  }

  const CombineParams& params_;
  const Place place_;
  const int32_t segments_;  // of a row
  const int64_t pieces_;
  Cursor ahead_;  // of this lane's next copy
  Cursor here_;   // of the next row to add, the same in every lane
  Float8 sums_[Shape::kLaneVectors] = {};
};

// For tokens of top_k slots each, without scores.
template <typename TileType>
struct CombineCompany {
  static constexpr bool kPresent = true;
  static constexpr int kWarps = TileType::kThreads / 32;
  static constexpr int kSharedBytes =
      kWarps * (CompanyShape::kWarpBytes + CompanyShape::kBarrierBytes);

  struct Params {
    CombineParams combine;
    int32_t ctas;  // 0: none of the grid
  };

  static __device__ bool owns_this_cta(const Params& params) {
    return static_cast<int32_t>(blockIdx.x) >= static_cast<int32_t>(gridDim.x) - params.ctas;
  }

  static __device__ void run(const Params& params, uint8_t* shared) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int cta = static_cast<int>(blockIdx.x + params.ctas - gridDim.x);
    const uint32_t barriers = arch::shared_address(shared + kWarps * CompanyShape::kWarpBytes) +
                              warp * CompanyShape::kBarrierBytes;
    CombiningWarp<typename TileType::Element>(
        params.combine, {shared + warp * CompanyShape::kWarpBytes, barriers,
                         int64_t{cta} * kWarps + warp, int64_t{params.ctas} * kWarps})
        .run();
  }
};

}  // namespace penstock::cuda
