// SPDX-License-Identifier: Apache-2.0
//
// The router's products for bf16, on their own so that the storage types compile side by side.
#include "backends/cuda/gemm/router_products.cuh"

namespace penstock::cuda {

template void router_logits<__nv_bfloat16>(const RouterLogitsArgs&, const Context&);
template void router_logits_backward<__nv_bfloat16>(const RouterLogitsBackwardArgs&, const Context&);

}  // namespace penstock::cuda
