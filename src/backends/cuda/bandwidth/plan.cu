// SPDX-License-Identifier: Apache-2.0
//
// The routing plan in three launches, without a sort of all keys: per-chunk histograms, a scan
// over chunks, a ranked scatter. Stable: a row's place comes from counts of earlier slots only,
// never from the return value of an atomic, so the plan is the CPU's bit for bit.
//
//   counters (E, chunks)  slots of each expert in each chunk; after the scan, in earlier chunks
//   totals   (E)          slots of each expert
#include <algorithm>
#include <string>

#include "backends/cuda/bandwidth/bandwidth_ops.h"
#include "backends/cuda/bandwidth/team.cuh"
#include "backends/cuda/launch.h"

namespace penstock::cuda {
namespace {

// A chunk is one block of kWarps warps, each ranking kSlotsPerWarp slots with its own counter per
// expert in shared memory. Past 1024 experts the counters of eight warps no longer fit beside
// another block, so fewer warps take more slots each.
template <int kWarpCount, int kWarpSlots>
struct Chunking {
  static constexpr int kWarps = kWarpCount;
  static constexpr int kThreads = kWarpCount * 32;
  static constexpr int kSlotsPerWarp = kWarpSlots;
  static constexpr int kSlots = kWarpCount * kWarpSlots;
};
using FewExperts = Chunking<8, 128>;
using ManyExperts = Chunking<2, 1024>;
constexpr int64_t kFewExperts = 1024;
constexpr size_t kPlainSharedBytes = 48 * 1024;

int64_t chunks_of(int64_t num_slots, int64_t num_experts) {
  const int64_t slots =
      num_experts <= kFewExperts ? FewExperts::kSlots : ManyExperts::kSlots;
  return std::max<int64_t>(1, ceil_div(num_slots, slots));
}

struct PlanParams {
  const void* ids;
  int64_t num_slots;
  int64_t num_tokens;
  int64_t row_capacity;
  int32_t num_experts;
  int32_t top_k;
  int32_t chunks;
  const int32_t* token_offsets_in;
  int32_t* token_offsets_out;  // null: not wanted, or the same memory
  int32_t* counters;
  int32_t* totals;
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

__device__ int32_t token_of(const PlanParams& params, int64_t slot) {
  if (params.top_k > 0) return static_cast<int32_t>(slot / params.top_k);
  int64_t low = 0;  // last token whose offset is <= slot
  int64_t high = params.num_tokens;
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

template <typename Chunk, typename Id>
__global__ void __launch_bounds__(Chunk::kThreads) plan_count_kernel(const PlanParams params) {
  extern __shared__ int32_t histogram[];  // (E)
  for (int e = threadIdx.x; e < params.num_experts; e += Chunk::kThreads) histogram[e] = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Chunk::kSlots;
  for (int i = threadIdx.x; i < Chunk::kSlots; i += Chunk::kThreads) {
    const int32_t expert = expert_of<Id>(params, first + i);
    if (expert >= 0) atomicAdd(&histogram[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < params.num_experts; e += Chunk::kThreads) {
    params.counters[static_cast<int64_t>(e) * params.chunks + blockIdx.x] = histogram[e];
  }
}

__device__ int32_t warp_inclusive_scan(int32_t value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t below = __shfl_up_sync(kFullMask, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// One warp an expert: exclusive scan of its counters over the chunks, in place.
__global__ void __launch_bounds__(256) plan_scan_kernel(const PlanParams params) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int expert = static_cast<int>(blockIdx.x) * 8 + static_cast<int>(threadIdx.x) / 32;
  if (expert >= params.num_experts) return;
  int32_t* counters = params.counters + static_cast<int64_t>(expert) * params.chunks;
  int32_t before = 0;
  for (int first = 0; first < params.chunks; first += 32) {
    const int chunk = first + lane;
    const int32_t count = chunk < params.chunks ? counters[chunk] : 0;
    const int32_t inclusive = warp_inclusive_scan(count);
    if (chunk < params.chunks) counters[chunk] = before + inclusive - count;
    before += __shfl_sync(kFullMask, inclusive, 31);
  }
  if (lane == 0) params.totals[expert] = before;
}

// base[e] = slots of experts before e. Every block repeats this small scan rather than wait for
// one block to publish it.
template <typename Chunk>
__device__ int32_t scan_totals(const PlanParams& params, int32_t* base) {
  __shared__ int32_t warp_sums[Chunk::kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int per_thread = (params.num_experts + Chunk::kThreads - 1) / Chunk::kThreads;
  const int first = thread * per_thread;
  const int last = min(first + per_thread, params.num_experts);
  int32_t sum = 0;
  for (int e = first; e < last; ++e) sum += params.totals[e];
  const int32_t inclusive = warp_inclusive_scan(sum);
  if (thread % 32 == 31) warp_sums[thread / 32] = inclusive;
  __syncthreads();
  int32_t running = inclusive - sum;
  for (int w = 0; w < thread / 32; ++w) running += warp_sums[w];
  for (int e = first; e < last; ++e) {
    base[e] = running;
    running += params.totals[e];
  }
  int32_t all = 0;
  for (int w = 0; w < Chunk::kWarps; ++w) all += warp_sums[w];
  __syncthreads();
  return all;
}

template <typename Chunk>
__device__ void write_expert_arrays(const PlanParams& params, const int32_t* base, int32_t all) {
  const auto capacity = static_cast<int32_t>(params.row_capacity);
  for (int e = threadIdx.x; e < params.num_experts; e += Chunk::kThreads) {
    const int32_t offset = min(base[e], capacity);
    params.expert_offsets[e] = offset;
    params.expert_counts[e] = min(params.totals[e], capacity - offset);
  }
  if (threadIdx.x == 0) {
    params.expert_offsets[params.num_experts] = min(all, capacity);
    if (params.dropped_slots != nullptr) params.dropped_slots[0] = max(all - capacity, 0);
  }
}

template <typename Chunk, typename Id>
__global__ void __launch_bounds__(Chunk::kThreads, 1) plan_scatter_kernel(const PlanParams params) {
  extern __shared__ int32_t shared[];
  int32_t* base = shared;                            // (E)
  int32_t* next_rows = shared + params.num_experts;  // (kWarps, E) next row of expert e for warp w
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  int32_t* next = next_rows + static_cast<int64_t>(warp) * params.num_experts;

  const int32_t all = scan_totals<Chunk>(params, base);
  if (blockIdx.x == 0) write_expert_arrays<Chunk>(params, base, all);
  if (params.token_offsets_out != nullptr) {
    for (int64_t t = static_cast<int64_t>(blockIdx.x) * Chunk::kThreads + thread;
         t <= params.num_tokens; t += static_cast<int64_t>(gridDim.x) * Chunk::kThreads) {
      params.token_offsets_out[t] = params.token_offsets_in[t];
    }
  }

  for (int i = thread; i < Chunk::kWarps * params.num_experts; i += Chunk::kThreads) {
    next_rows[i] = 0;
  }
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Chunk::kSlots +
                        static_cast<int64_t>(warp) * Chunk::kSlotsPerWarp;
  for (int i = lane; i < Chunk::kSlotsPerWarp; i += 32) {
    const int32_t expert = expert_of<Id>(params, first + i);
    if (expert >= 0) atomicAdd(&next[expert], 1);
  }
  __syncthreads();
  for (int e = thread; e < params.num_experts; e += Chunk::kThreads) {
    int32_t row = base[e] + params.counters[static_cast<int64_t>(e) * params.chunks + blockIdx.x];
    for (int w = 0; w < Chunk::kWarps; ++w) {
      int32_t& counter = next_rows[static_cast<int64_t>(w) * params.num_experts + e];
      const int32_t count = counter;
      counter = row;
      row += count;
    }
  }
  __syncthreads();
  for (int i = lane; i < Chunk::kSlotsPerWarp; i += 32) {
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
      params.row_to_token[row] = token_of(params, slot);
    }
  }
}

template <typename Chunk, typename Id>
void launch(const PlanParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(params.chunks);
  const size_t expert_bytes = static_cast<size_t>(params.num_experts) * sizeof(int32_t);
  const size_t scatter_bytes = expert_bytes * (1 + Chunk::kWarps);
  plan_count_kernel<Chunk, Id><<<blocks, Chunk::kThreads, expert_bytes, stream>>>(params);
  check_launch("plan_count_kernel");
  const auto scan_blocks = static_cast<unsigned>(ceil_div(params.num_experts, 8));
  plan_scan_kernel<<<scan_blocks, 256, 0, stream>>>(params);
  check_launch("plan_scan_kernel");
  // Above 48 KB a launch needs the kernel's leave, which is a host-side setting: no launch, no
  // synchronisation, allowed while a graph is captured.
  if (scatter_bytes > kPlainSharedBytes) {
    check("cudaFuncSetAttribute(plan_scatter_kernel)",
          cudaFuncSetAttribute(plan_scatter_kernel<Chunk, Id>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(scatter_bytes)));
  }
  plan_scatter_kernel<Chunk, Id><<<blocks, Chunk::kThreads, scatter_bytes, stream>>>(params);
  check_launch("plan_scatter_kernel");
}

template <typename Id>
void launch_for_ids(const PlanParams& params, cudaStream_t stream) {
  if (params.num_experts <= kFewExperts) {
    launch<FewExperts, Id>(params, stream);
  } else {
    launch<ManyExperts, Id>(params, stream);
  }
}

template <typename T>
T* data_or_null(const TensorView& view) {
  return view.present() ? view.as<T>() : nullptr;
}

}  // namespace

int64_t plan_scratch_bytes(int64_t num_slots, int64_t num_experts, const Context&) {
  return num_experts * (chunks_of(num_slots, num_experts) + 1) *
         static_cast<int64_t>(sizeof(int32_t));
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
  params.chunks = static_cast<int32_t>(chunks_of(params.num_slots, params.num_experts));
  params.token_offsets_in = data_or_null<const int32_t>(routing.token_offsets);
  const bool same_offsets = plan.token_offsets.data == routing.token_offsets.data;
  params.token_offsets_out = same_offsets ? nullptr : data_or_null<int32_t>(plan.token_offsets);
  params.counters = static_cast<int32_t*>(args.scratch.data);
  params.totals = params.counters + static_cast<int64_t>(params.num_experts) * params.chunks;
  params.expert_counts = plan.expert_counts.as<int32_t>();
  params.expert_offsets = plan.expert_offsets.as<int32_t>();
  params.row_to_token = plan.row_to_token.as<int32_t>();
  params.row_to_slot = plan.row_to_slot.as<int32_t>();
  params.slot_to_row = plan.slot_to_row.as<int32_t>();
  params.dropped_slots = data_or_null<int32_t>(plan.dropped_slots);
  if (routing.ids.dtype == DType::int64) {
    launch_for_ids<int64_t>(params, stream_of(context));
  } else {
    launch_for_ids<int32_t>(params, stream_of(context));
  }
}

}  // namespace penstock::cuda
