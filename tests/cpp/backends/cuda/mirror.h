// SPDX-License-Identifier: Apache-2.0
//
// A tensor that exists twice, on the host and on the GPU, for tests that run one operation on the
// reference backend and on the CUDA backend and compare. Device memory has poisoned guard bytes
// behind it; outputs start poisoned on both sides, so an element that was not written shows.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "penstock/penstock.h"
#include "tensor/half.h"

namespace penstock::testing {

inline constexpr size_t kGuardBytes = 4096;
inline constexpr unsigned char kPoison = 0xff;  // NaN in every float type, -1 in every integer

inline void cuda_ok(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

inline float read_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::bfloat16:
      return to_float(static_cast<const bfloat16*>(data)[index]);
    case DType::float16:
      return to_float(static_cast<const float16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

inline void write_float(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::bfloat16:
      static_cast<bfloat16*>(data)[index] = to_bfloat16(value);
      return;
    case DType::float16:
      static_cast<float16*>(data)[index] = to_float16(value);
      return;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

class Mirror {
 public:
  Mirror(DType dtype, std::initializer_list<int64_t> shape) {
    host_view_ = TensorView::contiguous(nullptr, dtype, shape);
    bytes_ = static_cast<size_t>(host_view_.bytes());
    host_.assign(bytes_ + kGuardBytes, kPoison);
    host_view_.data = host_.data();
    device_view_ = host_view_;
    device_view_.device = Device{DeviceType::cuda, 0};
    cuda_ok(cudaMalloc(&device_view_.data, bytes_ + kGuardBytes));
    cuda_ok(cudaMemset(device_view_.data, kPoison, bytes_ + kGuardBytes));
  }
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;
  Mirror(Mirror&& other) noexcept
      : host_(std::move(other.host_)),
        bytes_(other.bytes_),
        host_view_(other.host_view_),
        device_view_(std::exchange(other.device_view_, {})) {}
  ~Mirror() {
    if (device_view_.data != nullptr) static_cast<void>(cudaFree(device_view_.data));
  }

  const TensorView& host() const { return host_view_; }
  const TensorView& device() const { return device_view_; }
  int64_t numel() const { return host_view_.numel(); }
  float at(int64_t index) const { return read_float(host_.data(), host_view_.dtype, index); }
  template <typename T>
  T* data() {
    return reinterpret_cast<T*>(host_.data());
  }

  Mirror& normal(std::mt19937& random, float scale = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, scale);
    for (int64_t i = 0; i < numel(); ++i) {
      write_float(host_.data(), host_view_.dtype, i, distribution(random));
    }
    return upload();
  }
  Mirror& upload() {
    cuda_ok(cudaMemcpy(device_view_.data, host_.data(), bytes_, cudaMemcpyHostToDevice));
    return *this;
  }

  // What the GPU holds now; fails the test if a guard byte was written.
  std::vector<unsigned char> download() const {
    std::vector<unsigned char> all(bytes_ + kGuardBytes);
    cuda_ok(cudaMemcpy(all.data(), device_view_.data, all.size(), cudaMemcpyDeviceToHost));
    for (size_t i = bytes_; i < all.size(); ++i) {
      if (all[i] != kPoison) {
        ADD_FAILURE() << "guard byte " << i - bytes_ << " after a tensor was written";
        break;
      }
    }
    all.resize(bytes_);
    return all;
  }
  bool same_bits() const {
    const std::vector<unsigned char> device = download();
    return std::memcmp(device.data(), host_.data(), bytes_) == 0;
  }
  // || device - host || / || host ||, over the elements the reference wrote (not poison).
  double relative_error() const {
    const std::vector<unsigned char> device = download();
    double difference = 0.0;
    double norm = 0.0;
    for (int64_t i = 0; i < numel(); ++i) {
      const double expected = at(i);
      const double got = read_float(device.data(), host_view_.dtype, i);
      if (std::isnan(expected) && std::isnan(got)) continue;
      difference += (got - expected) * (got - expected);
      norm += expected * expected;
    }
    return norm == 0.0 ? std::sqrt(difference) : std::sqrt(difference / norm);
  }

 private:
  std::vector<unsigned char> host_;
  size_t bytes_ = 0;
  TensorView host_view_;
  TensorView device_view_;
};

}  // namespace penstock::testing
