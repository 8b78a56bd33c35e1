// SPDX-License-Identifier: Apache-2.0
//
// What a plan's arrays must look like before a backend fills them. Called by build_plan, and by
// router_forward where a router hands over its plan.
#pragma once

#include "penstock/routing.h"
#include "tensor/overlap.h"

namespace penstock {

// Shapes, dtypes and devices, beside the ids of `routing`.
void check_plan_arrays(const RoutingPlan& plan, const Routing& routing);

// All arrays but token_offsets, which may be the routing's own.
void add_plan_outputs(const RoutingPlan& plan, AliasCheck& aliases);

}  // namespace penstock
