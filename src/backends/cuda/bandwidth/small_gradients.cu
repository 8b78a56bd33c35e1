// SPDX-License-Identifier: Apache-2.0
//
// Gradients that are sums of a few bytes: dS from the partial sums that the dH launch left (plus
// <dO, b2>), and the bias gradients. Every sum has one owner and a fixed order.
#include <algorithm>
#include <type_traits>

#include "backends/cuda/arch/launch.cuh"
#include "backends/cuda/bandwidth/bandwidth_ops.h"
#include "backends/cuda/bandwidth/elements.cuh"
#include "backends/cuda/bandwidth/team.cuh"
#include "backends/cuda/launch.h"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 256;

struct ScoreGradientParams {
  const float* partials;  // (R_cap, P)
  int64_t partials_stride;
  int32_t num_partials;
  const void* d_output;
  int64_t d_output_stride;
  int64_t hidden_size;
  const void* b2;  // null: no bias
  int64_t b2_expert_stride;
  int64_t b2_stride;
  const int32_t* expert_counts;
  const int32_t* expert_offsets;
  const int32_t* row_to_token;  // null: row r
  const int32_t* row_to_slot;   // null: row r
  float* dscores;
};

__global__ void __launch_bounds__(kThreads) zero_kernel(float* values, int64_t count) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < count) values[index] = 0.0f;
}

template <typename T>
__device__ float bias_dot(const ScoreGradientParams& params, int64_t token, int64_t expert) {
  const T* row = static_cast<const T*>(params.d_output) + token * params.d_output_stride;
  const T* bias = static_cast<const T*>(params.b2) + expert * params.b2_expert_stride;
  float dot = 0.0f;
  for (int64_t c = threadIdx.x % 32; c < params.hidden_size; c += 32) {
    dot = fmaf(static_cast<float>(row[c]), static_cast<float>(bias[c * params.b2_stride]), dot);
  }
  return warp_sum(dot);
}

__device__ float sum_of_partials(const ScoreGradientParams& params, int64_t row) {
  float sum = 0.0f;
  for (int p = 0; p < params.num_partials; ++p) {
    sum += params.partials[row * params.partials_stride + p];
  }
  return sum;
}

__device__ int64_t slot_of(const ScoreGradientParams& params, int64_t row) {
  return params.row_to_slot == nullptr ? row : params.row_to_slot[row];
}

// One thread a row; blockIdx.y is the expert.
__global__ void __launch_bounds__(kThreads)
    score_gradient_kernel(const ScoreGradientParams params) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const int64_t first = params.expert_offsets[blockIdx.y];
  const int64_t count = params.expert_counts[blockIdx.y];
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    params.dscores[slot_of(params, first + i)] = sum_of_partials(params, first + i);
  }
}

// The same with <dO, b2>: one warp a row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    score_gradient_bias_kernel(const ScoreGradientParams params) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const int64_t first = params.expert_offsets[blockIdx.y];
  const int64_t count = params.expert_counts[blockIdx.y];
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < count;
       i += step) {
    const int64_t row = first + i;
    const int64_t token = params.row_to_token == nullptr ? row : params.row_to_token[row];
    const float sum = sum_of_partials(params, row) + bias_dot<T>(params, token, blockIdx.y);
    if (threadIdx.x % 32 == 0) params.dscores[slot_of(params, row)] = sum;
  }
}

struct BiasGradientParams {
  const void* values;
  int64_t values_stride;
  int64_t length;
  const float* scores;          // null: 1
  const int32_t* row_to_token;  // null: read row r itself
  const int32_t* row_to_slot;   // null: scores are per row
  const int32_t* expert_counts;
  const int32_t* expert_offsets;
  const uint8_t* trainable;  // null: all
  GroupedVector out[2];
  int64_t half_length;
  GradMode mode;
};

// A block owns 64 columns of one expert: 8 threads across, 32 walking the rows; the 32 partial
// sums are added in order.
constexpr int kColumnThreads = 8;
constexpr int kRowThreads = kThreads / kColumnThreads;
constexpr int kBlockColumns = kColumnThreads * kVector;

template <typename Out>
__device__ void put(void* address, int64_t index, float value, GradMode mode) {
  Out* out = static_cast<Out*>(address) + index;
  if (mode == GradMode::accumulate) value += static_cast<float>(*out);
  *out = static_cast<Out>(value);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) bias_gradient_kernel(const BiasGradientParams params) {
  __shared__ float sums[kRowThreads][kBlockColumns];
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const int64_t expert = blockIdx.y;
  if (params.trainable != nullptr && params.trainable[expert] == 0) return;
  const int64_t first = params.expert_offsets[expert];
  const int64_t count = params.expert_counts[expert];
  if (count == 0 && params.mode == GradMode::accumulate) return;
  const int row_thread = static_cast<int>(threadIdx.x) / kColumnThreads;
  const int local = static_cast<int>(threadIdx.x) % kColumnThreads * kVector;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kBlockColumns + local;

  Float8 sum = {};
  if (column < params.length) {
    for (int64_t i = row_thread; i < count; i += kRowThreads) {
      const int64_t row = first + i;
      const int64_t source = params.row_to_token == nullptr ? row : params.row_to_token[row];
      float score = 1.0f;
      if (params.scores != nullptr) {
        score = params.scores[params.row_to_slot == nullptr ? row : params.row_to_slot[row]];
      }
      const T* address =
          static_cast<const T*>(params.values) + source * params.values_stride + column;
      const Float8 value = widen<T>(*reinterpret_cast<const uint4*>(address));
#pragma unroll
      for (int c = 0; c < kVector; ++c) sum.v[c] = fmaf(score, value.v[c], sum.v[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < kVector; ++c) sums[row_thread][local + c] = sum.v[c];
  __syncthreads();
  const int64_t out_column = static_cast<int64_t>(blockIdx.x) * kBlockColumns + threadIdx.x;
  if (threadIdx.x >= kBlockColumns || out_column >= params.length) return;
  float total = 0.0f;
  for (int r = 0; r < kRowThreads; ++r) total += sums[r][threadIdx.x];
  const int half = out_column >= params.half_length ? 1 : 0;
  const GroupedVector& out = params.out[half];
  const int64_t index =
      expert * out.expert_stride + (out_column - half * params.half_length) * out.stride;
  if (out.dtype == DType::float32) {
    put<float>(out.data, index, total, params.mode);
  } else {
    put<T>(out.data, index, total, params.mode);
  }
}

// Enough blocks for a load four times the mean before one block takes a second round.
unsigned blocks_per_expert(const RowGroups& rows, int64_t rows_per_block) {
  const int64_t most = ceil_div(4 * rows.row_capacity, rows.num_experts());
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(most, rows_per_block), 1, 4096));
}

}  // namespace

void score_gradient(const ScoreGradientArgs& args, const Context& context) {
  check_clean_device("score_gradient");
  const int64_t num_scores = args.dscores.numel();
  if (num_scores == 0) return;
  const dim3 zeros(static_cast<unsigned>(ceil_div(num_scores, kThreads)));
  launch_dependent({"zero_kernel", zeros, kThreads}, context, zero_kernel, args.dscores.as<float>(),
                   num_scores);
  if (args.rows.row_capacity == 0) return;
  ScoreGradientParams params;
  params.partials = args.partials.as<float>();
  params.partials_stride = args.partials.stride(0);
  params.num_partials = static_cast<int32_t>(args.partials.size(1));
  params.d_output = args.d_output.data;
  params.d_output_stride = args.d_output.stride(0);
  params.hidden_size = args.d_output.size(1);
  params.b2 = args.b2.data;
  params.b2_expert_stride = args.b2.expert_stride;
  params.b2_stride = args.b2.stride;
  params.expert_counts = args.rows.expert_counts.as<int32_t>();
  params.expert_offsets = args.rows.expert_offsets.as<int32_t>();
  params.row_to_token = args.rows.row_to_token.as<int32_t>();
  params.row_to_slot = args.rows.row_to_slot.as<int32_t>();
  params.dscores = args.dscores.as<float>();
  const auto num_experts = static_cast<unsigned>(args.rows.num_experts());
  if (params.b2 == nullptr) {
    const dim3 grid(blocks_per_expert(args.rows, kThreads), num_experts);
    launch_dependent({"score_gradient_kernel", grid, kThreads}, context, score_gradient_kernel,
                     params);
  } else {
    const dim3 grid(blocks_per_expert(args.rows, kThreads / 32), num_experts);
    visit_storage(args.d_output.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      launch_dependent({"score_gradient_bias_kernel", grid, kThreads}, context,
                       score_gradient_bias_kernel<T>, params);
    });
  }
}

void bias_gradient(const BiasGradientArgs& args, const Context& context) {
  check_clean_device("bias_gradient");
  BiasGradientParams params;
  params.values = args.values.data;
  params.values_stride = args.values.stride(0);
  params.length = args.values.size(1);
  params.scores = args.scores.as<float>();
  const bool gathered = args.access == RowAccess::gathered;
  params.row_to_token = gathered ? args.rows.row_to_token.as<int32_t>() : nullptr;
  params.row_to_slot = args.rows.row_to_slot.as<int32_t>();
  params.expert_counts = args.rows.expert_counts.as<int32_t>();
  params.expert_offsets = args.rows.expert_offsets.as<int32_t>();
  params.trainable = args.trainable.as<uint8_t>();
  params.out[0] = args.out[0];
  params.out[1] = args.out[1];
  params.half_length = params.length / args.halves;
  params.mode = args.mode;
  const dim3 grid(static_cast<unsigned>(ceil_div(params.length, kBlockColumns)),
                  static_cast<unsigned>(args.rows.num_experts()));
  visit_storage(args.values.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_dependent({"bias_gradient_kernel", grid, kThreads}, context, bias_gradient_kernel<T>,
                     params);
  });
}

}  // namespace penstock::cuda
