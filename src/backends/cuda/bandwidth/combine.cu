// SPDX-License-Identifier: Apache-2.0
//
// Launches 3 and 8: O_t = sum over the slots of t, in slot order, of S_slot * Y_row, and the same
// without scores for dX. One thread owns eight columns of one token, so the order of the sum is
// the slot order whatever the launch looks like. Bound by memory: reads R d, writes T d elements.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "backends/cuda/arch/launch.cuh"
#include "backends/cuda/bandwidth/bandwidth_ops.h"
#include "backends/cuda/bandwidth/elements.cuh"
#include "backends/cuda/launch.h"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFewRows = 4;  // in flight: of tokens with no more, and of the others
constexpr int kManyRows = 8;
constexpr int64_t kMaxSliceVectors = INT64_C(1) << 31;

struct CombineParams {
  const void* rows;
  int64_t row_stride;
  const int32_t* slot_to_row;
  const int32_t* token_offsets;  // null: top_k slots each
  const float* scores;           // null: plain sum
  void* output;
  int64_t output_stride;
  int64_t num_tokens;
  int64_t slice_tokens;  // tokens of one blockIdx.y: all of them unless 32 bits cannot count
  int32_t vectors;       // of eight columns, in a row
  int32_t top_k;
};

// The sum of a token's rows, slots first to last - 1, in eight columns; kInFlight rows at a
// time. Lookups, rows and scores are loaded in loops of their own: where a slot's lookup, row and
// score stand in one branch, the compiler lets all loads count on one scoreboard, so that each
// lookup waits for the row before it.
template <typename T, int kInFlight>
__device__ Float8 sum_of_rows(const CombineParams& params, int32_t first, int32_t end,
                              int64_t column) {
  const T* columns = static_cast<const T*>(params.rows) + column;
  Float8 sum = {};
  for (int32_t slot = first; slot < end; slot += kInFlight) {
    int32_t rows[kInFlight];
    uint4 values[kInFlight];
    float weights[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      rows[i] = slot + i < end ? params.slot_to_row[slot + i] : -1;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      values[i] = uint4{};
      if (rows[i] >= 0) values[i] = load_vector(columns + rows[i] * params.row_stride);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      weights[i] = params.scores != nullptr && rows[i] >= 0 ? params.scores[slot + i] : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (rows[i] < 0) continue;
      const Float8 value = widen<T>(values[i]);
#pragma unroll
      for (int c = 0; c < kVector; ++c) sum.v[c] = fmaf(weights[i], value.v[c], sum.v[c]);
    }
  }
  return sum;
}

// One thread a token and eight columns, counted in 32 bits: a division of 64 is a function call.
template <typename T, int kInFlight>
__global__ void __launch_bounds__(kThreads, kInFlight > kFewRows ? 4 : 5)
    combine_kernel(const CombineParams params) {
  const uint32_t vectors = params.vectors;
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t token_of_slice = index / vectors;
  const int64_t column = static_cast<int64_t>(index - token_of_slice * vectors) * kVector;
  const int64_t token = static_cast<int64_t>(blockIdx.y) * params.slice_tokens + token_of_slice;
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  if (token_of_slice >= params.slice_tokens || token >= params.num_tokens) return;

  auto slot = static_cast<int32_t>(token * params.top_k);
  int32_t end = slot + params.top_k;
  if (params.token_offsets != nullptr) {
    slot = params.token_offsets[token];
    end = params.token_offsets[token + 1];
  }
  T* output = static_cast<T*>(params.output) + token * params.output_stride + column;
  store_vector(output, narrow<T>(sum_of_rows<T, kInFlight>(params, slot, end, column)));
}

struct ScaleParams {
  const void* input;
  int64_t input_stride;
  const float* scores;         // null: 1
  const int32_t* row_to_slot;  // null: scores are per row
  void* output;
  int64_t output_stride;
  const int32_t* expert_counts;
  const int32_t* expert_offsets;
  int32_t vectors;
};

// Blocks of an expert (blockIdx.y) walk its rows; gaps between experts are not touched.
template <typename T>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(const ScaleParams params) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const int32_t first = params.expert_offsets[blockIdx.y];
  const int64_t count = static_cast<int64_t>(params.expert_counts[blockIdx.y]) * params.vectors;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = first + i / params.vectors;
    const int64_t column = (i % params.vectors) * kVector;
    const T* source = static_cast<const T*>(params.input) + row * params.input_stride + column;
    Float8 value = widen<T>(load_streaming(source));
    const int64_t slot = params.row_to_slot == nullptr ? row : params.row_to_slot[row];
    const float score = params.scores == nullptr ? 1.0f : params.scores[slot];
#pragma unroll
    for (int c = 0; c < kVector; ++c) value.v[c] *= score;
    T* target = static_cast<T*>(params.output) + row * params.output_stride + column;
    store_vector(target, narrow<T>(value));
  }
}

}  // namespace

void combine(const CombineArgs& args, const Context& context) {
  check_clean_device("combine");
  CombineParams params;
  params.rows = args.rows.data;
  params.row_stride = args.rows.stride(0);
  params.slot_to_row = args.plan.slot_to_row.as<int32_t>();
  params.token_offsets = args.plan.token_offsets.as<int32_t>();
  params.scores = args.scores.as<float>();
  params.output = args.output.data;
  params.output_stride = args.output.stride(0);
  params.num_tokens = args.output.size(0);
  params.vectors = static_cast<int32_t>(args.output.size(1) / kVector);
  params.top_k = args.plan.top_k;
  if (params.num_tokens == 0 || params.vectors == 0) return;
  params.slice_tokens = std::min<int64_t>(params.num_tokens, kMaxSliceVectors / params.vectors);
  const dim3 grid(static_cast<unsigned>(ceil_div(params.slice_tokens * params.vectors, kThreads)),
                  static_cast<unsigned>(ceil_div(params.num_tokens, params.slice_tokens)));
  const int64_t slots_of_a_token = ceil_div(args.plan.slot_to_row.numel(), params.num_tokens);
  visit_storage(args.output.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel =
        slots_of_a_token > kFewRows ? combine_kernel<T, kManyRows> : combine_kernel<T, kFewRows>;
    launch_dependent({"combine_kernel", grid, kThreads}, context, kernel, params);
  });
}

void scale_rows(const ScaleRowsArgs& args, const Context& context) {
  check_clean_device("scale_rows");
  const int64_t num_experts = args.rows.num_experts();
  if (args.rows.row_capacity == 0 || num_experts == 0) return;
  ScaleParams params;
  params.input = args.input.data;
  params.input_stride = args.input.stride(0);
  params.scores = args.scores.as<float>();
  params.row_to_slot = args.rows.row_to_slot.as<int32_t>();
  params.output = args.output.data;
  params.output_stride = args.output.stride(0);
  params.expert_counts = args.rows.expert_counts.as<int32_t>();
  params.expert_offsets = args.rows.expert_offsets.as<int32_t>();
  params.vectors = static_cast<int32_t>(args.output.size(1) / kVector);
  constexpr unsigned kBlocksPerExpert = 16;
  const dim3 grid(kBlocksPerExpert, static_cast<unsigned>(num_experts));
  visit_storage(args.output.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_dependent({"scale_rows_kernel", grid, kThreads}, context, scale_rows_kernel<T>, params);
  });
}

}  // namespace penstock::cuda
