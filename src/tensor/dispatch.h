// SPDX-License-Identifier: Apache-2.0
//
// From a run-time dtype to compile-time types: visit_floating(dtype, f) calls f(StorageTag<T>{})
// with T one of double, float, float16, bfloat16; inside, `load` and `store` convert between T and
// Accumulator<T> (double for double, float otherwise; a store rounds once, to nearest even).
// visit_index does the same for the integer types of ids. Used by the CPU backends; callers have
// checked the dtype before, so a dtype outside the set is a defect of ours and still throws.
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include "penstock/dtype.h"
#include "penstock/error.h"
#include "tensor/half.h"

namespace penstock {

template <typename T>
struct StorageTag {
  using type = T;
};

// The type in which values of storage type T are multiplied and summed.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline double load(double value) { return value; }
inline float load(float value) { return value; }
inline float load(bfloat16 value) { return to_float(value); }
inline float load(float16 value) { return to_float(value); }

inline void store(double& to, double value) { to = value; }
inline void store(float& to, float value) { to = value; }
inline void store(bfloat16& to, float value) { to = to_bfloat16(value); }
inline void store(float16& to, float value) { to = to_float16(value); }

[[noreturn]] inline void throw_unexpected_dtype(DType dtype, const char* expected) {
  throw Error(ErrorCode::invalid_argument, {"dtype", std::string(name_of(dtype)), expected,
                                            "Convert the tensor to one of these types."});
}

template <typename Function>
decltype(auto) visit_floating(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::float64:
      return std::forward<Function>(function)(StorageTag<double>{});
    case DType::float32:
      return std::forward<Function>(function)(StorageTag<float>{});
    case DType::float16:
      return std::forward<Function>(function)(StorageTag<float16>{});
    case DType::bfloat16:
      return std::forward<Function>(function)(StorageTag<bfloat16>{});
    case DType::int32:
    case DType::int64:
    case DType::uint8:
      break;
  }
  throw_unexpected_dtype(dtype, "float64, float32, float16 or bfloat16");
}

// Scores, logits, partial sums: float or double.
template <typename Function>
decltype(auto) visit_accumulator(DType dtype, Function&& function) {
  if (dtype == DType::float64) return std::forward<Function>(function)(StorageTag<double>{});
  if (dtype == DType::float32) return std::forward<Function>(function)(StorageTag<float>{});
  throw_unexpected_dtype(dtype, "float32 or float64");
}

template <typename Function>
decltype(auto) visit_index(DType dtype, Function&& function) {
  if (dtype == DType::int32) return std::forward<Function>(function)(StorageTag<int32_t>{});
  if (dtype == DType::int64) return std::forward<Function>(function)(StorageTag<int64_t>{});
  throw_unexpected_dtype(dtype, "int32 or int64");
}

}  // namespace penstock
