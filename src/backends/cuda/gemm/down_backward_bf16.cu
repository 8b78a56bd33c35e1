// SPDX-License-Identifier: Apache-2.0
//
// down_backward for bf16, on its own so that the storage types compile side by side.
#include "backends/cuda/gemm/down_backward.cuh"

namespace penstock::cuda {

template void down_backward<__nv_bfloat16>(const DownBackwardArgs&, const Context&);

}  // namespace penstock::cuda
