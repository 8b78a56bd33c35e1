// SPDX-License-Identifier: Apache-2.0
//
// One output tile and its place in shared memory: kM x kN accumulators fed 64 k at a time through
// a ring of stages, each an A tile followed by a B tile, all 128-byte swizzled.
//
// Shared memory: stages (1024-byte aligned) | staging of the epilogue, one piece per consumer warp
// | full and empty barriers.
//
// Turns says how two consumer warpgroups divide the work: `together` they take the halves of every
// tile's rows; `alternating` each takes every other tile whole, so that one's epilogue runs under
// the other's products. kCluster CTAs (1 or 2) next to each other work on tiles that read the same
// direct operand wherever they can, and each then fetches its part of it for both.
#pragma once

#include "backends/cuda/arch/barrier.cuh"
#include "backends/cuda/arch/wgmma.cuh"

namespace penstock::cuda {

using arch::Major;

inline constexpr int kTileK = 64;             // 128 bytes of bf16 or fp16: one swizzled row
inline constexpr int kBlockBytes = 64 * 128;  // 64 rows of 128 bytes
inline constexpr int kSharedLimit = 227 * 1024;
inline constexpr int kWarpgroup = 128;

enum class Turns : uint8_t { together, alternating };

template <Turns kTurnsValue, int kClusterSize>
struct Crew {
  static_assert(kClusterSize == 1 || kClusterSize == 2, "CTAs share an operand in pairs");
  static constexpr Turns kTurns = kTurnsValue;
  static constexpr int kCluster = kClusterSize;
};

template <typename ElementType, int kTileM, int kTileN, Major kA, Major kB, typename CrewType>
struct Tile {
  using Element = ElementType;
  static_assert(kTileM % 64 == 0 && kTileN % 64 == 0, "tiles are made of 64-wide blocks");
  static_assert(sizeof(Element) == 2, "a swizzled row of 128 bytes is 64 elements of 2 bytes");

  static constexpr int kM = kTileM;
  static constexpr int kN = kTileN;
  static constexpr Major kMajorA = kA;
  static constexpr Major kMajorB = kB;
  static constexpr Turns kTurns = CrewType::kTurns;
  static constexpr int kCluster = CrewType::kCluster;
  // Warpgroups, and the 64-row blocks of accumulators that each keeps: 128 registers a thread.
  static constexpr int kConsumers = kTurns == Turns::together && kM == 64 ? 1 : 2;
  static constexpr int kBlocks = kM / 64 / (kTurns == Turns::together ? kConsumers : 1);
  static_assert(kBlocks >= 1 && kBlocks * kN <= 256, "accumulators are 128 registers at most");
  static constexpr int kConsumerWarps = kConsumers * 4;
  // Arrivals that hand a stage back: the warps that multiply it, in every CTA of the cluster.
  static constexpr int kReleases = (kTurns == Turns::alternating ? 4 : kConsumerWarps) * kCluster;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kBytesA = kM * 128;
  static constexpr int kBytesB = kN * 128;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kAccumulators = kN / 2;  // of one block, a thread
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

  // Past the `count` stages of another warpgroup's tile.
  __device__ void advance(int32_t count) {
    const int32_t next = stage + count;
    parity ^= static_cast<uint32_t>(next / kStages) & 1u;
    stage = next % kStages;
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
