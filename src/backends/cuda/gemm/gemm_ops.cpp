// SPDX-License-Identifier: Apache-2.0
//
// The launchers by storage type, and what the backend table asks about the products.
#include "backends/cuda/gemm/gemm_ops.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "backends/cuda/gemm/config.h"
#include "backends/cuda/gemm/products.h"
#include "penstock/error.h"

namespace penstock::cuda {
namespace {

// Calls bf16 or fp16 by dtype. why_not_products has refused every other dtype.
template <typename Args>
void by_dtype(DType dtype, void (*bf16)(const Args&, const Context&),
              void (*fp16)(const Args&, const Context&), const Args& args, const Context& context) {
  if (dtype == DType::bfloat16) return bf16(args, context);
  if (dtype == DType::float16) return fp16(args, context);
  throw Error(ErrorCode::unsupported, {"dtype", std::string(name_of(dtype)), "bfloat16 or float16",
                                       "Convert the tensors, or run on the CPU."});
}

// The experts' problem names its sizes to the backend before a call; the router's does not, and a
// tensor map would blame the strides of x. fp32 has kernels of its own, for any size.
void require_router_size(const TensorView& x) {
  constexpr int64_t kGranule = 8;  // 16 bytes, what a tensor map's rows are multiples of
  if (x.size(1) % kGranule != 0)
    throw Error(ErrorCode::unsupported,
                {"hidden_size", std::to_string(x.size(1)),
                 "a multiple of 8 for a router in " + std::string(name_of(x.dtype)),
                 "Pad x and the router's weight, pass them in float32, or run on the CPU."});
}

}  // namespace

std::string why_not_products(const ExpertsProblem& problem) {
  if (std::string reason = why_not_shape(problem); !reason.empty()) return reason;
  return why_not_adapters(problem);
}

std::string why_not_products_dtype(DType dtype) {
  if (dtype == DType::bfloat16 || dtype == DType::float16) return {};
  return "dtype " + std::string(name_of(dtype)) + " (it runs bfloat16 and float16)";
}

std::string why_not_router_dtype(DType dtype) {
  if (dtype == DType::float32) return {};
  if (why_not_products_dtype(dtype).empty()) return {};
  return "dtype " + std::string(name_of(dtype)) +
         " (its router runs bfloat16, float16 and float32)";
}

// Every expert product works in registers and shared memory alone.
int64_t products_scratch_bytes(const ExpertsProblem&) { return 0; }

int64_t score_partials(const ExpertsProblem& problem) {
  return score_partials_of(problem.intermediate_size);
}

int64_t tile_rows(const ExpertsProblem& problem) {
  return token_tile(problem.row_capacity, problem.num_experts);
}

void launch_up_projection(const UpProjectionArgs& args, const Context& context) {
  by_dtype(args.x.dtype, up_projection<__nv_bfloat16>, up_projection<__half>, args, context);
}

void launch_down_projection(const DownProjectionArgs& args, const Context& context) {
  by_dtype(args.a.dtype, down_projection<__nv_bfloat16>, down_projection<__half>, args, context);
}

void launch_down_backward(const DownBackwardArgs& args, const Context& context) {
  by_dtype(args.h.dtype, down_backward<__nv_bfloat16>, down_backward<__half>, args, context);
}

void launch_up_backward(const UpBackwardArgs& args, const Context& context) {
  by_dtype(args.dh.dtype, up_backward<__nv_bfloat16>, up_backward<__half>, args, context);
}

void launch_weight_gradient(const WeightGradientArgs& args, const Context& context) {
  by_dtype(args.left.dtype, weight_gradient<__nv_bfloat16>, weight_gradient<__half>, args, context);
}

void launch_router_logits(const RouterLogitsArgs& args, const Context& context) {
  if (args.x.dtype == DType::float32) return router_logits<float>(args, context);
  require_router_size(args.x);
  by_dtype(args.x.dtype, router_logits<__nv_bfloat16>, router_logits<__half>, args, context);
}

void launch_router_logits_backward(const RouterLogitsBackwardArgs& args, const Context& context) {
  if (args.x.dtype == DType::float32) return router_logits_backward<float>(args, context);
  require_router_size(args.x);
  by_dtype(args.x.dtype, router_logits_backward<__nv_bfloat16>, router_logits_backward<__half>,
           args, context);
}

}  // namespace penstock::cuda
