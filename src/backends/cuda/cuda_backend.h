// SPDX-License-Identifier: Apache-2.0
//
// The one symbol that libpenstock_cuda exports. The core opens the library at run time, so that a
// machine without a GPU or driver still runs the CPU.
#pragma once

#include "backend/ops.h"

namespace penstock::cuda {

// Raised whenever Backend, an argument struct or a view changes its layout.
inline constexpr int kBackendAbi = 4;
inline constexpr char kBackendSymbol[] = "penstock_cuda_backend";

using BackendEntry = const Backend* (*)(int abi);

}  // namespace penstock::cuda

// Null if `abi` is not the one this library was built with.
extern "C" PENSTOCK_API const penstock::Backend* penstock_cuda_backend(int abi);
