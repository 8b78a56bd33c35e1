// SPDX-License-Identifier: Apache-2.0
//
// What a router may be told, checked against its sizes. Called by route.cpp before a backend is
// asked.
#pragma once

#include "penstock/routing.h"

namespace penstock {

// Sizes and the options that the router of `problem` reads; a replay may have any number of slots.
// Throws Error(invalid_argument).
void check_route_problem(const RouteProblem& problem);

}  // namespace penstock
