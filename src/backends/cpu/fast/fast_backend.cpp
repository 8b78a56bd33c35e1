// SPDX-License-Identifier: Apache-2.0
//
// The fast backend's table: every entry turns the call's context into a Runtime. One table per
// instruction set; the shipped one is that of the best set the processor supports.
#include "backends/cpu/fast/fast_backend.h"

#include <string>

#include "backends/cpu/common/plan.h"
#include "backends/cpu/fast/operations.h"
#include "backends/cpu/fast/thread_team.h"

namespace penstock::cpu {
namespace {

using fast::Isa;
using fast::Runtime;

constexpr int32_t kPriority = 10;

std::string why_unavailable() { return {}; }

std::string why_not_dtype(DType dtype) {
  switch (dtype) {
    case DType::float32:
    case DType::float16:
    case DType::bfloat16:
      return {};
    case DType::float64:
      return "it computes in float32; float64 runs on the reference backend";
    default:
      return "it computes in floating-point dtypes, not in " + std::string(name_of(dtype));
  }
}

std::string why_not(const ExpertsProblem& problem) {
  if (problem.device.type != DeviceType::cpu)
    return "it runs on the cpu, not on " + name_of(problem.device);
  return why_not_dtype(problem.dtype);
}

int64_t plan_scratch_bytes(int64_t, int64_t, const Context&) { return 0; }

void plan(const PlanArgs& args, const Context&) { build_plan(args); }

template <Isa kIsa>
Runtime runtime_of(const Context& context) {
  return {&fast::kernels_of(kIsa), fast::thread_count(context.threads)};
}

template <Isa kIsa>
std::string description() {
  return std::string("grouped products with ") + fast::name_of(kIsa) + " kernels, own threads";
}

template <Isa kIsa>
int64_t scratch_bytes(const ExpertsProblem& problem, const Context& context) {
  return fast::scratch_bytes(problem, runtime_of<kIsa>(context));
}

template <Isa kIsa>
int64_t router_scratch_bytes(const RouterProblem& problem, const Context& context) {
  return fast::router_scratch_bytes(problem, runtime_of<kIsa>(context));
}

template <Isa kIsa>
int64_t tile_rows(const ExpertsProblem& problem) {
  const fast::IsaKernels& kernels = fast::kernels_of(kIsa);
  const bool pairs = problem.dtype == DType::bfloat16 && kernels.bf16.mr != 0;
  return pairs ? kernels.bf16.mr : kernels.f32.mr;
}

template <Isa kIsa, auto kOperation, typename Args>
void run(const Args& args, const Context& context) {
  kOperation(args, runtime_of<kIsa>(context));
}

template <Isa kIsa>
constexpr Backend table() {
  return {
      .name = "fast",
      .device = DeviceType::cpu,
      .priority = kPriority,
      .description = description<kIsa>,
      .why_unavailable = why_unavailable,
      .why_not = why_not,
      .why_not_dtype = why_not_dtype,
      .scratch_bytes = scratch_bytes<kIsa>,
      .router_scratch_bytes = router_scratch_bytes<kIsa>,
      .plan_scratch_bytes = plan_scratch_bytes,
      .score_partials = fast::score_partials,
      .tile_rows = tile_rows<kIsa>,
      .router_logits = run<kIsa, fast::router_logits>,
      .router_logits_backward = run<kIsa, fast::router_logits_backward>,
      .router_forward = run<kIsa, fast::router_forward>,
      .router_backward = run<kIsa, fast::router_backward>,
      .build_plan = plan,
      .up_projection = run<kIsa, fast::up_projection>,
      .down_projection = run<kIsa, fast::down_projection>,
      .combine = run<kIsa, fast::combine>,
      .scale_rows = run<kIsa, fast::scale_rows>,
      .down_backward = run<kIsa, fast::down_backward>,
      .score_gradient = run<kIsa, fast::score_gradient>,
      .up_backward = run<kIsa, fast::up_backward>,
      .weight_gradient = run<kIsa, fast::weight_gradient>,
      .bias_gradient = run<kIsa, fast::bias_gradient>,
  };
}

}  // namespace

Backend fast_backend_on(Isa isa) {
  switch (isa) {
    case Isa::portable:
      break;
    case Isa::avx2:
      return table<Isa::avx2>();
    case Isa::avx512:
      return table<Isa::avx512>();
    case Isa::avx512_bf16:
      return table<Isa::avx512_bf16>();
  }
  return table<Isa::portable>();
}

const Backend& fast_backend() {
  static const Backend backend = fast_backend_on(fast::best_isa());
  return backend;
}

}  // namespace penstock::cpu
