// SPDX-License-Identifier: Apache-2.0
//
// What the host may check of a routing that a caller brings, by reading it. Called by build_plan;
// shapes and dtypes have been checked before.
#pragma once

#include "penstock/routing.h"

namespace penstock {

// token_offsets start at 0, never fall, and end within the slots, of which the rest have ids of -1:
// they address memory, so on the CPU this is checked in every mode.
void check_token_offsets(const Routing& routing);

// IdChecks::checked: an id below -1, or one in [0, E) twice within a token, is an error that names
// the token and its ids.
void check_ids(const Routing& routing, int64_t num_experts);

}  // namespace penstock
