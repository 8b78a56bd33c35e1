// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend/ops.h"

namespace penstock::cpu {

// Own threads over fixed tiles, vectorised: the embedded default.
const Backend& fast_backend();

}  // namespace penstock::cpu
