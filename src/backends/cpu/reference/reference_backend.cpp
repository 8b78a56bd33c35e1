// SPDX-License-Identifier: Apache-2.0
//
// The reference backend's table. It runs every floating dtype on every CPU, needs no scratch but
// that of the routers, and comes after every other backend in the order of its device.
#include "backends/cpu/reference/reference_backend.h"

#include <string>

#include "backends/cpu/common/plan.h"
#include "backends/cpu/common/routers/router.h"
#include "backends/cpu/reference/reference_ops.h"

namespace penstock::cpu {
namespace {

constexpr int32_t kPriority = 0;

std::string description() { return "plain loops"; }

std::string why_unavailable() { return {}; }

std::string why_not_dtype(DType dtype) {
  if (is_floating(dtype)) return {};
  return "it computes in floating-point dtypes, not in " + std::string(name_of(dtype));
}

std::string why_not(const ExpertsProblem& problem) {
  if (problem.device.type != DeviceType::cpu)
    return "it runs on the cpu, not on " + name_of(problem.device);
  return why_not_dtype(problem.dtype);
}

int64_t no_scratch(const ExpertsProblem&, const Context&) { return 0; }

int64_t no_router_scratch(const RouterProblem&, const Context&) { return 0; }

int64_t no_plan_scratch(int64_t, int64_t, const Context&) { return 0; }

// <G, A> is summed to the end in one go.
int64_t one_partial(const ExpertsProblem&) { return 1; }

// Rows are independent of each other: there are no tiles to round to.
int64_t one_row_tiles(const ExpertsProblem&) { return 1; }

void plan(const PlanArgs& args, const Context&) { build_plan(args); }

}  // namespace

const Backend& reference_backend() {
  static constexpr Backend kBackend = {
      .name = "reference",
      .device = DeviceType::cpu,
      .priority = kPriority,
      .description = description,
      .why_unavailable = why_unavailable,
      .why_not = why_not,
      .why_not_dtype = why_not_dtype,
      .why_not_router = why_not_router,
      .scratch_bytes = no_scratch,
      .router_scratch_bytes = no_router_scratch,
      .route_scratch_bytes = route_scratch_bytes,
      .plan_scratch_bytes = no_plan_scratch,
      .score_partials = one_partial,
      .tile_rows = one_row_tiles,
      .router_logits = reference::router_logits,
      .router_logits_backward = reference::router_logits_backward,
      .router_forward = reference::router_forward,
      .router_backward = reference::router_backward,
      .build_plan = plan,
      .up_projection = reference::up_projection,
      .down_projection = reference::down_projection,
      .combine = reference::combine,
      .scale_rows = reference::scale_rows,
      .down_backward = reference::down_backward,
      .score_gradient = reference::score_gradient,
      .up_backward = reference::up_backward,
      .weight_gradient = reference::weight_gradient,
      .bias_gradient = reference::bias_gradient,
  };
  return kBackend;
}

}  // namespace penstock::cpu
