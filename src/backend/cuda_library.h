// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend/ops.h"

namespace penstock {

// The CUDA backend from libpenstock_cuda.so, or a table without operations whose why_unavailable
// tells why the library could not be opened.
const Backend& cuda_backend();

}  // namespace penstock
