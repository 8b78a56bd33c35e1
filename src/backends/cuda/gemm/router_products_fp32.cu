// SPDX-License-Identifier: Apache-2.0
//
// The router's products for fp32 tensors (a router kept wider than its layer, or autocast): plain
// fused multiply-adds, because one tensor-core pass in tf32 would lose 13 bits of the logits.
//
// One kernel for all three products, C(i, j) = sum_k A(i, k) B(j, k) with free strides. A tile is
// 64 x 64, 16 k at a time; the 16 products of a step are summed before they join the total, which
// keeps the error of a sum of n near that of one of n / 16. The weight's gradient reduces over the
// tokens, so it is cut into slices that a second launch adds in order.
#include <algorithm>

#include "backends/cuda/arch/launch.cuh"
#include "backends/cuda/gemm/products.h"
#include "backends/cuda/gemm/router_scratch.h"
#include "backends/cuda/launch.h"

namespace penstock::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kStep = 16;
constexpr int kThreads = 256;
constexpr int kPerThread = kTile / 16;  // rows and columns of C that a thread owns
constexpr int kPadded = kTile + 4;      // keeps 16-byte reads aligned and off one bank

// (i, k) at data + i * outer + k * inner, zero past rows and k.
struct Side {
  const float* data;
  int64_t outer;
  int64_t inner;
  int64_t rows;
};

struct Fp32Product {
  Side a;
  Side b;
  int64_t k_extent;
  int64_t k_slice;  // of one blockIdx.z, a multiple of kStep
  float* out;       // (slices, rows of a, rows of b), rows packed
  int64_t row_stride;
  const float* addend = nullptr;  // (rows of a, rows of b), null: none
  int64_t addend_stride = 0;
};

// kTile x kStep elements of one side, the contiguous axis across neighbouring threads.
__device__ void load_side(const Side& side, int64_t first_row, int64_t k, int64_t k_end,
                          float (&shared)[kStep][kPadded]) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kTile * kStep / kThreads; ++i) {
    const int index = thread + i * kThreads;
    const int row = side.inner == 1 ? index / kStep : index % kTile;
    const int step = side.inner == 1 ? index % kStep : index / kTile;
    const bool exists = first_row + row < side.rows && k + step < k_end;
    shared[step][row] =
        exists ? side.data[(first_row + row) * side.outer + (k + step) * side.inner] : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads) fp32_product_kernel(const Fp32Product params) {
  __shared__ float a[kStep][kPadded];
  __shared__ float b[kStep][kPadded];
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t k_begin = blockIdx.z * params.k_slice;
  const int64_t k_end = min(k_begin + params.k_slice, params.k_extent);
  const int row = static_cast<int>(threadIdx.x) / 16 * kPerThread;
  const int column = static_cast<int>(threadIdx.x) % 16 * kPerThread;
  float sums[kPerThread][kPerThread] = {};
  for (int64_t k = k_begin; k < k_end; k += kStep) {
    load_side(params.a, first_row, k, k_end, a);
    load_side(params.b, first_column, k, k_end, b);
    __syncthreads();
    float step_sums[kPerThread][kPerThread] = {};
#pragma unroll
    for (int step = 0; step < kStep; ++step) {
      const float4 left = *reinterpret_cast<const float4*>(&a[step][row]);
      const float4 right = *reinterpret_cast<const float4*>(&b[step][column]);
      const float lefts[kPerThread] = {left.x, left.y, left.z, left.w};
      const float rights[kPerThread] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) {
          step_sums[i][j] = fmaf(lefts[i], rights[j], step_sums[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) sums[i][j] += step_sums[i][j];
    }
    __syncthreads();
  }
  float* out = params.out + blockIdx.z * params.a.rows * params.row_stride;
  for (int i = 0; i < kPerThread && first_row + row + i < params.a.rows; ++i) {
    for (int j = 0; j < kPerThread && first_column + column + j < params.b.rows; ++j) {
      float sum = sums[i][j];
      if (params.addend != nullptr) {
        sum +=
            params.addend[(first_row + row + i) * params.addend_stride + first_column + column + j];
      }
      out[(first_row + row + i) * params.row_stride + first_column + column + j] = sum;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    add_slices_kernel(const float* partials, int32_t slices, int64_t count, float* out) {
  arch::wait_for_earlier_launches();
  arch::let_later_launches_start();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  float sum = 0.0f;
  for (int32_t slice = 0; slice < slices; ++slice) sum += partials[slice * count + index];
  out[index] = sum;
}

void launch_product(const Fp32Product& product, const char* name, const Context& context) {
  const int64_t slices = std::max<int64_t>(1, ceil_div(product.k_extent, product.k_slice));
  const dim3 grid(static_cast<unsigned>(ceil_div(product.a.rows, kTile)),
                  static_cast<unsigned>(ceil_div(product.b.rows, kTile)),
                  static_cast<unsigned>(slices));
  launch_dependent({name, grid, kThreads}, context, fp32_product_kernel, product);
}

void weight_gradient_fp32(const RouterLogitsBackwardArgs& args, const Context& context) {
  const int64_t num_tokens = args.x.size(0);
  const int64_t num_experts = args.dlogits.size(1);
  const int64_t hidden_size = args.x.size(1);
  const RouterProblem problem = {num_tokens, hidden_size, num_experts, args.x.dtype, args.x.device};
  const RouterScratch layout = router_scratch(problem);
  auto* partials =
      reinterpret_cast<float*>(static_cast<uint8_t*>(args.workspace.data) + layout.partials);
  const int64_t slice = ceil_div(ceil_div(num_tokens, layout.slices), kStep) * kStep;
  const Side dlogits = {args.dlogits.as<float>(), 1, args.dlogits.stride(0), num_experts};
  const Side x = {args.x.as<float>(), 1, args.x.stride(0), hidden_size};
  launch_product({dlogits, x, num_tokens, std::max<int64_t>(slice, kStep), partials, hidden_size},
                 "router weight gradient", context);
  const int64_t count = num_experts * hidden_size;
  const auto used = static_cast<int32_t>(
      std::max<int64_t>(1, ceil_div(num_tokens, std::max<int64_t>(slice, kStep))));
  const dim3 blocks(static_cast<unsigned>(ceil_div(count, kThreads)));
  launch_dependent({"add_slices_kernel", blocks, kThreads}, context, add_slices_kernel, partials,
                   used, count, args.drouter_weight.as<float>());
}

}  // namespace

template <>
void router_logits<float>(const RouterLogitsArgs& args, const Context& context) {
  check_clean_device("router_logits");
  const int64_t hidden_size = args.x.size(1);
  const Side x = {args.x.as<float>(), args.x.stride(0), 1, args.x.size(0)};
  const Side weight = {args.router_weight.as<float>(), args.router_weight.stride(0), 1,
                       args.router_weight.size(0)};
  launch_product({x, weight, hidden_size, ceil_div(hidden_size, kStep) * kStep,
                  args.logits.as<float>(), args.logits.stride(0)},
                 "router_logits", context);
}

template <>
void router_logits_backward<float>(const RouterLogitsBackwardArgs& args, const Context& context) {
  check_clean_device("router_logits_backward");
  const int64_t num_experts = args.dlogits.size(1);
  if (args.dx.present() && args.x.size(0) > 0) {
    const Side dlogits = {args.dlogits.as<float>(), args.dlogits.stride(0), 1, args.x.size(0)};
    const Side weight = {args.router_weight.as<float>(), 1, args.router_weight.stride(0),
                         args.x.size(1)};
    launch_product({dlogits, weight, num_experts, ceil_div(num_experts, kStep) * kStep,
                    args.dx.as<float>(), args.dx.stride(0), args.addend.as<float>(),
                    args.addend.present() ? args.addend.stride(0) : 0},
                   "router input gradient", context);
  }
  if (args.drouter_weight.present()) weight_gradient_fp32(args, context);
}

}  // namespace penstock::cuda
