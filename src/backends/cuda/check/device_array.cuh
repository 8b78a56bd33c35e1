// SPDX-License-Identifier: Apache-2.0
//
// Device memory of the check program: arrays filled with random values, with small integers or with
// poison (every byte 0xff, a NaN in each of our types), and the CUDA errors that stop it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace penstock::cuda::check {

inline void require(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

enum class Values : uint8_t { random, integers };

__device__ inline uint64_t mix(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return x ^ (x >> 33);
}

// Uniform in (-sqrt 3, sqrt 3) times scale (unit variance), or integers -1, 0, 1.
template <typename T>
__global__ void fill(T* data, int64_t count, uint64_t seed, float scale, Values values) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint64_t bits = mix(seed * 0x9e3779b97f4a7c15ull + i);
    const float unit = static_cast<float>(bits >> 40) * 0x1p-24f;
    const float value = values == Values::integers
                            ? static_cast<float>(static_cast<int>(bits % 3) - 1)
                            : (2.0f * unit - 1.0f) * 1.7320508f * scale;
    data[i] = static_cast<T>(value);
  }
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count = 0) : count_(count) {
    if (count_ > 0) require(cudaMalloc(&data_, count_ * sizeof(T)), "cudaMalloc");
    poison();
  }
  explicit DeviceArray(const std::vector<T>& host)
      : DeviceArray(static_cast<int64_t>(host.size())) {
    require(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  DeviceArray(DeviceArray&& other) noexcept : data_(other.data_), count_(other.count_) {
    other.data_ = nullptr;
    other.count_ = 0;
  }
  ~DeviceArray() { cudaFree(data_); }

  void poison() { require(cudaMemset(data_, 0xff, count_ * sizeof(T)), "poison"); }
  void zero() { require(cudaMemset(data_, 0, count_ * sizeof(T)), "zero"); }
  void randomise(uint64_t seed, float scale, Values values) {
    if (count_ > 0) fill<<<1024, 256>>>(data_, count_, seed, scale, values);
    require(cudaGetLastError(), "fill");
  }

  T* data() const { return data_; }
  int64_t count() const { return count_; }
  std::vector<T> host() const {
    std::vector<T> copy(static_cast<size_t>(count_));
    require(cudaMemcpy(copy.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return copy;
  }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace penstock::cuda::check
