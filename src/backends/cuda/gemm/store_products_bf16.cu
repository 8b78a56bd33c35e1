// SPDX-License-Identifier: Apache-2.0
//
// The storing products for bf16, on their own so that the storage types compile side by side.
#include "backends/cuda/gemm/store_products.cuh"

namespace penstock::cuda {

template void store_rows<__nv_bfloat16>(const RowProblem&, const StoreOutput&, const Context&);
template void down_projection<__nv_bfloat16>(const DownProjectionArgs&, const Context&);
template void up_backward<__nv_bfloat16>(const UpBackwardArgs&, const Context&);

}  // namespace penstock::cuda
