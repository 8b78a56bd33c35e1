// SPDX-License-Identifier: Apache-2.0
//
// Encodes tensor maps and checks what they and 16-byte copies need.
#include "backends/cuda/gemm/tensor_map.h"

#include <cuda_runtime_api.h>

#include <string>

#include "penstock/error.h"

namespace penstock::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t status = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    throw Error(ErrorCode::device_error,
                {"CUDA driver", "no cuTensorMapEncodeTiled", "a driver for CUDA 12 or later",
                 "Update the NVIDIA driver, or run on the CPU."});
  }
  return reinterpret_cast<Encode>(entry);
}

}  // namespace

CUtensorMap make_tensor_map(const TensorMapSpec& spec) {
  CUtensorMap map = {};
  cuuint64_t sizes[3];
  for (size_t i = 0; i < 3; ++i) {
    if (spec.size[i] == 0) return map;
    sizes[i] = static_cast<cuuint64_t>(spec.size[i]);
  }
  require_vectors(spec.what, spec.data, {spec.stride[0], spec.stride[1]});
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(spec.stride[0] * 2),
                                 static_cast<cuuint64_t>(spec.stride[1] * 2)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(spec.box[0]),
                             static_cast<cuuint32_t>(spec.box[1]),
                             static_cast<cuuint32_t>(spec.box[2])};
  const cuuint32_t steps[3] = {1, 1, 1};
  static const Encode encode = find_encoder();
  const CUresult result =
      encode(&map,
             spec.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             3, const_cast<void*>(spec.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(ErrorCode::device_error,
                {std::string("tensor map of ") + spec.what,
                 "driver error " + std::to_string(static_cast<int>(result)) + " for sizes " +
                     std::to_string(spec.size[0]) + ", " + std::to_string(spec.size[1]) + ", " +
                     std::to_string(spec.size[2]) + " and strides " +
                     std::to_string(spec.stride[0]) + ", " + std::to_string(spec.stride[1]),
                 "strides below 2^39 elements and sizes below 2^32",
                 "Pass a contiguous tensor, or run on the CPU."});
  }
  return map;
}

void require_vectors(const char* what, const void* data, std::initializer_list<int64_t> strides) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) {
    throw Error(ErrorCode::invalid_argument,
                {what, "a pointer that is not 16-byte aligned", "16-byte alignment",
                 "Pass a tensor whose storage offset is a multiple of 8 elements."});
  }
  for (const int64_t stride : strides) {
    if (stride % 8 != 0) {
      throw Error(ErrorCode::invalid_argument,
                  {what, "a stride of " + std::to_string(stride) + " elements",
                   "strides that are multiples of 8", "Pass a contiguous tensor."});
    }
  }
}

}  // namespace penstock::cuda
