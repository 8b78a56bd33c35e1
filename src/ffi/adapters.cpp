// SPDX-License-Identifier: Apache-2.0
//
// Exports of the adapted experts' passes and their sizes. What their groups of tensors hold is in
// convert.h, and the adapters' below. Called by python/penstock/_engine_adapters.py.
#include <array>

#include "ffi/convert.h"

namespace penstock::binding {
namespace {

constexpr std::array<std::string_view, 10> kAdapters = {
    "adapters.up_a", "adapters.up_b", "adapters.down_a", "adapters.down_b", "grads.up_a",
    "grads.up_b",    "grads.down_a",  "grads.down_b",    "rows.up",         "rows.down"};
constexpr size_t kGrads = 4;  // where the gradients begin
constexpr size_t kRows = 8;   // where the thin rows begin

ExpertAdapters adapters_of(const Group& group, size_t first) {
  return {.up_a = group[first],
          .up_b = group[first + 1],
          .down_a = group[first + 2],
          .down_b = group[first + 3]};
}

AdapterRows rows_of(const Group& group) { return {group[kRows], group[kRows + 1]}; }

void forward(CallContext call, Config config, Tensors tensors, Tensors weights, Plan plan,
             Tensors adapters) {
  guarded([&] {
    const Scope scope(call);
    const Group factors(adapters, kAdapters, scope.uint16_as());
    adapted_experts_forward({.experts = forward_args_of(config, tensors, weights, plan, scope),
                             .adapters = adapters_of(factors, 0),
                             .rows = rows_of(factors)},
                            scope.context());
  });
}

void backward(CallContext call, Config config, Tensors tensors, Tensors weights, Plan plan,
              Tensors adapters) {
  guarded([&] {
    const Scope scope(call);
    const Group factors(adapters, kAdapters, scope.uint16_as());
    adapted_experts_backward({.experts = backward_args_of(config, tensors, weights, plan, scope),
                              .adapters = adapters_of(factors, 0),
                              .rows = rows_of(factors),
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
