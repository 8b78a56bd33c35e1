// SPDX-License-Identifier: Apache-2.0
//
// Exports of the adapted experts' passes and their sizes. Groups are read by position, see the
// arrays of names. Called by python/penstock/_engine_adapters.py.
#include <array>

#include "ffi/convert.h"

namespace penstock::binding {
namespace {

constexpr std::array<std::string_view, 5> kForward = {"x", "scores", "h", "output", "workspace"};
constexpr std::array<std::string_view, 7> kBackward = {"d_output", "x",       "scores",   "h",
                                                       "dx",       "dscores", "workspace"};
constexpr std::array<std::string_view, 8> kAdapters = {
    "adapters.up_a", "adapters.up_b", "adapters.down_a", "adapters.down_b",
    "grads.up_a",    "grads.up_b",    "grads.down_a",    "grads.down_b"};
constexpr size_t kGrads = 4;  // where the gradients begin

ExpertAdapters adapters_of(const Group& group, size_t first) {
  return {.up_a = group[first],
          .up_b = group[first + 1],
          .down_a = group[first + 2],
          .down_b = group[first + 3]};
}

void forward(CallContext call, Config config, Tensors tensors, Tensors weights, Plan plan,
             Tensors adapters) {
  guarded([&] {
    const Scope scope(call);
    const Group group(tensors, kForward, scope.uint16_as());
    const Group factors(adapters, kAdapters, scope.uint16_as());
    adapted_experts_forward({.experts = {.config = config_of(config),
                                         .x = group[0],
                                         .weights = weights_of(weights, scope),
                                         .scores = group[1],
                                         .plan = plan_of(plan),
                                         .h = group[2],
                                         .output = group[3],
                                         .workspace = group.workspace(4)},
                             .adapters = adapters_of(factors, 0)},
                            scope.context());
  });
}

void backward(CallContext call, Config config, Tensors tensors, Tensors weights, Plan plan,
              Tensors adapters) {
  guarded([&] {
    const Scope scope(call);
    const Group group(tensors, kBackward, scope.uint16_as());
    const Group factors(adapters, kAdapters, scope.uint16_as());
    adapted_experts_backward({.experts = {.config = config_of(config),
                                          .d_output = group[0],
                                          .x = group[1],
                                          .weights = weights_of(weights, scope),
                                          .scores = group[2],
                                          .plan = plan_of(plan),
                                          .h = group[3],
                                          .dx = group[4],
                                          .dscores = group[5],
                                          .weight_grads = {},
                                          .delayed = {},
                                          .workspace = group.workspace(6)},
                              .adapters = adapters_of(factors, 0),
                              .grads = adapters_of(factors, kGrads)},
                             scope.context());
  });
}

template <int64_t (*Query)(const AdaptedProblem&, const Context&)>
int64_t bytes(CallContext call, Config config, Problem problem, int64_t up_rank,
              int64_t down_rank) {
  return guarded([&] {
    const Scope scope(call);
    return Query({problem_of(config, problem), up_rank, down_rank}, scope.context());
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(adapted_experts_forward, forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(adapted_experts_backward, backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(adapted_forward_workspace_bytes,
                              bytes<adapted_forward_workspace_bytes>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(adapted_backward_workspace_bytes,
                              bytes<adapted_backward_workspace_bytes>);

}  // namespace penstock::binding
