// SPDX-License-Identifier: Apache-2.0
//
// The fast backend's table over one set of kernels: every entry turns the call's context into a
// Runtime. fast_backend.cpp makes one for every instruction set; tests make more, over emulations
// of the sets that their machine lacks.
#pragma once

#include <string>

#include "backends/cpu/common/plan.h"
#include "backends/cpu/common/routers/router.h"
#include "backends/cpu/fast/operations.h"
#include "backends/cpu/fast/thread_team.h"

namespace penstock::cpu::fast {

using KernelSource = const IsaKernels& (*)();

std::string why_not_dtype(DType dtype);
std::string why_not(const ExpertsProblem& problem);

template <KernelSource kKernels>
struct Table {
  static constexpr int32_t kPriority = 10;

  static Runtime runtime_of(const Context& context) {
    return {&kKernels(), thread_count(context.threads)};
  }

  static std::string why_unavailable() { return {}; }

  static int64_t scratch_bytes(const ExpertsProblem& problem, const Context& context) {
    return fast::scratch_bytes(problem, runtime_of(context));
  }
  static int64_t router_scratch_bytes(const RouterProblem& problem, const Context& context) {
    return fast::router_scratch_bytes(problem, runtime_of(context));
  }
  static int64_t plan_scratch_bytes(int64_t, int64_t, const Context&) { return 0; }

  static int64_t tile_rows(const ExpertsProblem& problem) {
    const IsaKernels& kernels = kKernels();
    const bool pairs = problem.dtype == DType::bfloat16 && kernels.bf16.mr != 0;
    return pairs ? kernels.bf16.mr : kernels.f32.mr;
  }

  static void plan(const PlanArgs& args, const Context&) { build_plan(args); }

  template <auto kOperation, typename Args>
  static void run(const Args& args, const Context& context) {
    kOperation(args, runtime_of(context));
  }

  static Backend make(std::string (*description)()) {
    return {
        .name = "fast",
        .device = DeviceType::cpu,
        .priority = kPriority,
        .description = description,
        .why_unavailable = why_unavailable,
        .why_not = why_not,
        .why_not_dtype = why_not_dtype,
        .why_not_router = why_not_router,
        .scratch_bytes = scratch_bytes,
        .router_scratch_bytes = router_scratch_bytes,
        .route_scratch_bytes = route_scratch_bytes,
        .plan_scratch_bytes = plan_scratch_bytes,
        .score_partials = score_partials,
        .tile_rows = tile_rows,
        .router_logits = run<router_logits>,
        .router_logits_backward = run<router_logits_backward>,
        .router_forward = run<router_forward>,
        .router_backward = run<router_backward>,
        .build_plan = plan,
        .up_projection = run<up_projection>,
        .down_projection = run<down_projection>,
        .combine = run<combine>,
        .scale_rows = run<scale_rows>,
        .down_backward = run<down_backward>,
        .score_gradient = run<score_gradient>,
        .up_backward = run<up_backward>,
        .weight_gradient = run<weight_gradient>,
        .bias_gradient = run<bias_gradient>,
    };
  }
};

}  // namespace penstock::cpu::fast
