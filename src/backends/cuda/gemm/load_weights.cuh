// SPDX-License-Identifier: Apache-2.0
//
// Brings the weights' tile (the B operand of the row products) to shared memory by TMA.
//
// One tensor map per half: a gated up-projection puts 128 gate rows and then 128 up rows into the
// same tile ([gate rows | up rows], so column j and j + kN / 2 of the accumulators sit in the same
// thread); a product that reduces over [gate | up] takes its map by the half that k is in. Two maps
// carry both gate layouts and separate gate and up tensors alike, and check n per half.
//
// Two CTAs of a cluster that need the same tile fetch half of it each and multicast it to both,
// which takes a third off what a CTA draws from L2 (32 KB instead of 48 KB a stage at 128 x 256).
#pragma once

#include "backends/cuda/arch/copy.cuh"
#include "backends/cuda/gemm/schedule.cuh"
#include "backends/cuda/gemm/tile.cuh"

namespace penstock::cuda {

struct WeightMaps {
  CUtensorMap half[2];
};

// Where in k a stage is.
struct StageK {
  int32_t half;
  int32_t k;  // inside the half
};

template <typename TileType, int kHalvesN>
struct LoadWeights {
  static constexpr int kBytes = TileType::kBytesB;
  static constexpr int kCluster = TileType::kCluster;
  static constexpr int kColumns = TileType::kN / kHalvesN;  // of one half in a tile
  // A CTA's part of them where its neighbour needs the same: rows of a tensor map's box.
  static constexpr int kPart = kColumns / kCluster;

  // Called by one thread.
  static __device__ void issue(const WeightMaps& maps, const Work& work, StageK at,
                               uint32_t destination, uint32_t barrier) {
#pragma unroll
    for (int half = 0; half < kHalvesN; ++half) {
      const CUtensorMap* map = &maps.half[kHalvesN == 2 ? half : at.half];
      const Target target = {destination + half * kColumns * 128, barrier};
      if (kCluster == 2 && work.direct == Direct::shared) {
        part(map, work, at, target, static_cast<int>(blockIdx.x % 2),
             [](auto... copy) { arch::tma_load_multicast(copy..., uint16_t{3}); });
      } else {
#pragma unroll
        for (int i = 0; i < kCluster; ++i) {
          part(map, work, at, target, i, [](auto... copy) { arch::tma_load(copy...); });
        }
      }
    }
  }

 private:
  struct Target {
    uint32_t address;  // of the half's rows in the stage
    uint32_t barrier;
  };

  template <typename Copy>
  static __device__ __forceinline__ void part(const CUtensorMap* map, const Work& work, StageK at,
                                              const Target& target, int index, Copy copy) {
    const int first = index * kPart;
    if constexpr (TileType::kMajorB == Major::k) {
      copy(target.address + first * 128, map, target.barrier,
           arch::Coordinates{at.k, work.n + first, work.expert});
    } else {
#pragma unroll
      for (int column = 0; column < kPart; column += 64) {
        copy(target.address + (first + column) / 64 * kBlockBytes, map, target.barrier,
             arch::Coordinates{work.n + first + column, at.k, work.expert});
      }
    }
  }
};

}  // namespace penstock::cuda
