// SPDX-License-Identifier: Apache-2.0
//
// The routing plan in two launches, without a sort of all keys: a histogram per chunk of slots,
// then a ranked scatter whose blocks add up the histograms themselves. Slots that fit one block of
// the scatter (decoding) need no histograms: that block counts them, and one launch is all. Stable:
// a row's place comes from counts of earlier slots only, never from the return value of an atomic,
// so the plan is the CPU's bit for bit. Nothing is expected of the scratch, and no block waits for
// another.
//
//   counters (chunks, columns)  slots of each expert in each chunk; columns: E in whole vectors
#include <algorithm>
#include <string>

#include "backends/cuda/arch/launch.cuh"
#include "backends/cuda/bandwidth/bandwidth_ops.h"
#include "backends/cuda/bandwidth/team.cuh"
#include "backends/cuda/launch.h"

namespace penstock::cuda {
namespace {

// A block of the scatter is kWarps warps, each ranking kSlotsPerWarp slots with its own counter per
// expert in shared memory. Past 1024 experts the counters of sixteen warps no longer fit beside
// another block, so fewer warps take more slots each.
template <int kWarpCount, int kWarpSlots>
struct Scatter {
  static constexpr int kWarps = kWarpCount;
  static constexpr int kThreads = kWarpCount * 32;
  static constexpr int kSlotsPerWarp = kWarpSlots;
};
using FewExperts = Scatter<16, 128>;
using ManyExperts = Scatter<4, 512>;
constexpr int64_t kBlockSlots = 2048;  // of either
constexpr int64_t kFewExperts = 1024;
constexpr int64_t kPlainSharedBytes = 47 * 1024;  // 48 KB less what kernels declare themselves

constexpr int kCountThreads = 1024;
constexpr int kVector = 8;  // counters read at once

// Every block of the scatter reads all counters, and the ids of its chunk before its own, so there
// are at most this many of the former, and a chunk is longer where there are more slots.
constexpr int64_t kMaxCounters = 64 * 1024;
constexpr int64_t kMaxChunks = 96;
constexpr int64_t kMaxChunkSlots = 31 * kBlockSlots;  // counted in 16 bits

struct Chunks {
  Chunks(int64_t num_slots, int64_t num_experts)
      : columns(ceil_div(num_experts, kVector) * kVector) {
    const int64_t wanted = std::clamp<int64_t>(kMaxCounters / columns, 1, kMaxChunks);
    const int64_t blocks_each = ceil_div(ceil_div(num_slots, wanted), kBlockSlots);
    slots = std::clamp<int64_t>(blocks_each * kBlockSlots, kBlockSlots, kMaxChunkSlots);
    count = std::max<int64_t>(1, ceil_div(num_slots, slots));
  }

  int64_t columns;
  int64_t slots;  // of one chunk, a multiple of kBlockSlots
  int64_t count;
};

struct PlanParams {
  const void* ids;
  int64_t num_slots;
  int64_t num_tokens;
  int64_t row_capacity;
  int32_t num_experts;
  int32_t top_k;
  int32_t columns;
  int32_t chunks;
  int64_t chunk_slots;
  const int32_t* token_offsets_in;
  int32_t* token_offsets_out;  // null: not wanted, or the same memory
  uint16_t* counters;
  int32_t* expert_counts;
  int32_t* expert_offsets;
  int32_t* row_to_token;
  int32_t* row_to_slot;
  int32_t* slot_to_row;
  int32_t* dropped_slots;  // null: not wanted
};

// The expert of a slot, or -1: the slot is skipped.
template <typename Id>
__device__ int32_t expert_of(const PlanParams& params, int64_t slot) {
  if (slot >= params.num_slots) return -1;
  const Id id = static_cast<const Id*>(params.ids)[slot];
  return id >= 0 && id < params.num_experts ? static_cast<int32_t>(id) : -1;
}

// Tokens that slots may belong to: first to last.
struct TokenRange {
  int64_t first;
  int64_t last;
};

// The last token whose offset is <= slot, found by a warp for all its lanes.
__device__ int64_t token_by_warp(const PlanParams& params, int64_t slot) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int64_t low = 0;
  int64_t high = params.num_tokens;
  while (high - low > 1) {
    const int64_t step = (high - low + 31) / 32;
    const int64_t probe = low + lane * step;
    const bool before = probe < high && (lane == 0 || params.token_offsets_in[probe] <= slot);
    low += (__popc(__ballot_sync(kFullMask, before)) - 1) * step;
    high = min(low + step, high);
  }
  return low;
}

// Where the slots [first, end) have tokens with differing numbers of experts.
__device__ TokenRange tokens_of(const PlanParams& params, int64_t first, int64_t end) {
  if (params.top_k > 0 || first >= params.num_slots) return {0, 0};
  return {token_by_warp(params, first), token_by_warp(params, min(end, params.num_slots) - 1)};
}

__device__ int32_t token_of(const PlanParams& params, int64_t slot, const TokenRange& tokens) {
  if (params.top_k > 0) {  // in 32 bits, which slots fit in: a division of 64 is a function call
    return static_cast<int32_t>(static_cast<uint32_t>(slot) / static_cast<uint32_t>(params.top_k));
  }
  int64_t low = tokens.first;
  int64_t high = tokens.last + 1;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (params.token_offsets_in[middle] <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return static_cast<int32_t>(low);
}

// Adds the slots [first, end) to their experts' counts, by all threads of the block.
template <typename Id>
__device__ void count_slots(const PlanParams& params, int64_t first, int64_t end, int32_t* counts) {
  for (int64_t slot = first + threadIdx.x; slot < end; slot += blockDim.x) {
    const int32_t expert = expert_of<Id>(params, slot);
    if (expert >= 0) atomicAdd(&counts[expert], 1);
  }
}

template <typename Id>
__global__ void __launch_bounds__(kCountThreads) plan_count_kernel(const PlanParams params) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  extern __shared__ int32_t histogram[];  // (columns)
  for (int e = threadIdx.x; e < params.columns; e += kCountThreads) histogram[e] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * params.chunk_slots;
  count_slots<Id>(params, first, first + params.chunk_slots, histogram);
  __syncthreads();
  uint16_t* counters = params.counters + static_cast<int64_t>(blockIdx.x) * params.columns;
  for (int e = threadIdx.x; e < params.columns; e += kCountThreads) {
    counters[e] = static_cast<uint16_t>(histogram[e]);
  }
}

// totals[e]: slots of expert e; rows[e]: those in the chunks before `chunk`. Both start at 0.
template <typename Block>
__device__ void add_counters(const PlanParams& params, int32_t chunk, int32_t* totals,
                             int32_t* rows) {
  const int vectors = params.columns / kVector;
  const int groups = max(1, Block::kThreads / vectors);  // of threads, each with chunks of its own
  for (int item = threadIdx.x; item < vectors * groups; item += Block::kThreads) {
    const int column = item % vectors * kVector;
    int32_t all[kVector] = {};
    int32_t before[kVector] = {};
#pragma unroll 4
    for (int32_t c = item / vectors; c < params.chunks; c += groups) {
      const auto* counters = reinterpret_cast<const uint4*>(
          params.counters + static_cast<int64_t>(c) * params.columns + column);
      const uint4 pairs = *counters;
      const uint32_t words[kVector / 2] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const auto count = static_cast<int32_t>(words[i / 2] >> (i % 2 * 16) & 0xffffu);
        all[i] += count;
        if (c < chunk) before[i] += count;
      }
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      atomicAdd(&totals[column + i], all[i]);
      atomicAdd(&rows[column + i], before[i]);
    }
  }
}

// base[e] = slots of experts before e. Every block repeats this small scan rather than wait for
// one block to publish it. Returns the slots of all experts.
template <typename Block>
__device__ int32_t scan_totals(const PlanParams& params, const int32_t* totals, int32_t* base) {
  __shared__ int32_t warp_sums[Block::kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int per_thread = (params.num_experts + Block::kThreads - 1) / Block::kThreads;
  const int first = thread * per_thread;
  const int last = min(first + per_thread, params.num_experts);
  int32_t sum = 0;
  for (int e = first; e < last; ++e) sum += totals[e];
  const int32_t inclusive = warp_inclusive_sum(sum);
  if (thread % 32 == 31) warp_sums[thread / 32] = inclusive;
  __syncthreads();
  int32_t running = inclusive - sum;
  for (int w = 0; w < thread / 32; ++w) running += warp_sums[w];
  for (int e = first; e < last; ++e) {
    base[e] = running;
    running += totals[e];
  }
  int32_t all = 0;
  for (int w = 0; w < Block::kWarps; ++w) all += warp_sums[w];
  __syncthreads();
  return all;
}

template <typename Block>
__device__ void write_expert_arrays(const PlanParams& params, const int32_t* totals,
                                    const int32_t* base, int32_t all) {
  const auto capacity = static_cast<int32_t>(params.row_capacity);
  for (int e = threadIdx.x; e < params.num_experts; e += Block::kThreads) {
    const int32_t offset = min(base[e], capacity);
    params.expert_offsets[e] = offset;
    params.expert_counts[e] = min(totals[e], capacity - offset);
  }
  if (threadIdx.x == 0) {
    params.expert_offsets[params.num_experts] = min(all, capacity);
    if (params.dropped_slots != nullptr) params.dropped_slots[0] = max(all - capacity, 0);
  }
}

// The warp's slots from `first` on, in order; next[e] is the row of expert e's next slot.
template <typename Block, typename Id>
__device__ void place_slots(const PlanParams& params, int64_t first, int32_t* next) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const TokenRange tokens = tokens_of(params, first, first + Block::kSlotsPerWarp);
  for (int i = lane; i < Block::kSlotsPerWarp; i += 32) {
    const int64_t slot = first + i;
    const int32_t expert = expert_of<Id>(params, slot);
    const unsigned peers = __match_any_sync(kFullMask, expert);
    const unsigned earlier = peers & ((1u << lane) - 1u);
    int64_t row = params.row_capacity;
    if (expert >= 0) row = next[expert] + __popc(earlier);
    __syncwarp();
    if (expert >= 0 && earlier == 0) next[expert] += __popc(peers);
    __syncwarp();
    if (slot >= params.num_slots) continue;
    const bool placed = row < params.row_capacity;
    params.slot_to_row[slot] = placed ? static_cast<int32_t>(row) : -1;
    if (placed) {
      params.row_to_slot[row] = static_cast<int32_t>(slot);
      params.row_to_token[row] = token_of(params, slot, tokens);
    }
  }
}

__device__ void copy_token_offsets(const PlanParams& params) {
  if (params.token_offsets_out == nullptr) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       t <= params.num_tokens; t += step) {
    params.token_offsets_out[t] = params.token_offsets_in[t];
  }
}

template <typename Block, typename Id>
__global__ void __launch_bounds__(Block::kThreads, 1) plan_scatter_kernel(const PlanParams params) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  extern __shared__ int32_t shared[];
  int32_t* rows = shared;                      // (columns) next row of expert e for the block
  int32_t* next_rows = rows + params.columns;  // (kWarps, columns) the same for a warp
  int32_t* totals = next_rows;                 // (columns) until the warps' counts take its place
  int32_t* base = totals + params.columns;     // (columns) likewise
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockSlots;
  const auto chunk = static_cast<int32_t>(first / params.chunk_slots);

  for (int e = thread; e < params.columns; e += Block::kThreads) rows[e] = totals[e] = 0;
  __syncthreads();
  if (gridDim.x == 1) {
    count_slots<Id>(params, 0, params.num_slots, totals);
  } else {
    add_counters<Block>(params, chunk, totals, rows);
    count_slots<Id>(params, chunk * params.chunk_slots, first, rows);
  }
  __syncthreads();
  const int32_t all = scan_totals<Block>(params, totals, base);
  if (blockIdx.x == 0) write_expert_arrays<Block>(params, totals, base, all);
  copy_token_offsets(params);
  for (int e = thread; e < params.num_experts; e += Block::kThreads) rows[e] += base[e];
  __syncthreads();

  for (int i = thread; i < Block::kWarps * params.columns; i += Block::kThreads) next_rows[i] = 0;
  __syncthreads();
  int32_t* next = next_rows + thread / 32 * params.columns;
  const int64_t warp_first = first + thread / 32 * Block::kSlotsPerWarp;
  for (int i = thread % 32; i < Block::kSlotsPerWarp; i += 32) {
    const int32_t expert = expert_of<Id>(params, warp_first + i);
    if (expert >= 0) atomicAdd(&next[expert], 1);
  }
  __syncthreads();
  for (int e = thread; e < params.num_experts; e += Block::kThreads) {
    int32_t row = rows[e];
    for (int w = 0; w < Block::kWarps; ++w) {
      int32_t& counter = next_rows[w * params.columns + e];
      const int32_t count = counter;
      counter = row;
      row += count;
    }
  }
  __syncthreads();
  place_slots<Block, Id>(params, warp_first, next);
}

template <typename Block, typename Id>
void launch(const PlanParams& params, const Context& context) {
  const int64_t column_bytes = params.columns * static_cast<int64_t>(sizeof(int32_t));
  const int64_t scatter_bytes = column_bytes * (1 + Block::kWarps);
  // Without slots one block still writes the experts' arrays.
  const auto blocks =
      static_cast<unsigned>(std::max<int64_t>(1, ceil_div(params.num_slots, kBlockSlots)));
  if (blocks > 1) {
    launch_dependent({"plan_count_kernel", dim3(static_cast<unsigned>(params.chunks)),
                      kCountThreads, column_bytes},
                     context, plan_count_kernel<Id>, params);
  }
  // Above 48 KB a launch needs the kernel's leave, which is a host-side setting: no launch, no
  // synchronisation, allowed while a graph is captured.
  if (scatter_bytes > kPlainSharedBytes) {
    check("cudaFuncSetAttribute(plan_scatter_kernel)",
          cudaFuncSetAttribute(plan_scatter_kernel<Block, Id>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(scatter_bytes)));
  }
  launch_dependent({"plan_scatter_kernel", dim3(blocks), Block::kThreads, scatter_bytes}, context,
                   plan_scatter_kernel<Block, Id>, params);
}

template <typename Id>
void launch_for_ids(const PlanParams& params, const Context& context) {
  if (params.num_experts <= kFewExperts) {
    launch<FewExperts, Id>(params, context);
  } else {
    launch<ManyExperts, Id>(params, context);
  }
}

template <typename T>
T* data_or_null(const TensorView& view) {
  return view.present() ? view.as<T>() : nullptr;
}

}  // namespace

int64_t plan_scratch_bytes(int64_t num_slots, int64_t num_experts, const Context&) {
  const Chunks chunks(num_slots, num_experts);
  return chunks.count * chunks.columns * static_cast<int64_t>(sizeof(uint16_t));
}

void build_plan(const PlanArgs& args, const Context& context) {
  if (args.plan.num_experts() > kMaxExperts) {
    throw Error(ErrorCode::unsupported,
                {"num_experts on the GPU", std::to_string(args.plan.num_experts()),
                 "at most " + std::to_string(kMaxExperts), "Use fewer experts, or the CPU."});
  }
  check_clean_device("build_plan");
  const Routing& routing = args.routing;
  const RoutingPlan& plan = args.plan;
  PlanParams params;
  params.ids = routing.ids.data;
  params.num_slots = routing.num_slots();
  params.num_tokens = routing.num_tokens;
  params.row_capacity = plan.row_to_slot.numel();
  params.num_experts = static_cast<int32_t>(plan.num_experts());
  params.top_k = routing.top_k;
  const Chunks chunks(params.num_slots, params.num_experts);
  params.columns = static_cast<int32_t>(chunks.columns);
  params.chunks = static_cast<int32_t>(chunks.count);
  params.chunk_slots = chunks.slots;
  params.token_offsets_in = data_or_null<const int32_t>(routing.token_offsets);
  const bool same_offsets = plan.token_offsets.data == routing.token_offsets.data;
  params.token_offsets_out = same_offsets ? nullptr : data_or_null<int32_t>(plan.token_offsets);
  params.counters = static_cast<uint16_t*>(args.scratch.data);
  params.expert_counts = plan.expert_counts.as<int32_t>();
  params.expert_offsets = plan.expert_offsets.as<int32_t>();
  params.row_to_token = plan.row_to_token.as<int32_t>();
  params.row_to_slot = plan.row_to_slot.as<int32_t>();
  params.slot_to_row = plan.slot_to_row.as<int32_t>();
  params.dropped_slots = data_or_null<int32_t>(plan.dropped_slots);
  if (routing.ids.dtype == DType::int64) {
    launch_for_ids<int64_t>(params, context);
  } else {
    launch_for_ids<int32_t>(params, context);
  }
}

}  // namespace penstock::cuda
