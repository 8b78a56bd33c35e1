// SPDX-License-Identifier: Apache-2.0
//
// One output tile and its place in shared memory: kM x kN accumulators fed 64 k at a time through
// a ring of stages, each an A tile followed by a B tile, all 128-byte swizzled.
//
// Shared memory: stages (1024-byte aligned) | full and empty barriers | staging of the epilogue,
// one piece per consumer warp.
//
// Two consumer warpgroups take the halves of every tile's rows. kCluster CTAs (1 or 2) next to each
// other work on tiles that read the same direct operand wherever they can, and each then fetches
// its part of it for both.
#pragma once

#include "backends/cuda/arch/barrier.cuh"
#include "backends/cuda/arch/wgmma.cuh"

namespace penstock::cuda {

using arch::Major;

inline constexpr int kTileK = 64;             // 128 bytes of bf16 or fp16: one swizzled row
inline constexpr int kBlockBytes = 64 * 128;  // 64 rows of 128 bytes
inline constexpr int kSharedLimit = 227 * 1024;
inline constexpr int kWarpgroup = 128;

template <typename ElementType, int kTileM, int kTileN, Major kA, Major kB, int kClusterSize>
struct Tile {
  using Element = ElementType;
  static_assert(kClusterSize == 1 || kClusterSize == 2, "CTAs share an operand in pairs");
  static_assert(kTileM % 64 == 0 && (kTileN % 64 == 0 || (kTileN == 32 && kB == Major::k)),
                "tiles are made of 64-wide blocks, of which K-major weights may fill half");
  static_assert(sizeof(Element) == 2, "a swizzled row of 128 bytes is 64 elements of 2 bytes");

  static constexpr int kM = kTileM;
  static constexpr int kN = kTileN;
  static constexpr Major kMajorA = kA;
  static constexpr Major kMajorB = kB;
  static constexpr int kCluster = kClusterSize;
  // Warpgroups, and the 64-row blocks of accumulators that each keeps: 128 registers a thread.
  static constexpr int kConsumers = kM == 64 ? 1 : 2;
  static constexpr int kBlocks = kM / 64 / kConsumers;
  static_assert(kBlocks >= 1 && kBlocks * kN <= 256, "accumulators are 128 registers at most");
  static constexpr int kConsumerWarps = kConsumers * 4;
  // Arrivals that hand a stage back: the warps that multiply it, in every CTA of the cluster.
  static constexpr int kReleases = kConsumerWarps * kCluster;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kBytesA = kM * 128;
  static constexpr int kBytesB = kN * 128;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kAccumulators = kN / 2;  // of one block, a thread
};

// Position in the ring of stages; every role walks it in the same order. One register: the stage,
// and in the sign bit the parity of the round.
template <int kStages>
class RingState {
 public:
  __device__ int32_t stage() const { return static_cast<int32_t>(position_ & 0xffu); }
  __device__ uint32_t parity() const { return position_ >> 31; }

  __device__ void advance() {
    ++position_;
    if (stage() == kStages) position_ = (position_ ^ 0x80000000u) - kStages;
  }

 private:
  uint32_t position_ = 0;
};

// Shared-memory addresses of one CTA.
template <typename TileType, int kStageCount>
struct Ring {
  static constexpr int kStages = kStageCount;
  using State = RingState<kStages>;

  uint32_t stages;

  __device__ uint32_t a(int stage) const { return stages + stage * TileType::kStageBytes; }
  __device__ uint32_t b(int stage) const { return a(stage) + TileType::kBytesA; }
  __device__ uint32_t full(int stage) const { return a(kStages) + stage * 8; }
  __device__ uint32_t empty(int stage) const { return a(kStages) + (kStages + stage) * 8; }
};

}  // namespace penstock::cuda
