// SPDX-License-Identifier: Apache-2.0
//
// The consumer warpgroup's main loop: blocks of 64 x kN accumulators from k_tiles stages of the
// ring.
//
// One stage's wgmmas stay in flight while the next is issued; a stage is handed back, one arrival
// per warp, once the wgmmas that read it are done. A warpgroup whose rows do not exist only keeps
// the ring turning.
#pragma once

#include <type_traits>

#include "backends/cuda/arch/copy.cuh"
#include "backends/cuda/gemm/load_rows.cuh"

namespace penstock::cuda {

// The instructions, of 16 k each, that a tile's last stage needs: all, or the first few, where what
// stands behind them is zero.
struct AllSteps {};
struct FirstSteps {
  int32_t count;
};

// The stages of a tile. The last is not its only one where it needs the first steps alone.
template <typename LastSteps>
struct Depth {
  int32_t k_tiles;
  LastSteps last_steps;
};

template <typename TileType, Fill kFill, typename RingType>
struct Multiply {
  using State = typename RingType::State;
  using Instruction =
      arch::Wgmma<typename TileType::Element, TileType::kN, TileType::kMajorA, TileType::kMajorB>;
  // By block of 64 rows.
  using Sums = float[TileType::kBlocks][TileType::kAccumulators];

  // Sums of the first kLive of the warpgroup's blocks; meanwhile() is called under the last
  // products.
  template <int kLive, typename LastSteps, typename Meanwhile>
  static __device__ __forceinline__ void run(Sums& sums, const RingType& ring, State& state,
                                             int group, const Depth<LastSteps>& depth,
                                             Meanwhile meanwhile) {
    constexpr bool kCutsLast = std::is_same_v<LastSteps, FirstSteps>;
    const int first_block = group * TileType::kBlocks;
    const int whole = depth.k_tiles - (kCutsLast ? 1 : 0);
    int previous = 0;
#pragma unroll 1
    for (int tile = 0; tile < whole; ++tile) {
      wait_full(ring, state);
      fence<kLive>(sums);
      arch::wgmma_fence();
      issue<kLive>(sums, ring, state.stage(), first_block, tile);
      arch::wgmma_commit();
      arch::wgmma_wait<1>();
      if (tile > 0) release(ring, previous);
      previous = state.stage();
      state.advance();
    }
    if constexpr (kCutsLast) {
      wait_full(ring, state);
      fence<kLive>(sums);
      issue_first<kLive>(sums, ring, state.stage(), first_block, depth.last_steps.count);
      arch::wgmma_wait<1>();
      release(ring, previous);
      previous = state.stage();
      state.advance();
    }
    meanwhile();
    arch::wgmma_wait<0>();
    fence<kLive>(sums);
    release(ring, previous);
  }

  // Hands back `count` stages unread.
  static __device__ void skip(const RingType& ring, State& state, int count) {
    for (int i = 0; i < count; ++i) {
      wait_full(ring, state);
      release(ring, state.stage());
      state.advance();
    }
  }

  static __device__ __forceinline__ void wait_full(const RingType& ring, const State& state) {
    arch::barrier_wait(ring.full(state.stage()), state.parity());
    if constexpr (kFill == Fill::mixed) arch::fence_proxy_async_shared();
  }

  // Called by all lanes of a warp: it has read the stage.
  static __device__ __forceinline__ void release(const RingType& ring, int stage) {
    __syncwarp();
    const uint32_t lane = threadIdx.x % 32;
    if constexpr (TileType::kCluster == 1) {
      if (lane == 0) arch::barrier_arrive(ring.empty(stage));
    } else {
      // The neighbour's copies write here too, so it must know as well.
      if (lane < TileType::kCluster) arch::barrier_arrive_at(ring.empty(stage), lane);
    }
  }

 private:
  template <int kLive>
  static __device__ __forceinline__ void fence(Sums& sums) {
#pragma unroll
    for (int block = 0; block < kLive; ++block) arch::fence_accumulators(sums[block]);
  }

  template <int kLive>
  static __device__ __forceinline__ void issue(Sums& sums, const RingType& ring, int stage,
                                               int first_block, int tile) {
    const uint64_t b = arch::matrix_descriptor<TileType::kMajorB>(ring.b(stage), kBlockBytes);
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
#pragma unroll
      for (int block = 0; block < kLive; ++block) {
        const uint64_t a = arch::matrix_descriptor<TileType::kMajorA>(
            ring.a(stage) + (first_block + block) * kBlockBytes, kBlockBytes);
        Instruction::run(sums[block], {a + step * arch::kDescriptorStepK16<TileType::kMajorA>,
                                       b + step * arch::kDescriptorStepK16<TileType::kMajorB>,
                                       (tile > 0 || step > 0) ? 1 : 0});
      }
    }
  }

  // The first `steps`, one at least, of a stage that is not a tile's first. A group each: ptxas
  // orders all products of a kernel one after the other where it has to place the fences of such a
  // loop itself.
  template <int kLive>
  static __device__ __forceinline__ void issue_first(Sums& sums, const RingType& ring, int stage,
                                                     int first_block, int32_t steps) {
    const uint64_t b = arch::matrix_descriptor<TileType::kMajorB>(ring.b(stage), kBlockBytes);
    int step = 0;
#pragma unroll 1
    do {
      arch::wgmma_fence();
#pragma unroll
      for (int block = 0; block < kLive; ++block) {
        const uint64_t a = arch::matrix_descriptor<TileType::kMajorA>(
            ring.a(stage) + (first_block + block) * kBlockBytes, kBlockBytes);
        Instruction::run(sums[block], {a + step * arch::kDescriptorStepK16<TileType::kMajorA>,
                                       b + step * arch::kDescriptorStepK16<TileType::kMajorB>, 1});
      }
      arch::wgmma_commit();
    } while (++step < steps);
  }
};

}  // namespace penstock::cuda
