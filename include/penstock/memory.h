// SPDX-License-Identifier: Apache-2.0
//
// A hint about memory that the caller has just allocated and will hand to the library.
#pragma once

#include <cstdint>

#include "penstock/export.h"

namespace penstock {

// From here on memory is worth large pages: a page fault costs as much as reading the page.
inline constexpr int64_t kLargePageBytes = int64_t{4} << 20;

// Asks the operating system to back data .. data + bytes with large pages, where it has not backed
// it yet. Gradients of weights are new memory at every step, and first touches of 4 KiB pages were
// a tenth of a layer's time (docs/perf/cpu.md). Does nothing for less than kLargePageBytes, and on
// systems without such advice; contents never change. Any thread, any memory of the process.
PENSTOCK_API void prefer_large_pages(void* data, int64_t bytes);

}  // namespace penstock
