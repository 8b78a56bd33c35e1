// SPDX-License-Identifier: Apache-2.0
//
// How a consumer warp's 16 rows of results reach memory: 64 columns at a time through shared memory
// of its own, from where TMA copies them while the warp goes on. Two slots take turns, so a warp
// waits only for the copy before the last, and the last two of a tile run under the next tile's
// products.
//
// A slot is 16 rows of 128 bytes, swizzled as TMA's 128-byte mode has it.
#pragma once

#include "backends/cuda/arch/copy.cuh"
#include "backends/cuda/gemm/epilogue.cuh"

namespace penstock::cuda {

inline constexpr int kSlotRows = 16;
inline constexpr int kSlotBytes = kSlotRows * 128;

// Where the lane's row of ldmatrix and stmatrix lies in a slot for groups 0 and 1 of 8 columns.
// Groups g and g + 1, g even, are at this place with bits 4 to 6 turned over by g.
__device__ __forceinline__ uint32_t slot_lane_offset() {
  const uint32_t lane = threadIdx.x % 32;
  return lane % 16 * 128 + ((lane / 16) ^ (lane % 8)) * 16;
}

// A matrix of token rows: by TMA, and by rows at an expert's end, where what follows in memory is
// another expert's.
struct RowTarget {
  CUtensorMap map;  // (column, half, row), boxes of 64 columns x 16 rows
  Rows rows;        // null: not wanted
};

struct SlotExtent {
  int rows;
  int columns;
};

// The first rows and columns of a slot, by all lanes of the warp.
template <typename Element>
__device__ __forceinline__ void copy_slot_end(uint32_t slot, Element* out, int64_t stride,
                                              SlotExtent extent) {
  const int chunk = Lane::id() % 8;
  if (chunk * 8 >= extent.columns) return;
#pragma unroll 1
  for (int row = Lane::id() / 8; row < extent.rows; row += 4) {
    *reinterpret_cast<uint4*>(out + row * stride + chunk * 8) =
        arch::load_shared_16(slot + row * 128 + (chunk ^ (row & 7)) * 16);
  }
}

// All lanes of the warp call everything together.
template <typename Element>
class WarpStore {
 public:
  static constexpr int kBytes = 2 * kSlotBytes;

  __device__ explicit WarpStore(const uint8_t* staging)
      : slots_(arch::shared_address(staging)), lane_(slots_ + slot_lane_offset()) {}

  // Piece `index` of a tile, counted from 0: fills a slot with packed(group) of groups 0, 2, 4 and
  // 6 of 8 columns and has copy(slot) start its copy by one lane, or make it by all.
  template <typename Packed, typename Copy>
  __device__ __forceinline__ void piece(int index, Packed packed, Copy copy) const {
    const uint32_t slot = index % 2 * kSlotBytes;
    if (index == 0) {
      arch::bulk_wait_read<0>();  // an earlier tile's
    } else {
      arch::bulk_wait_read<1>();
    }
    __syncwarp();
#pragma unroll
    for (int group = 0; group < 8; group += 2) {
      const auto words = packed(group);
      arch::store_matrix((lane_ ^ (group * 16)) + slot, words.at);
    }
    arch::fence_proxy_async_shared();
    __syncwarp();
    copy(slots_ + slot);
    // Also where nothing was copied by TMA: slots are told apart by the count of groups.
    arch::bulk_commit();
  }

  // Copies to rows of `target` from `row` on, of which `extent` exist.
  static __device__ __forceinline__ void rows(const RowTarget& target, arch::Coordinates at,
                                              SlotExtent extent, int64_t half_stride,
                                              uint32_t slot) {
    if (extent.rows >= kSlotRows) {
      if (arch::elect_one()) arch::tma_store(slot, &target.map, at);
      return;
    }
    Element* out = static_cast<Element*>(target.rows.data) + at.c2 * target.rows.stride +
                   at.c1 * half_stride + at.c0;
    copy_slot_end(slot, out, target.rows.stride, extent);
  }

 private:
  uint32_t slots_;
  uint32_t lane_;
};

}  // namespace penstock::cuda
