// SPDX-License-Identifier: Apache-2.0
//
// What every kernel launch of this backend shares: the stream of the context, and turning a CUDA
// status into a penstock::Error that names the kernel. A fault left by earlier code is reported as
// such and is never blamed on the launch that met it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

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

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

}  // namespace penstock::cuda
