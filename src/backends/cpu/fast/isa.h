// SPDX-License-Identifier: Apache-2.0
//
// The instruction sets that the fast backend has kernels for, and which of them this processor
// (and its operating system) supports.
#pragma once

#include <cstdint>
#include <vector>

#include "backends/cpu/fast/isa/kernels.h"
#include "penstock/dtype.h"

namespace penstock::cpu::fast {

enum class Isa : uint8_t { portable, avx2, avx512, avx512_bf16 };

const char* name_of(Isa isa);
bool is_supported(Isa isa);
// The last one is the best.
std::vector<Isa> supported_isas();
Isa best_isa();
const IsaKernels& kernels_of(Isa isa);

// Storage dtype to kernel element; the dtype is one that the backend runs.
Element element_of(DType dtype);

}  // namespace penstock::cpu::fast
