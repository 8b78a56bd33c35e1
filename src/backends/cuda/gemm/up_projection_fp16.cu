// SPDX-License-Identifier: Apache-2.0
//
// up_projection for fp16, on its own so that the storage types compile side by side.
#include "backends/cuda/gemm/up_projection.cuh"

namespace penstock::cuda {

template void up_projection<__half>(const UpProjectionArgs&, const Context&);

}  // namespace penstock::cuda
