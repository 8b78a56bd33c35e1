// SPDX-License-Identifier: Apache-2.0
//
// Exports of routing: logits, scores, plan. Groups are read by position, see the arrays of names.
// Called by python/penstock/_library.py.
#include <array>

#include "ffi/convert.h"

namespace penstock::binding {
namespace {

using Names = std::string_view;

constexpr std::array<Names, 4> kLogits = {"x", "router_weight", "logits", "workspace"};
constexpr std::array<Names, 7> kLogitsBackward = {
    "dlogits", "x", "router_weight", "dx", "drouter_weight", "workspace", "addend"};
constexpr std::array<Names, 8> kRoute = {"logits", "scores",        "ids",    "bias",
                                         "seed",   "token_offsets", "report", "workspace"};
constexpr std::array<Names, 7> kRouteBackward = {"logits",  "scores",        "ids",      "dscores",
                                                 "dlogits", "token_offsets", "workspace"};
constexpr std::array<Names, 4> kPlan = {"scores", "ids", "token_offsets", "workspace"};

void logits_forward(CallContext call, Tensors tensors) {
  guarded([&] {
    const Scope scope(call);
    const Group group(tensors, kLogits, scope.uint16_as());
    router_logits({.x = group[0],
                   .router_weight = group[1],
                   .logits = group[2],
                   .workspace = group.workspace(3)},
                  scope.context());
  });
}

void logits_backward(CallContext call, Tensors tensors) {
  guarded([&] {
    const Scope scope(call);
    const Group group(tensors, kLogitsBackward, scope.uint16_as());
    router_logits_backward({.dlogits = group[0],
                            .x = group[1],
                            .router_weight = group[2],
                            .dx = group[3],
                            .drouter_weight = group[4],
                            .workspace = group.workspace(5),
                            .addend = group[6]},
                           scope.context());
  });
}

void route(CallContext call, Router router, Tensors tensors, Plan into) {
  guarded([&] {
    const Scope scope(call);
    const Group group(tensors, kRoute, scope.uint16_as());
    const RouteProblem how = router_of(router);
    router_forward({.kind = how.kind,
                    .logits = group[0],
                    .scores = group[1],
                    .ids = group[2],
                    .options = how.options,
                    .top_k = how.top_k,
                    .bias = group[3],
                    .seed = group[4],
                    .token_offsets = group[5],
                    .report = group[6],
                    .selection = how.selection,
                    .workspace = group.workspace(7),
                    .plan = plan_of(into)},
                   scope.context());
  });
}

void route_backward(CallContext call, Router router, Tensors tensors) {
  guarded([&] {
    const Scope scope(call);
    const Group group(tensors, kRouteBackward, scope.uint16_as());
    const RouteProblem how = router_of(router);
    router_backward({.kind = how.kind,
                     .logits = group[0],
                     .scores = group[1],
                     .ids = group[2],
                     .dscores = group[3],
                     .dlogits = group[4],
                     .options = how.options,
                     .top_k = how.top_k,
                     .token_offsets = group[5],
                     .workspace = group.workspace(6)},
                    scope.context());
  });
}

void plan(CallContext call, Tensors tensors, int64_t num_tokens, Plan into) {
  guarded([&] {
    const Scope scope(call);
    const Group group(tensors, kPlan, scope.uint16_as());
    const RoutingPlan plan_views = plan_of(into);
    const Routing routing = {.scores = group[0],
                             .ids = group[1],
                             .token_offsets = group[2],
                             .num_tokens = num_tokens,
                             .top_k = plan_views.top_k};
    build_plan(routing, plan_views, group.workspace(3), scope.context());
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(router_logits, logits_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(router_logits_backward, logits_backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, route);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route_backward, route_backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(build_plan, plan);

}  // namespace penstock::binding
