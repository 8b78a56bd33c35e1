// SPDX-License-Identifier: Apache-2.0
//
// The thin products for fp16, on their own so that the storage types compile side by side.
#include "backends/cuda/gemm/thin_products.cuh"

namespace penstock::cuda {

template void thin_rows<__half>(const RowProblem&, const StoreOutput&, const Context&);

}  // namespace penstock::cuda
