// SPDX-License-Identifier: Apache-2.0
//
// The consumer warpgroup's main loop: 64 x kN accumulators from k_tiles stages of the ring.
//
// One stage's wgmmas stay in flight while the next is issued; a stage is handed back, one arrival
// per warp, once the wgmmas that read it are done. A warpgroup whose rows do not exist only keeps
// the ring turning.
#pragma once

#include "backends/cuda/arch/copy.cuh"
#include "backends/cuda/gemm/load_rows.cuh"

namespace penstock::cuda {

template <typename TileType, Fill kFill, typename RingType>
struct Multiply {
  using State = typename RingType::State;
  using Instruction = arch::Wgmma<typename TileType::Element, TileType::kN, TileType::kMajorA,
                                  TileType::kMajorB>;

  static __device__ __forceinline__ void run(float (&sums)[TileType::kAccumulators],
                                             const RingType& ring, State& state, int consumer,
                                             int k_tiles) {
    int previous = 0;
#pragma unroll 1
    for (int tile = 0; tile < k_tiles; ++tile) {
      wait_full(ring, state);
      arch::fence_accumulators(sums);
      arch::wgmma_fence();
      issue(sums, ring, state.stage, consumer, tile);
      arch::wgmma_commit();
      arch::wgmma_wait<1>();
      if (tile > 0) release(ring, previous);
      previous = state.stage;
      state.advance();
    }
    arch::wgmma_wait<0>();
    arch::fence_accumulators(sums);
    release(ring, previous);
  }

  static __device__ void skip(const RingType& ring, State& state, int k_tiles) {
    for (int tile = 0; tile < k_tiles; ++tile) {
      wait_full(ring, state);
      release(ring, state.stage);
      state.advance();
    }
  }

 private:
  static __device__ __forceinline__ void wait_full(const RingType& ring, const State& state) {
    arch::barrier_wait(ring.full(state.stage), state.parity);
    if constexpr (kFill == Fill::mixed) arch::fence_proxy_async_shared();
  }

  static __device__ __forceinline__ void release(const RingType& ring, int stage) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arch::barrier_arrive(ring.empty(stage));
  }

  static __device__ __forceinline__ void issue(float (&sums)[TileType::kAccumulators],
                                               const RingType& ring, int stage, int consumer,
                                               int tile) {
    const uint64_t a = arch::matrix_descriptor<TileType::kMajorA>(
        ring.a(stage) + consumer * kBlockBytes, kBlockBytes);
    const uint64_t b =
        arch::matrix_descriptor<TileType::kMajorB>(ring.b(stage), kBlockBytes);
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
      Instruction::run(sums, {a + step * arch::kDescriptorStepK16<TileType::kMajorA>,
                              b + step * arch::kDescriptorStepK16<TileType::kMajorB>,
                              (tile > 0 || step > 0) ? 1 : 0});
    }
  }
};

}  // namespace penstock::cuda
