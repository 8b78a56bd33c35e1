// SPDX-License-Identifier: Apache-2.0
//
// The one kernel of all grouped products: persistent, one producer warpgroup and one or two
// consumer warpgroups. A product is four types: Tile, Schedule, Producer, Epilogue.
//
// Every CTA walks its own list of tiles (Schedule); the producer runs ahead through the ring of
// stages, across tile boundaries; consumers start what the epilogue will need from memory,
// multiply, then run the epilogue on their own rows. What an epilogue reads much of (its Operand)
// comes through the ring too, in stages of its own behind the tile's k tiles.
#pragma once

#include <type_traits>

#include "backends/cuda/arch/launch.cuh"
#include "backends/cuda/gemm/epilogue.cuh"
#include "backends/cuda/gemm/multiply.cuh"

namespace penstock::cuda {

template <typename TileType, typename ScheduleType, typename ProducerType, typename EpilogueType>
struct Gemm {
  using Tile = TileType;
  using Schedule = ScheduleType;
  using Producer = ProducerType;
  using Epilogue = EpilogueType;
  using Operand = typename Epilogue::Operand;

  static constexpr int kStagingBytes = Tile::kConsumerWarps * Epilogue::kWarpStagingBytes;
  static constexpr int kAlignment = 1024;  // of what is swizzled
  static constexpr int kBarrierBytes = kAlignment;
  static constexpr int kStagesThatFit =
      (kSharedLimit - kAlignment - kStagingBytes - kBarrierBytes) / Tile::kStageBytes;
  static constexpr int kStages = kStagesThatFit < 8 ? kStagesThatFit : 8;
  static_assert(kStages >= 3, "a ring of fewer than three stages cannot hide its loads");
  static constexpr int kSharedBytes =
      kAlignment + kStages * Tile::kStageBytes + kStagingBytes + kBarrierBytes;
  static constexpr int kConsumerRegisters = Producer::kRegisters > 40 ? 224 : 232;

  using RingType = Ring<Tile, kStages>;

  // Looking ahead makes the products that store 3 % faster. Where threads gather, tiles wait for
  // the ring: there it made the up-projection 4 % and weight gradient 1 7 % slower.
  using TileList =
      std::conditional_t<Producer::kFill == Fill::tma, TilesAhead<Schedule>, Tiles<Schedule>>;

  struct Params {
    typename Producer::Params operands;
    typename Schedule::Params schedule;
    typename Epilogue::Params epilogue;
  };
};

template <typename G>
__device__ __forceinline__ void produce(const typename G::Params& params,
                                        const typename G::RingType& ring) {
  typename G::TileList tiles(params.schedule);
  G::Producer::run(params.operands, tiles, ring, typename G::Operand{params.epilogue});
}

// One consumer warp's share of a kernel: which tiles and which rows of them are its own.
struct Consumer {
  int group;  // warpgroup
  int warp;   // inside it
  uint8_t* staging;
};

// The stages of a tile's Operand, as one consumer warp meets them.
template <typename Main, typename RingType>
struct OperandStages {
  const RingType& ring;
  typename RingType::State& state;

  // The address of the next, once it is full.
  __device__ uint32_t take() {
    const int stage = state.stage();
    arch::barrier_wait(ring.full(stage), state.parity());
    state.advance();
    return ring.a(stage);
  }
  // Hand back the one taken last, and the one before it.
  __device__ void give_back_last() { Main::release(ring, before(state.stage())); }
  __device__ void give_back_second_last() { Main::release(ring, before(before(state.stage()))); }

 private:
  static __device__ int before(int stage) { return (stage == 0 ? RingType::kStages : stage) - 1; }
};

// How far a consumer warp has come: in the ring and in its list of tiles.
template <typename G>
struct Position {
  typename G::RingType::State state;
  typename G::TileList tiles;
};

// How many stages a tile's products take, and of the last one which steps.
template <typename G>
__device__ __forceinline__ auto depth_of(const typename G::Params& params, const Work& work) {
  if constexpr (requires { G::Producer::last_steps(params.operands); }) {
    return Depth<FirstSteps>{work.k_tiles, G::Producer::last_steps(params.operands)};
  } else {
    return Depth<AllSteps>{work.k_tiles, {}};
  }
}

// The products of one tile and its epilogue, block by block.
template <typename G>
__device__ __forceinline__ void consume_tile(const typename G::Params& params,
                                             const typename G::RingType& ring,
                                             Position<G>& position, const Work& work,
                                             const Consumer& self) {
  using TileType = typename G::Tile;
  using Epilogue = typename G::Epilogue;
  using Main = Multiply<TileType, G::Producer::kFill, typename G::RingType>;
  const int first_block = self.group * TileType::kBlocks;
  const int rows = Epilogue::rows_of(params.epilogue, work) - first_block * 64;
  auto& [state, tiles] = position;
  if (rows <= 0) {
    tiles.look_ahead();
    return Main::skip(ring, state, work.k_tiles + G::Operand::kStages);
  }
  const auto place = [&](int block) {
    return WarpPlace{self.staging, (first_block + block) * 64 + self.warp * 16};
  };
  if constexpr (G::Schedule::kMayBeEmpty) {
    if (work.k_tiles == 0) {
      tiles.look_ahead();
      for (int block = 0; block < TileType::kBlocks; ++block) {
        Epilogue::run_empty(params.epilogue, work, place(block));
      }
      return;
    }
  }
  const auto depth = depth_of<G>(params, work);
  typename Main::Sums sums;
  if constexpr (G::Operand::kStages > 0) {
    static_assert(TileType::kBlocks == 1, "an operand's stage is read once");
    // What is needed early takes two loads, one after the other.
    const auto where = Epilogue::find(params.epilogue, work, place(0));
    typename Epilogue::Early early;
    Main::template run<1>(sums, ring, state, self.group, depth, [&] {
      early = Epilogue::fetch(params.epilogue, where);
      tiles.look_ahead();
    });
    OperandStages<Main, typename G::RingType> stages{ring, state};
    Epilogue::run(params.epilogue, work, sums[0], early, place(0), stages);
  } else {
    const auto look = [&] { tiles.look_ahead(); };
    if (TileType::kBlocks == 1 || rows <= 64) {
      Main::template run<1>(sums, ring, state, self.group, depth, look);
    } else {
      Main::template run<TileType::kBlocks>(sums, ring, state, self.group, depth, look);
    }
#pragma unroll
    for (int block = 0; block < TileType::kBlocks; ++block) {
      if (block * 64 >= rows) break;
      Epilogue::run(params.epilogue, work, sums[block], place(block));
    }
  }
}

template <typename G>
__device__ __forceinline__ void consume(const typename G::Params& params,
                                        const typename G::RingType& ring, uint8_t* staging) {
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32 - 4, 0);
  const Consumer self = {warp / 4, warp % 4, staging + warp * G::Epilogue::kWarpStagingBytes};
  Position<G> position = {{}, typename G::TileList(params.schedule)};
  Work work;
  while (position.tiles.next(work)) consume_tile<G>(params, ring, position, work, self);
  arch::bulk_wait_read<0>();  // shared memory must outlive the copies from it
}

template <typename G>
__global__ void __launch_bounds__(G::Tile::kThreads, 1)
    grouped_gemm(const __grid_constant__ typename G::Params params) {
  extern __shared__ uint8_t shared[];
  uint8_t* base =
      shared + (G::kAlignment - arch::shared_address(shared) % G::kAlignment) % G::kAlignment;
  uint8_t* staging = base + G::kStages * G::Tile::kStageBytes + G::kBarrierBytes;
  const typename G::RingType ring{arch::shared_address(base)};
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
