// SPDX-License-Identifier: Apache-2.0
//
// Exports of the experts' passes. Groups are read by position, see the arrays of names.
// Called by python/penstock/_library.py.
#include <array>

#include "ffi/convert.h"

namespace penstock::binding {
namespace {

constexpr std::array<std::string_view, 5> kForward = {"x", "scores", "h", "output", "workspace"};
constexpr std::array<std::string_view, 9> kBackward = {
    "d_output", "x", "scores", "h", "dx", "dscores", "dh", "a_scaled", "workspace"};
// w1, w1_up, w2, b1, b1_up, b2 to be filled; "overwrite" or "accumulate"; trainable
using Grads = ffi::Tuple<Tensors, ffi::String, ffi::Optional<ffi::Tensor>>;

GradMode mode_of(const ffi::String& name) {
  const std::string text(name.data(), name.size());
  if (text == "overwrite") return GradMode::overwrite;
  if (text == "accumulate") return GradMode::accumulate;
  throw Error(ErrorCode::invalid_argument,
              {"gradient mode", "'" + text + "'", "overwrite or accumulate", "Check the spelling"});
}

void forward(CallContext call, Config config, Tensors tensors, Tensors weights, Plan plan) {
  guarded([&] {
    const Scope scope(call);
    const Group group(tensors, kForward, scope.uint16_as());
    experts_forward({.config = config_of(config),
                     .x = group[0],
                     .weights = weights_of(weights, scope),
                     .scores = group[1],
                     .plan = plan_of(plan),
                     .h = group[2],
                     .output = group[3],
                     .workspace = group.workspace(4)},
                    scope.context());
  });
}

template <void (*Pass)(const ExpertsBackwardArgs&, const Context&)>
void backward(CallContext call, Config config, Tensors tensors, Tensors weights, Plan plan,
              Grads grads) {
  guarded([&] {
    const Scope scope(call);
    const Group group(tensors, kBackward, scope.uint16_as());
    Pass({.config = config_of(config),
          .d_output = group[0],
          .x = group[1],
          .weights = weights_of(weights, scope),
          .scores = group[2],
          .plan = plan_of(plan),
          .h = group[3],
          .dx = group[4],
          .dscores = group[5],
          .weight_grads = {.into = weights_of(grads.get<0>(), scope),
                           .mode = mode_of(grads.get<1>()),
                           .trainable = view_of(grads.get<2>(), "trainable", scope.uint16_as())},
          .delayed = {.dh = group[6], .a_scaled = group[7]},
          .workspace = group.workspace(8)},
         scope.context());
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(experts_forward, forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(experts_backward, backward<experts_backward>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(experts_backward_data, backward<experts_backward_data>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(experts_backward_weights, backward<experts_backward_weights>);

}  // namespace penstock::binding
