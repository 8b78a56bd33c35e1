// SPDX-License-Identifier: Apache-2.0
//
// Element types that tensors may have, and their sizes and names.
// bf16 and fp16 are storage types: every product and sum is accumulated in fp32 (float64 for
// float64 storage). Integers only hold ids, counts and offsets.
#pragma once

#include <cstdint>
#include <string_view>

namespace penstock {

enum class DType : uint8_t { float64, float32, float16, bfloat16, int32, int64, uint8 };

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::float16:
    case DType::bfloat16:
      return 2;
    case DType::uint8:
      return 1;
  }
  return 0;
}

constexpr std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return "float64";
    case DType::float32:
      return "float32";
    case DType::float16:
      return "float16";
    case DType::bfloat16:
      return "bfloat16";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
    case DType::uint8:
      return "uint8";
  }
  return "unknown";
}

constexpr bool is_floating(DType dtype) {
  return dtype == DType::float64 || dtype == DType::float32 || dtype == DType::float16 ||
         dtype == DType::bfloat16;
}

// The type in which scores, logits, sums and dS are kept for tensors of `dtype`.
constexpr DType accumulator_of(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

}  // namespace penstock
