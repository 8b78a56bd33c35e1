// SPDX-License-Identifier: Apache-2.0
//
// The products with a low-rank term for fp16, on their own so that the storage types compile side
// by side.
#include "backends/cuda/gemm/adapted_products.cuh"

namespace penstock::cuda {

template void adapted_up_projection<__half>(const RowProblem&, const UpEpilogueParams&,
                                            const Context&);
template void adapted_store_rows<__half>(const RowProblem&, const StoreOutput&, const Context&);
template void adapted_down_backward<__half>(const RowProblem&, const DownBackwardArgs&,
                                            const Context&);

}  // namespace penstock::cuda
