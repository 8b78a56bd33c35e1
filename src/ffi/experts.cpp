// SPDX-License-Identifier: Apache-2.0
//
// Exports of the experts' passes. What their groups of tensors hold is in convert.h.
// Called by python/penstock/_library.py.
#include "ffi/convert.h"

namespace penstock::binding {
namespace {

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
    experts_forward(forward_args_of(config, tensors, weights, plan, scope), scope.context());
  });
}

template <void (*Pass)(const ExpertsBackwardArgs&, const Context&)>
void backward(CallContext call, Config config, Tensors tensors, Tensors weights, Plan plan,
              Grads grads) {
  guarded([&] {
    const Scope scope(call);
    ExpertsBackwardArgs args = backward_args_of(config, tensors, weights, plan, scope);
    args.weight_grads = {.into = weights_of(grads.get<0>(), scope),
                         .mode = mode_of(grads.get<1>()),
                         .trainable = view_of(grads.get<2>(), "trainable", scope.uint16_as())};
    Pass(args, scope.context());
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(experts_forward, forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(experts_backward, backward<experts_backward>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(experts_backward_data, backward<experts_backward_data>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(experts_backward_weights, backward<experts_backward_weights>);

}  // namespace penstock::binding
