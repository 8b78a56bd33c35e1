// SPDX-License-Identifier: Apache-2.0
//
// Exports that answer questions: version, backends, sizes; and a hint about memory.
// None of them reads or writes a tensor's data.
// Called by python/penstock/_library.py.
#include "ffi/convert.h"

namespace penstock::binding {
namespace {

// name, device, available, reason, description, operations
using BackendRow =
    ffi::Tuple<ffi::String, ffi::String, bool, ffi::String, ffi::String, ffi::Array<ffi::String>>;

ffi::String version() { return PENSTOCK_VERSION; }

ffi::Array<BackendRow> backends() {
  return guarded([&] {
    ffi::Array<BackendRow> rows;
    for (const BackendInfo& info : list_backends()) {
      ffi::Array<ffi::String> operations;
      for (const std::string& operation : info.operations) operations.push_back(operation);
      rows.push_back(BackendRow(
          ffi::String(info.name), ffi::String(info.device == DeviceType::cpu ? "cpu" : "cuda"),
          info.available, ffi::String(info.reason), ffi::String(info.description), operations));
    }
    return rows;
  });
}

ffi::String why_not_experts(ffi::String backend, Config config, Problem problem) {
  return guarded([&] {
    return ffi::String(
        why_not(std::string_view(backend.data(), backend.size()), problem_of(config, problem)));
  });
}

ffi::String chosen_backend_experts(CallContext call, Config config, Problem problem) {
  return guarded([&] {
    const Scope scope(call);
    return ffi::String(std::string(chosen_backend(problem_of(config, problem), scope.context())));
  });
}

template <int64_t (*Query)(const ExpertsProblem&, const Context&)>
int64_t answer(CallContext call, Config config, Problem problem) {
  return guarded([&] {
    const Scope scope(call);
    return Query(problem_of(config, problem), scope.context());
  });
}

int64_t saved(Config config, Problem problem) {
  return guarded([&] { return saved_bytes(problem_of(config, problem)); });
}

// `problem` carries only num_tokens, hidden_size, num_experts, dtype and device here.
int64_t router_bytes(CallContext call, Problem problem) {
  return guarded([&] {
    const Scope scope(call);
    const RouterProblem router = {.num_tokens = problem.get<0>(),
                                  .hidden_size = problem.get<1>(),
                                  .num_experts = problem.get<3>(),
                                  .dtype = dtype_of(problem.get<6>()),
                                  .device = device_of(problem.get<7>(), problem.get<8>())};
    return router_workspace_bytes(router, scope.context());
  });
}

// `problem` carries only num_tokens, num_experts, num_slots, dtype and device here.
int64_t route_bytes(CallContext call, Router router, Problem problem) {
  return guarded([&] {
    const Scope scope(call);
    return route_workspace_bytes(route_problem_of(router, problem), scope.context());
  });
}

// `problem` carries only num_slots, num_experts and device here.
int64_t plan_bytes(CallContext call, Problem problem) {
  return guarded([&] {
    const Scope scope(call);
    return plan_workspace_bytes(problem.get<4>(), problem.get<3>(),
                                device_of(problem.get<7>(), problem.get<8>()), scope.context());
  });
}

void large_pages(ffi::Tensor tensor) {
  guarded([&] {
    const TensorView view = view_of(tensor, "tensor", DType::bfloat16);
    prefer_large_pages(view.data, view.numel() * size_of(view.dtype));
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, version);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(list_backends, backends);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(why_not, why_not_experts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(chosen_backend, chosen_backend_experts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward_workspace_bytes, answer<forward_workspace_bytes>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backward_workspace_bytes, answer<backward_workspace_bytes>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backward_data_workspace_bytes, answer<backward_data_workspace_bytes>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backward_weights_workspace_bytes,
                              answer<backward_weights_workspace_bytes>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(saved_bytes, saved);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(router_workspace_bytes, router_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route_workspace_bytes, route_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tile_rows, answer<tile_rows>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_workspace_bytes, plan_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prefer_large_pages, large_pages);

}  // namespace penstock::binding
