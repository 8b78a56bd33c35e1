// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend/ops.h"

namespace penstock::cpu {

// Plain loops in every storage dtype: the specification, and the oracle of the tests.
const Backend& reference_backend();

}  // namespace penstock::cpu
