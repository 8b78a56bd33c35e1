// SPDX-License-Identifier: Apache-2.0
//
// What every kernel launch of this backend shares: the stream of the context, programmatic
// dependent launch, and turning a CUDA status into a penstock::Error that names the kernel. A fault
// left by earlier code is reported as such and is never blamed on the launch that met it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "penstock/backend.h"
#include "penstock/error.h"

namespace penstock::cuda {

inline cudaStream_t stream_of(const Context& context) {
  return static_cast<cudaStream_t>(context.stream);
}

[[noreturn]] inline void throw_status(const std::string& what, cudaError_t status,
                                      const std::string& remedy) {
  throw Error(
      ErrorCode::device_error,
      {what, std::string(cudaGetErrorName(status)) + " (" + cudaGetErrorString(status) + ")",
       "cudaSuccess", remedy});
}

inline void check(const char* call, cudaError_t status) {
  if (status != cudaSuccess) {
    throw_status(call, status, "See the CUDA documentation of this status.");
  }
}

// Called before the first launch of an operation.
inline void check_clean_device(const char* operation) {
  const cudaError_t status = cudaPeekAtLastError();
  if (status != cudaSuccess) {
    throw_status(std::string("the device, before ") + operation, status,
                 "Earlier work on this device failed; find it with CUDA_LAUNCH_BLOCKING=1 or "
                 "compute-sanitizer.");
  }
}

// Called right after a launch.
inline void check_launch(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw_status(std::string("launch of ") + kernel, status,
                 "Please report this with the shape of the call.");
  }
}

// Multiprocessors that the launches of this call may occupy.
inline int64_t multiprocessors(const Context& context) {
  int device = 0;
  int count = 0;
  check("cudaGetDevice", cudaGetDevice(&device));
  check("cudaDeviceGetAttribute",
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return context.sm_budget > 0 ? std::min<int64_t>(context.sm_budget, count) : count;
}

// How a kernel is started.
struct Launch {
  const char* kernel;  // its name in errors
  dim3 grid;
  unsigned threads;  // of a block
  int64_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks
};

// Starts a kernel that may begin before the one ahead of it in the stream has ended: all of its
// threads call arch::wait_for_earlier_launches() before they touch global memory.
template <typename... Params>
void launch_dependent(const Launch& launch, const Context& context, void (*kernel)(Params...),
                      const std::type_identity_t<Params>&... params) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {launch.cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = stream_of(context);
  config.attrs = attributes;
  config.numAttrs = 2;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, params...);
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // ours to report, not the next call's to meet
    throw_status(std::string("launch of ") + launch.kernel, status,
                 "Please report this with the shape of the call.");
  }
}

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

}  // namespace penstock::cuda
