// SPDX-License-Identifier: Apache-2.0
//
// weight_gradient for bf16, on its own so that the storage types compile side by side.
#include "backends/cuda/gemm/weight_gradient.cuh"

namespace penstock::cuda {

template void weight_gradient<__nv_bfloat16>(const WeightGradientArgs&, const Context&);

}  // namespace penstock::cuda
