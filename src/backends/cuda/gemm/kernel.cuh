// SPDX-License-Identifier: Apache-2.0
//
// The one kernel of all grouped products: persistent, one producer warpgroup and one consumer
// warpgroup per 64 rows of the tile. A product is four types: Tile, Schedule, Producer, Epilogue.
//
// Every CTA walks its own list of tiles (Schedule); the producer runs ahead through the ring of
// stages, across tile boundaries; consumers multiply, then run the epilogue on their own rows.
#pragma once

#include "backends/cuda/gemm/multiply.cuh"

namespace penstock::cuda {

template <typename TileType, typename ScheduleType, typename ProducerType, typename EpilogueType>
struct Gemm {
  using Tile = TileType;
  using Schedule = ScheduleType;
  using Producer = ProducerType;
  using Epilogue = EpilogueType;

  static constexpr int kStagingBytes = Tile::kConsumerWarps * Epilogue::kWarpStagingBytes;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kAlignment = 1024;
  static constexpr int kStagesThatFit =
      (kSharedLimit - kAlignment - kStagingBytes - kBarrierBytes) / Tile::kStageBytes;
  static constexpr int kStages = kStagesThatFit < 8 ? kStagesThatFit : 8;
  static_assert(kStages >= 3, "a ring of fewer than three stages cannot hide its loads");
  static constexpr int kSharedBytes =
      kAlignment + kStages * Tile::kStageBytes + kStagingBytes + kBarrierBytes;
  static constexpr int kConsumerRegisters = Producer::kRegisters > 40 ? 224 : 232;

  using RingType = Ring<Tile, kStages>;

  struct Params {
    typename Producer::Params operands;
    typename Schedule::Params schedule;
    typename Epilogue::Params epilogue;
  };
};

template <typename G>
__device__ __forceinline__ void produce(const typename G::Params& params,
                                        const typename G::RingType& ring) {
  typename G::Schedule schedule(params.schedule);
  G::Producer::run(params.operands, schedule, ring);
}

template <typename G>
__device__ __forceinline__ void consume(const typename G::Params& params,
                                        const typename G::RingType& ring, uint8_t* staging) {
  using Main = Multiply<typename G::Tile, G::Producer::kFill, typename G::RingType>;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 - 4, 0);
  const int consumer = warp / 4;
  uint8_t* warp_staging = staging + warp * G::Epilogue::kWarpStagingBytes;
  typename G::Schedule schedule(params.schedule);
  typename G::RingType::State state;
  Work work;
  float sums[G::Tile::kAccumulators];
  while (schedule.next(work)) {
    if (G::Epilogue::rows_of(params.epilogue, work) <= consumer * 64) {
      Main::skip(ring, state, work.k_tiles);
      continue;
    }
    if constexpr (G::Schedule::kMayBeEmpty) {
      if (work.k_tiles == 0) {
        G::Epilogue::run_empty(params.epilogue, work, {warp_staging, warp * 16});
        continue;
      }
    }
    Main::run(sums, ring, state, consumer, work.k_tiles);
    G::Epilogue::run(params.epilogue, work, sums, {warp_staging, warp * 16});
  }
}

template <typename G>
__global__ void __launch_bounds__(G::Tile::kThreads, 1)
    grouped_gemm(const __grid_constant__ typename G::Params params) {
  extern __shared__ uint8_t shared[];
  uint8_t* base = shared + (G::kAlignment - arch::shared_address(shared) % G::kAlignment) %
                               G::kAlignment;
  uint8_t* staging = base + G::kStages * G::Tile::kStageBytes;
  const typename G::RingType ring{arch::shared_address(base),
                                  arch::shared_address(staging + G::kStagingBytes)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < G::kStages; ++stage) {
      arch::barrier_init(ring.full(stage), G::Producer::kArrivals);
      arch::barrier_init(ring.empty(stage), G::Tile::kConsumerWarps);
    }
    arch::fence_barrier_init();
  }
  __syncthreads();
  // One consumer warpgroup leaves every thread 255 registers: nothing to move then.
  if (threadIdx.x < kWarpgroup) {
    if constexpr (G::Tile::kConsumers > 1) arch::registers_decrease<G::Producer::kRegisters>();
    produce<G>(params, ring);
  } else {
    if constexpr (G::Tile::kConsumers > 1) arch::registers_increase<G::kConsumerRegisters>();
    consume<G>(params, ring, staging);
  }
}

}  // namespace penstock::cuda
