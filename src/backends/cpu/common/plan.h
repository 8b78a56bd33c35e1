// SPDX-License-Identifier: Apache-2.0
//
// A routing plan built in two passes over the slots: count, then place. Stable, and a function of
// the ids alone, so every backend that uses it gives the same plan. Needs no scratch. The tail of
// the row maps past the last row is filled with -1, which nothing reads: equal routings then have
// plans of equal bytes.
#pragma once

#include "backend/ops.h"

namespace penstock::cpu {

void build_plan(const PlanArgs& args);

}  // namespace penstock::cpu
