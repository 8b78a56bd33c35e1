// SPDX-License-Identifier: Apache-2.0
//
// The one kernel of all grouped products: persistent, one producer warpgroup and one or two
// consumer warpgroups. A product is four types: Tile, Schedule, Producer, Epilogue.
//
// Every CTA walks its own list of tiles (Schedule); the producer runs ahead through the ring of
// stages, across tile boundaries; consumers start what the epilogue will need from
// memory, multiply, then run the epilogue on their own rows.
#pragma once

#include "backends/cuda/arch/launch.cuh"
#include "backends/cuda/gemm/epilogue.cuh"
#include "backends/cuda/gemm/multiply.cuh"

namespace penstock::cuda {

// What the last CTAs of a grid do instead of tiles: nothing, unless a product takes something
// along.
struct NoCompany {
  static constexpr bool kPresent = false;
  struct Params {};
};

template <typename TileType, typename ScheduleType, typename ProducerType, typename EpilogueType,
          typename CompanyType = NoCompany>
struct Gemm {
  using Tile = TileType;
  using Schedule = ScheduleType;
  using Producer = ProducerType;
  using Epilogue = EpilogueType;
  using Company = CompanyType;

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
    typename Company::Params company;
  };
};

template <typename G>
__device__ __forceinline__ void produce(const typename G::Params& params,
                                        const typename G::RingType& ring) {
  typename G::Schedule schedule(params.schedule);
  G::Producer::run(params.operands, schedule, ring);
}

// One consumer warp's share of a kernel: which tiles and which rows of them are its own.
struct Consumer {
  int group;  // warpgroup
  int warp;   // inside it
  uint8_t* staging;
};

// The products of one tile and its epilogue, block by block.
template <typename G>
__device__ __forceinline__ void consume_tile(const typename G::Params& params,
                                             const typename G::RingType& ring,
                                             typename G::RingType::State& state, const Work& work,
                                             const Consumer& self) {
  using TileType = typename G::Tile;
  using Epilogue = typename G::Epilogue;
  using Main = Multiply<TileType, G::Producer::kFill, typename G::RingType>;
  const int first_block = TileType::kTurns == Turns::together ? self.group * TileType::kBlocks : 0;
  const int rows = Epilogue::rows_of(params.epilogue, work) - first_block * 64;
  if (rows <= 0) return Main::skip(ring, state, self.group, work.k_tiles);
  const auto place = [&](int block) {
    return WarpPlace{self.staging, (first_block + block) * 64 + self.warp * 16};
  };
  if constexpr (G::Schedule::kMayBeEmpty) {
    if (work.k_tiles == 0) {
      for (int block = 0; block < TileType::kBlocks; ++block) {
        Epilogue::run_empty(params.epilogue, work, place(block));
      }
      return;
    }
  }
  typename Main::Sums sums;
  typename Epilogue::Early early[TileType::kBlocks];
#pragma unroll
  for (int block = 0; block < TileType::kBlocks; ++block) {
    early[block] = Epilogue::prefetch(params.epilogue, work, place(block));
  }
  if (TileType::kBlocks == 1 || rows <= 64) {
    Main::template run<1>(sums, ring, state, self.group, work.k_tiles);
  } else {
    Main::template run<TileType::kBlocks>(sums, ring, state, self.group, work.k_tiles);
  }
#pragma unroll
  for (int block = 0; block < TileType::kBlocks; ++block) {
    if (block * 64 >= rows) break;
    Epilogue::run(params.epilogue, work, sums[block], early[block], place(block));
  }
}

template <typename G>
__device__ __forceinline__ void consume(const typename G::Params& params,
                                        const typename G::RingType& ring, uint8_t* staging) {
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 - 4, 0);
  const Consumer self = {warp / 4, warp % 4, staging + warp * G::Epilogue::kWarpStagingBytes};
  typename G::Schedule schedule(params.schedule);
  typename G::RingType::State state;
  Work work;
  Turn<G::Tile::kTurns>::begin(self.group);
  for (int turn = 0; schedule.next(work); turn ^= 1) {
    if (G::Tile::kTurns == Turns::alternating && turn != self.group) {
      state.advance(work.k_tiles);
    } else {
      consume_tile<G>(params, ring, state, work, self);
    }
  }
}

template <typename G>
__global__ void __launch_bounds__(G::Tile::kThreads, 1)
    grouped_gemm(const __grid_constant__ typename G::Params params) {
  extern __shared__ uint8_t shared[];
  uint8_t* base =
      shared + (G::kAlignment - arch::shared_address(shared) % G::kAlignment) % G::kAlignment;
  uint8_t* staging = base + G::kStages * G::Tile::kStageBytes;
  const typename G::RingType ring{arch::shared_address(base),
                                  arch::shared_address(staging + G::kStagingBytes)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < G::kStages; ++stage) {
      arch::barrier_init(ring.full(stage), G::Producer::kArrivals);
      arch::barrier_init(ring.empty(stage), G::Tile::kReleases);
    }
    arch::fence_barrier_init();
  }
  // No CTA copies into a neighbour, or arrives there, before its barriers exist or after its end.
  if constexpr (G::Tile::kCluster > 1) arch::cluster_sync();
  __syncthreads();
  arch::wait_for_earlier_launches();
  if constexpr (G::Company::kPresent) {
    if (G::Company::owns_this_cta(params.company)) {
      G::Company::run(params.company, base);
      if constexpr (G::Tile::kCluster > 1) arch::cluster_sync();
      return;
    }
  }
  // One consumer warpgroup leaves every thread 255 registers: nothing to move then.
  if (threadIdx.x < kWarpgroup) {
    if constexpr (G::Tile::kConsumers > 1) arch::registers_decrease<G::Producer::kRegisters>();
    produce<G>(params, ring);
    arch::let_later_launches_start();
  } else {
    if constexpr (G::Tile::kConsumers > 1) arch::registers_increase<G::kConsumerRegisters>();
    consume<G>(params, ring, staging);
  }
  if constexpr (G::Tile::kCluster > 1) arch::cluster_sync();
}

}  // namespace penstock::cuda
