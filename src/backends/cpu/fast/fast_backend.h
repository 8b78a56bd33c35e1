// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend/ops.h"
#include "backends/cpu/fast/isa.h"

namespace penstock::cpu {

// Own threads over fixed tiles, vectorised: the embedded default. Uses the best instruction set
// that the processor supports.
const Backend& fast_backend();

// The same on one instruction set, for the tests of each; it must be supported.
Backend fast_backend_on(fast::Isa isa);

}  // namespace penstock::cpu
