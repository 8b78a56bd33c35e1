// SPDX-License-Identifier: Apache-2.0
//
// What the check program runs: layers, the router's products, and timings.
#pragma once

#include "backends/cuda/check/compare.h"
#include "backends/cuda/check/layer.cuh"
#include "penstock/error.h"

namespace penstock::cuda::check {

struct CheckCase {
  std::string name;
  DType dtype;
  LayerShape shape;
  Variant variant;
};

void check_layer(Report& report, const CheckCase& test);
void check_router(Report& report, DType dtype, int64_t tokens, int64_t d, int64_t experts);
void time_products(const char* name, const LayerShape& shape);

template <typename T>
__global__ void ones(T* data, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    data[i] = static_cast<T>(1.0f);
  }
}

static __global__ void add_one(double* data, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    data[i] += 1.0;
  }
}

}  // namespace penstock::cuda::check
