// SPDX-License-Identifier: Apache-2.0
//
// The Hopper backend's table: which GPU it needs, which problems it runs and why not others, and
// one entry per operation. Every entry makes the tensors' device current for its launches.
#include "backends/cuda/cuda_backend.h"

#include <string>

#include "backends/cuda/bandwidth/bandwidth_ops.h"
#include "backends/cuda/gemm/gemm_ops.h"
#include "backends/cuda/launch.h"

namespace penstock::cuda {
namespace {

constexpr int kVectorElements = 8;  // 16-byte accesses of 16-bit elements

class DeviceGuard {
 public:
  explicit DeviceGuard(Device device) {
    check("cudaGetDevice", cudaGetDevice(&previous_));
    // Also where it is current already: a thread that has made no CUDA call yet (autograd's) has no
    // context, which the driver needs to encode tensor maps.
    check("cudaSetDevice", cudaSetDevice(device.index));
    changed_ = previous_ != device.index;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

Device device_of(const RouterLogitsArgs& args) { return args.x.device; }
Device device_of(const RouterLogitsBackwardArgs& args) { return args.x.device; }
Device device_of(const RouterForwardArgs& args) { return args.logits.device; }
Device device_of(const RouterBackwardArgs& args) { return args.dlogits.device; }
Device device_of(const PlanArgs& args) { return args.routing.ids.device; }
Device device_of(const CombineArgs& args) { return args.output.device; }
// Every other operation works on rows.
template <typename Args>
Device device_of(const Args& args) {
  return args.rows.expert_counts.device;
}

template <auto operation, typename Args>
void on_device(const Args& args, const Context& context) {
  const DeviceGuard guard(device_of(args));
  operation(args, context);
}

std::string driver_reason(cudaError_t status) {
  return std::string("no usable GPU: ") + cudaGetErrorName(status) + " (" +
         cudaGetErrorString(status) + "); a build with CUDA 13 needs driver 580 or newer";
}

std::string device_reason(int index) {
  int major = 0;
  int minor = 0;
  cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  }
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // ours to report, not the next call's to meet
    return driver_reason(status);
  }
  if (major == 9 && minor == 0) return {};
  return "cuda:" + std::to_string(index) + " has compute capability " + std::to_string(major) +
         "." + std::to_string(minor) +
         ", the kernels are built for 9.0 (H100, H200); run on the CPU, or, from Python, choose "
         "torch's own products by name: penstock.backend(\"torch\")";
}

std::string description() {
  cudaDeviceProp properties;
  int driver = 0;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess ||
      cudaDriverGetVersion(&driver) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return "Hopper kernels (sm_90a)";
  }
  return std::string("Hopper kernels (sm_90a) on ") + properties.name + ", " +
         std::to_string(properties.multiProcessorCount) + " SMs, driver for CUDA " +
         std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
}

std::string why_unavailable() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return driver_reason(status);
  }
  if (count == 0) return "no GPU is visible to this process (see CUDA_VISIBLE_DEVICES)";
  return device_reason(0);
}

std::string why_not(const ExpertsProblem& problem) {
  if (std::string reason = why_not_products_dtype(problem.dtype); !reason.empty()) return reason;
  if (std::string reason = device_reason(problem.device.index); !reason.empty()) return reason;
  if (problem.hidden_size % kVectorElements != 0 ||
      problem.intermediate_size % kVectorElements != 0) {
    return "hidden_size " + std::to_string(problem.hidden_size) + " and intermediate_size " +
           std::to_string(problem.intermediate_size) + " must be multiples of 8";
  }
  if (problem.num_experts > kMaxExperts) {
    return "num_experts " + std::to_string(problem.num_experts) + " is above " +
           std::to_string(kMaxExperts);
  }
  if (std::string reason = why_not_products(problem); !reason.empty()) return reason;
  return {};
}

int64_t scratch_bytes(const ExpertsProblem& problem, const Context&) {
  return products_scratch_bytes(problem);
}

int64_t router_scratch_bytes(const RouterProblem& problem, const Context&) {
  return router_products_scratch_bytes(problem);
}

const Backend kBackend = {
    .name = "cuda",
    .device = DeviceType::cuda,
    .priority = 10,
    .description = description,
    .why_unavailable = why_unavailable,
    .why_not = why_not,
    .why_not_dtype = why_not_router_dtype,
    .why_not_router = why_not_router,
    .scratch_bytes = scratch_bytes,
    .router_scratch_bytes = router_scratch_bytes,
    .route_scratch_bytes = route_scratch_bytes,
    .plan_scratch_bytes = plan_scratch_bytes,
    .score_partials = score_partials,
    .tile_rows = tile_rows,
    .router_logits = on_device<launch_router_logits, RouterLogitsArgs>,
    .router_logits_backward = on_device<launch_router_logits_backward, RouterLogitsBackwardArgs>,
    .router_forward = on_device<route_forward, RouterForwardArgs>,
    .router_backward = on_device<route_backward, RouterBackwardArgs>,
    .build_plan = on_device<build_plan, PlanArgs>,
    .up_projection = on_device<launch_up_projection, UpProjectionArgs>,
    .down_projection = on_device<launch_down_projection, DownProjectionArgs>,
    .combine = on_device<combine, CombineArgs>,
    .scale_rows = on_device<scale_rows, ScaleRowsArgs>,
    .down_backward = on_device<launch_down_backward, DownBackwardArgs>,
    .score_gradient = on_device<score_gradient, ScoreGradientArgs>,
    .up_backward = on_device<launch_up_backward, UpBackwardArgs>,
    .weight_gradient = on_device<launch_weight_gradient, WeightGradientArgs>,
    .bias_gradient = on_device<bias_gradient, BiasGradientArgs>,
};

}  // namespace
}  // namespace penstock::cuda

const penstock::Backend* penstock_cuda_backend(int abi) {
  return abi == penstock::cuda::kBackendAbi ? &penstock::cuda::kBackend : nullptr;
}
