// SPDX-License-Identifier: Apache-2.0
//
// Tensor maps (TMA descriptors) on the host: a 3-D view of a 2-byte matrix, 128-byte swizzled, with
// zeros for everything outside. The encoder is a driver function, found through the runtime so that
// the library needs no libcuda to load.
//
// Called by the launchers, once per operand and launch; the maps travel as kernel parameters.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

#include "penstock/dtype.h"

namespace penstock::cuda {

struct TensorMapSpec {
  const char* what;  // the operand, for errors
  const void* data;
  DType dtype;
  std::array<int64_t, 3> size;    // elements, contiguous dimension first
  std::array<int64_t, 2> stride;  // elements, of dimensions 1 and 2
  std::array<int32_t, 3> box;
};

// An empty tensor gets an unusable map: no tile of it is ever loaded.
CUtensorMap make_tensor_map(const TensorMapSpec& spec);

// Throws invalid_argument naming `what` unless 16-byte copies fit the pointer and the strides.
void require_vectors(const char* what, const void* data, std::initializer_list<int64_t> strides);

}  // namespace penstock::cuda
