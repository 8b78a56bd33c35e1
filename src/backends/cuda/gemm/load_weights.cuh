// SPDX-License-Identifier: Apache-2.0
//
// Brings the weights' tile (the B operand of the row products) to shared memory by TMA.
//
// One tensor map per half: a gated up-projection puts 128 gate rows and then 128 up rows into the
// same tile ([gate rows | up rows], so column j and j + kN / 2 of the accumulators sit in the same
// thread); a product that reduces over [gate | up] takes its map by the half that k is in. Two maps
// carry both gate layouts and separate gate and up tensors alike, and check n per half.
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
  static constexpr int kColumns = TileType::kN / kHalvesN;  // of one half in a tile

  // Called by one thread.
  static __device__ void issue(const WeightMaps& maps, const Work& work, StageK at,
                               uint32_t destination, uint32_t barrier) {
#pragma unroll
    for (int half = 0; half < kHalvesN; ++half) {
      const CUtensorMap* map = &maps.half[kHalvesN == 2 ? half : at.half];
      const uint32_t target = destination + half * kColumns * 128;
      if constexpr (TileType::kMajorB == Major::k) {
        arch::tma_load(target, map, barrier, {at.k, work.n, work.expert});
      } else {
#pragma unroll
        for (int block = 0; block < kColumns / 64; ++block) {
          arch::tma_load(target + block * kBlockBytes, map, barrier,
                         {work.n + block * 64, at.k, work.expert});
        }
      }
    }
  }
};

}  // namespace penstock::cuda
