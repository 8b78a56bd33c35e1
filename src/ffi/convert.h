// SPDX-License-Identifier: Apache-2.0
//
// What crosses the boundary between Python and the core, and how it is converted.
//
// Arguments come in groups, so that no exported function has more than six: tensors as arrays of
// optional tensors in the order that the comments below give, settings as tuples. Names of enum
// values are the public ones (penstock::name_of). Nothing here computes or chooses anything.
// Called by the four files of exports.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <new>
#include <span>
#include <string>
#include <string_view>

#include "penstock/penstock.h"

namespace penstock::binding {

namespace ffi = tvm::ffi;

using Tensors = ffi::Array<ffi::Optional<ffi::Tensor>>;

// activation, gate_layout, weight_order, save, clamp_alpha, clamp_limit, order, kept_h
using Config = ffi::Tuple<ffi::String, ffi::String, ffi::String, ffi::String, double, double,
                          ffi::String, ffi::String>;

// backend, threads, stream, sm_budget, id_checks, dtype of uint16 tensors ("" refuses them: NumPy
// has no bf16, so its arrays come as uint16 and say so here)
using CallContext = ffi::Tuple<ffi::String, int64_t, int64_t, int64_t, ffi::String, ffi::String>;

// num_tokens, hidden_size, intermediate_size, num_experts, num_slots, row_capacity, dtype,
// device type, device index, "routed" or "dispatched"
using Problem = ffi::Tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, ffi::String,
                           ffi::String, int64_t, ffi::String>;

// expert_counts, expert_offsets, row_to_token, row_to_slot, slot_to_row, token_offsets,
// dropped_slots; then top_k
using Plan = ffi::Tuple<Tensors, int64_t>;

// name, selection, scaling, rounding mode; top_k, num_groups, top_groups, tile; scale, threshold
using Router = ffi::Tuple<ffi::String, ffi::String, ffi::String, ffi::String, int64_t, int64_t,
                          int64_t, int64_t, double, double>;

// Reads the tensors of one group by position. `names` are what errors call them, and must outlive
// the group.
class Group {
 public:
  Group(Tensors tensors, std::span<const std::string_view> names, DType uint16_as);

  TensorView operator[](size_t index) const;
  Workspace workspace(size_t index) const;

 private:
  Tensors tensors_;
  std::span<const std::string_view> names_;
  DType uint16_as_;
};

// The context of a call, with the string that its backend name points into.
class Scope {
 public:
  explicit Scope(const CallContext& call);
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

  const Context& context() const { return context_; }
  // What uint16 tensors hold; DType::uint8 when the caller did not say, which refuses them.
  DType uint16_as() const { return uint16_as_; }

 private:
  std::string backend_;
  Context context_;
  DType uint16_as_ = DType::uint8;
};

ExpertsConfig config_of(const Config& config);
ExpertsProblem problem_of(const Config& config, const Problem& problem);
RoutingPlan plan_of(const Plan& plan);
// Six tensors: w1, w1_up, w2, b1, b1_up, b2.
ExpertWeights weights_of(const Tensors& tensors, const Scope& scope);
// Five tensors: x, scores, h, output, workspace.
ExpertsForwardArgs forward_args_of(const Config& config, const Tensors& tensors,
                                   const Tensors& weights, const Plan& plan, const Scope& scope);
// Nine tensors: d_output, x, scores, h, dx, dscores, dh, a_scaled, workspace. No weight gradients.
ExpertsBackwardArgs backward_args_of(const Config& config, const Tensors& tensors,
                                     const Tensors& weights, const Plan& plan, const Scope& scope);
// The router's kind, selection, options and top_k; no sizes.
RouteProblem router_of(const Router& router);
// The same with the sizes of `problem`.
RouteProblem route_problem_of(const Router& router, const Problem& problem);
Device device_of(const ffi::String& type, int64_t index);
DType dtype_of(const ffi::String& name);
TensorView view_of(const ffi::Optional<ffi::Tensor>& tensor, std::string_view name,
                   DType uint16_as);

[[noreturn]] void raise(const Error& error);
[[noreturn]] void raise_out_of_memory();

// Runs `body`, turning the core's exceptions into Python's.
template <typename Body>
auto guarded(Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    raise(error);
  } catch (const std::bad_alloc&) {
    raise_out_of_memory();
  }
}

}  // namespace penstock::binding
