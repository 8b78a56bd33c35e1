// SPDX-License-Identifier: Apache-2.0
//
// One output tile and its place in shared memory: kM x kN accumulators fed 64 k at a time through
// a ring of stages, each an A tile followed by a B tile, all 128-byte swizzled.
//
// Shared memory: stages (1024-byte aligned) | staging of the epilogue, one piece per consumer warp
// | full and empty barriers. One consumer warpgroup owns 64 rows of the tile.
#pragma once

#include "backends/cuda/arch/barrier.cuh"
#include "backends/cuda/arch/wgmma.cuh"

namespace penstock::cuda {

using arch::Major;

inline constexpr int kTileK = 64;             // 128 bytes of bf16 or fp16: one swizzled row
inline constexpr int kBlockBytes = 64 * 128;  // 64 rows of 128 bytes
inline constexpr int kSharedLimit = 227 * 1024;
inline constexpr int kWarpgroup = 128;

template <typename ElementType, int kTileM, int kTileN, Major kA, Major kB>
struct Tile {
  using Element = ElementType;
  static_assert(kTileM % 64 == 0 && kTileN % 64 == 0, "tiles are made of 64-wide blocks");
  static_assert(sizeof(Element) == 2, "a swizzled row of 128 bytes is 64 elements of 2 bytes");

  static constexpr int kM = kTileM;
  static constexpr int kN = kTileN;
  static constexpr Major kMajorA = kA;
  static constexpr Major kMajorB = kB;
  static constexpr int kConsumers = kM / 64;
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kBytesA = kM * 128;
  static constexpr int kBytesB = kN * 128;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kAccumulators = kN / 2;
};

// Position in the ring of stages; every role walks it in the same order.
template <int kStages>
struct RingState {
  int32_t stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Shared-memory addresses of one CTA.
template <typename TileType, int kStageCount>
struct Ring {
  static constexpr int kStages = kStageCount;
  using State = RingState<kStages>;

  uint32_t stages;
  uint32_t barriers;

  __device__ uint32_t a(int stage) const { return stages + stage * TileType::kStageBytes; }
  __device__ uint32_t b(int stage) const { return a(stage) + TileType::kBytesA; }
  __device__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ uint32_t empty(int stage) const { return barriers + (kStages + stage) * 8; }
};

}  // namespace penstock::cuda
