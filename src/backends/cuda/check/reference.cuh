// SPDX-License-Identifier: Apache-2.0
//
// Plain float64 kernels, one thread an output element, that the products are judged by; and the
// measure of the numbers contract: relative L2 overall, by row and by 16-column block, and guard
// rows that must still be poison.
#pragma once

#include <cmath>

#include "backends/cuda/check/device_array.cuh"
#include "penstock/experts.h"

namespace penstock::cuda::check {

// (row, k) of token rows; `half_stride` apart where k runs over two halves.
struct RefRows {
  const void* data;
  int64_t row_stride;
  const int32_t* map;  // null: identity
};

struct RefMatrix {
  const void* half[2];
  int64_t expert_stride;
  int64_t n_stride;
  int64_t k_stride;
};

struct RefProduct {
  RefRows a;
  RefMatrix b;
  const void* bias[2];
  int64_t bias_expert_stride;
  int64_t bias_stride;
  const int32_t* expert_of_row;  // -1: a gap
  int64_t rows;
  int64_t n;  // of a half
  int64_t n_halves;
  int64_t k;  // of a half
  int64_t k_halves;
};

template <typename E>
__global__ void ref_rows(RefProduct p, double* out) {
  const int64_t columns = p.n * p.n_halves;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < p.rows * columns;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / columns;
    const int64_t half = i % columns / p.n;
    const int64_t column = i % columns % p.n;
    const int32_t expert = p.expert_of_row[row];
    if (expert < 0) continue;
    const int64_t token = p.a.map == nullptr ? row : p.a.map[row];
    const E* a = static_cast<const E*>(p.a.data) + token * p.a.row_stride;
    double sum = 0.0;
    for (int64_t kh = 0; kh < p.k_halves; ++kh) {
      const E* b = static_cast<const E*>(p.b.half[p.n_halves == 2 ? half : kh]) +
                   expert * p.b.expert_stride + column * p.b.n_stride;
      for (int64_t k = 0; k < p.k; ++k) {
        sum += static_cast<double>(static_cast<float>(a[kh * p.k + k])) *
               static_cast<double>(static_cast<float>(b[k * p.b.k_stride]));
      }
    }
    if (p.bias[half] != nullptr) {
      sum += static_cast<float>(static_cast<const E*>(
          p.bias[half])[expert * p.bias_expert_stride + column * p.bias_stride]);
    }
    out[i] = sum;
  }
}

struct RefGradient {
  RefRows left;
  RefRows right;
  const int32_t* counts;
  const int32_t* offsets;
  int64_t experts;
  int64_t rows;     // columns of left
  int64_t columns;  // columns of right
};

// (E, rows, columns)
template <typename L, typename E>
__global__ void ref_columns(RefGradient p, double* out) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
       i < p.experts * p.rows * p.columns; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t expert = i / (p.rows * p.columns);
    const int64_t row = i / p.columns % p.rows;
    const int64_t column = i % p.columns;
    double sum = 0.0;
    for (int64_t r = p.offsets[expert]; r < p.offsets[expert] + p.counts[expert]; ++r) {
      const int64_t l = p.left.map == nullptr ? r : p.left.map[r];
      const int64_t m = p.right.map == nullptr ? r : p.right.map[r];
      sum += static_cast<double>(static_cast<float>(
                 static_cast<const L*>(p.left.data)[l * p.left.row_stride + row])) *
             static_cast<double>(static_cast<float>(
                 static_cast<const E*>(p.right.data)[m * p.right.row_stride + column]));
    }
    out[i] = sum;
  }
}

// value, d value / d gate (or input), d value / d up
struct RefActivation {
  double value, gate, up;
};

__device__ inline RefActivation ref_activation(Activation kind, double g, double u) {
  const auto silu = [](double x) {
    const double s = 1.0 / (1.0 + exp(-x));
    return RefActivation{x * s, s * (1.0 + x * (1.0 - s)), 0.0};
  };
  const auto gelu = [](double x) {
    const double cdf = 0.5 * (1.0 + erf(x * 0.70710678118654752440));
    return RefActivation{x * cdf, cdf + x * 0.39894228040143267794 * exp(-0.5 * x * x), 0.0};
  };
  const auto gated = [u](RefActivation f) { return RefActivation{f.value * u, f.gate * u, f.value}; };
  switch (kind) {
    case Activation::swiglu:
      return gated(silu(g));
    case Activation::geglu:
      return gated(gelu(g));
    case Activation::reglu:
      return gated({g > 0 ? g : 0.0, g > 0 ? 1.0 : 0.0, 0.0});
    case Activation::swiglu_clamped: {
      const double alpha = 1.702f, limit = 7.0;
      const double gc = fmin(g, limit), uc = fmax(fmin(u, limit), -limit);
      const double s = 1.0 / (1.0 + exp(-alpha * gc));
      return {gc * s * (uc + 1.0),
              g <= limit ? s * (1.0 + alpha * gc * (1.0 - s)) * (uc + 1.0) : 0.0,
              fabs(u) <= limit ? gc * s : 0.0};
    }
    case Activation::silu:
      return silu(g);
    case Activation::gelu:
      return gelu(g);
    case Activation::gelu_tanh: {
      const double c = 0.79788456080286535588, t = tanh(c * (g + 0.044715 * g * g * g));
      return {0.5 * g * (1.0 + t),
              0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * c * (1.0 + 3 * 0.044715 * g * g), 0.0};
    }
    case Activation::relu:
      return {g > 0 ? g : 0.0, g > 0 ? 1.0 : 0.0, 0.0};
    case Activation::relu_squared:
      return {g > 0 ? g * g : 0.0, g > 0 ? 2.0 * g : 0.0, 0.0};
  }
  return {};
}

struct RefBackward {
  Activation kind;
  const void* h;
  const double* g;  // (rows, n)
  const float* scores;
  const int32_t* row_to_slot;
  const int32_t* expert_of_row;
  int64_t rows;
  int64_t n;
  int64_t halves;
  double* a;
  double* dh;
  double* a_scaled;
  double* ds;
};

// One thread a row: A, and with G also dH, A' and dS.
template <typename E>
__global__ void ref_activate(RefBackward p) {
  for (int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; row < p.rows;
       row += int64_t{gridDim.x} * blockDim.x) {
    if (p.expert_of_row[row] < 0) continue;
    const E* h = static_cast<const E*>(p.h) + row * p.n * p.halves;
    const double score = p.scores == nullptr ? 1.0 : p.scores[p.row_to_slot[row]];
    double ds = 0.0;
    for (int64_t j = 0; j < p.n; ++j) {
      const double gate = static_cast<float>(h[j]);
      const double up = p.halves == 2 ? static_cast<float>(h[p.n + j]) : 0.0f;
      const RefActivation f = ref_activation(p.kind, gate, up);
      if (p.a != nullptr) p.a[row * p.n + j] = f.value;
      if (p.g == nullptr) continue;
      const double g = p.g[row * p.n + j];
      p.dh[row * p.n * p.halves + j] = f.gate * score * g;
      if (p.halves == 2) p.dh[row * p.n * p.halves + p.n + j] = f.up * score * g;
      p.a_scaled[row * p.n + j] = score * f.value;
      ds += g * f.value;
    }
    if (p.ds != nullptr) p.ds[row] = ds;
  }
}

// What is compared: (row, column) of `got` at row * row_stride + column * column_stride.
struct Compared {
  const void* got;
  const double* want;
  const int32_t* keep;  // per row, negative: the row must still be poison; null: all rows count
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

struct Sums {
  double* row_error;
  double* row_norm;
  double* block_error;  // 16 columns
  double* block_norm;
  unsigned long long* wrong;   // elements that are not the rounded reference (integer inputs)
  unsigned long long* broken;  // guard elements overwritten, or NaN results
};

template <typename E>
__global__ void compare(Compared c, Sums sums) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < c.rows * c.columns;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / c.columns;
    const int64_t column = i % c.columns;
    const E value = static_cast<const E*>(c.got)[row * c.row_stride + column * c.column_stride];
    const float got = static_cast<float>(value);
    if (c.keep != nullptr && c.keep[row] < 0) {
      if (!isnan(got)) atomicAdd(sums.broken, 1ull);
      continue;
    }
    const double want = c.want[i];
    if (isnan(got)) atomicAdd(sums.broken, 1ull);
    if (static_cast<float>(static_cast<E>(static_cast<float>(want))) != got)
      atomicAdd(sums.wrong, 1ull);
    const double error = (got - want) * (got - want);
    atomicAdd(&sums.row_error[row], error);
    atomicAdd(&sums.row_norm[row], want * want);
    atomicAdd(&sums.block_error[column / 16], error);
    atomicAdd(&sums.block_norm[column / 16], want * want);
  }
}

}  // namespace penstock::cuda::check
