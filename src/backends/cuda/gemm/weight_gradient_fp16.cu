// SPDX-License-Identifier: Apache-2.0
//
// weight_gradient for fp16, on its own so that the storage types compile side by side.
#include "backends/cuda/gemm/weight_gradient.cuh"

namespace penstock::cuda {

template void weight_gradient<__half>(const WeightGradientArgs&, const Context&);

}  // namespace penstock::cuda
