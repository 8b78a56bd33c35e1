// SPDX-License-Identifier: Apache-2.0
//
// down_backward for fp16, on its own so that the storage types compile side by side.
#include "backends/cuda/gemm/down_backward.cuh"

namespace penstock::cuda {

template void down_backward<__half>(const DownBackwardArgs&, const Context&);

}  // namespace penstock::cuda
