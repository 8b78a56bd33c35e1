// SPDX-License-Identifier: Apache-2.0
//
// The storing products for fp16, on their own so that the storage types compile side by side.
#include "backends/cuda/gemm/store_products.cuh"

namespace penstock::cuda {

template void store_rows<__half>(const RowProblem&, const StoreOutput&, const Context&);
template void down_projection<__half>(const DownProjectionArgs&, const Context&);
template void up_backward<__half>(const UpBackwardArgs&, const Context&);

}  // namespace penstock::cuda
