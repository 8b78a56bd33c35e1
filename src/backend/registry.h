// SPDX-License-Identifier: Apache-2.0
//
// Finds the backend of a call. The choice is a pure function of the context and the problem.
#pragma once

#include "backend/ops.h"

namespace penstock {

// Throws ErrorCode::unsupported, naming every candidate and its reason, if none can run it.
const Backend& select_backend(const ExpertsProblem& problem, const Context& context);
// The same for the router's operations and the plan.
const Backend& select_backend(Device device, DType dtype, const Context& context);
// The same for one router.
const Backend& select_backend(const RouteProblem& problem, const Context& context);

}  // namespace penstock
