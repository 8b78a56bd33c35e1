// SPDX-License-Identifier: Apache-2.0
//
// Elements of vectors whose dtype is not the one a loop is templated on: scores, partial sums and
// logits (float32 or float64, whatever the storage dtype), and gradients (the weights' dtype or a
// float32 accumulator). For one value a row; inner loops use load and store of tensor/dispatch.h.
#pragma once

#include <cstdint>

#include "penstock/tensor.h"
#include "tensor/dispatch.h"

namespace penstock::cpu {

template <typename Acc>
Acc value_at(const TensorView& vector, int64_t index) {
  const int64_t offset = index * vector.stride(0);
  return vector.dtype == DType::float64 ? static_cast<Acc>(vector.as<const double>()[offset])
                                        : static_cast<Acc>(vector.as<const float>()[offset]);
}

template <typename Acc>
void set_value(const TensorView& vector, int64_t index, Acc value) {
  const int64_t offset = index * vector.stride(0);
  if (vector.dtype == DType::float64) {
    vector.as<double>()[offset] = static_cast<double>(value);
  } else {
    vector.as<float>()[offset] = static_cast<float>(value);
  }
}

// First element of row `row` of a matrix whose last axis is contiguous.
template <typename T>
T* row_of(const TensorView& matrix, int64_t row) {
  return matrix.as<T>() + row * matrix.stride(0);
}

// Calls function(StorageTag<T>{}) with T the type of a gradient: Storage itself or float.
template <typename Storage, typename Function>
void visit_gradient(DType storage, DType gradient, Function&& function) {
  if (gradient == storage) return function(StorageTag<Storage>{});
  if (gradient == DType::float32) return function(StorageTag<float>{});
  throw_unexpected_dtype(gradient, "the weights' dtype or float32");
}

}  // namespace penstock::cpu
