// SPDX-License-Identifier: Apache-2.0
//
// The experts' forward and backward pass over a routing plan.
//
//   H_r = X_t W1_e^T + b1_e    A_r = act(H_r)    Y_r = A_r W2_e^T + b2_e    O_t = sum_r S_r Y_r
//
// Only X, H (or X alone), the scores and the plan are kept for backward: dS_r = <dO_t W2_e, A_r>
// + <dO_t, b2_e> needs no Y (SonicMoE, arXiv 2512.14080). A_r is always computed from H as stored,
// so both save policies give the same bits.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "penstock/export.h"
#include "penstock/routing.h"
#include "penstock/tensor.h"

namespace penstock {

struct Context;

enum class Activation : uint8_t {
  swiglu,          // silu(gate) * up
  geglu,           // gelu(gate) * up, erf form
  reglu,           // relu(gate) * up
  swiglu_clamped,  // gpt-oss: g = min(gate, limit), u = clamp(up, -limit, limit),
                   //          g * sigmoid(alpha g) * (u + 1)
  silu,
  gelu,       // erf form
  gelu_tanh,  // tanh form
  relu,
  relu_squared,
};

PENSTOCK_API std::string_view name_of(Activation activation);
constexpr bool is_gated(Activation a) { return a <= Activation::swiglu_clamped; }

// How the 2n rows of W1 (and b1) hold gate and up; H and dH are always [gate | up].
enum class GateLayout : uint8_t { concatenated, interleaved };

// output_major: W1 (E, h, d), W2 (E, d, n). input_major: W1 (E, d, h), W2 (E, n, d), as gpt-oss.
enum class WeightOrder : uint8_t { output_major, input_major };

// What forward leaves for backward. `nothing` is inference: backward is refused.
enum class SavePolicy : uint8_t { preactivation, input, nothing };

// How much memory a pass uses beside its results. low_memory: Y and dX~, the widest arrays of a
// pass, exist a quarter of their columns at a time (256 at least), at the price of reading A and dH
// again for every block. The same bits either way.
enum class LaunchOrder : uint8_t { fast, low_memory };

// What a backward pass does with the H that forward kept. overwritten: dH is written over it, which
// saves its bytes of workspace, and the pass cannot be run again.
enum class KeptH : uint8_t { preserved, overwritten };

PENSTOCK_API std::string_view name_of(GateLayout layout);
PENSTOCK_API std::string_view name_of(WeightOrder order);
PENSTOCK_API std::string_view name_of(SavePolicy policy);
PENSTOCK_API std::string_view name_of(LaunchOrder order);
PENSTOCK_API std::string_view name_of(KeptH kept);

struct ExpertsConfig {
  Activation activation = Activation::swiglu;
  GateLayout gate_layout = GateLayout::concatenated;
  WeightOrder weight_order = WeightOrder::output_major;
  SavePolicy save = SavePolicy::preactivation;
  float clamp_alpha = 1.702f;  // swiglu_clamped only
  float clamp_limit = 7.0f;    // swiglu_clamped only
  LaunchOrder order = LaunchOrder::fast;
  KeptH kept_h = KeptH::preserved;  // under SavePolicy::preactivation

  int64_t halves() const { return is_gated(activation) ? 2 : 1; }
};

// Weights, or gradients of weights. Shapes are for output_major. The last axis or the one before
// it must have stride 1; the expert stride is free (slices of a bigger tensor). With separate gate
// and up tensors, w1 (b1) is the gate, w1_up (b1_up) the up projection, both (E, n, d) ((E, n)),
// and gate_layout is not used.
struct ExpertWeights {
  TensorView w1;     // (E, h, d), h = 2n gated, n otherwise
  TensorView w1_up;  // (E, n, d)  absent: w1 holds both
  TensorView w2;     // (E, d, n)
  TensorView b1;     // (E, h)     absent: no bias
  TensorView b1_up;  // (E, n)     absent: b1 holds both
  TensorView b2;     // (E, d)     absent: no bias
};

// Where rows come from: gathered from X by the plan's maps and combined per token, or already
// sorted by expert in a receive buffer (expert parallelism), in which case x and output are rows.
enum class RowSource : uint8_t { routed, dispatched };

// What sizes depend on. Made from the tensors of a call by problem_of, or by hand for a query.
struct ExpertsProblem {
  ExpertsConfig config;
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_experts = 0;
  int64_t num_slots = 0;
  int64_t row_capacity = 0;
  DType dtype = DType::float32;
  Device device = {};
  RowSource rows = RowSource::routed;  // dispatched: no slots, num_tokens = row_capacity
  // Of adapters.h's calls, up and down; 0 where there is none, as in all other calls.
  std::array<int64_t, 2> adapter_ranks = {};

  int64_t preactivation_size() const { return config.halves() * intermediate_size; }
};

struct ExpertsForwardArgs {
  ExpertsConfig config;
  TensorView x;           // (T, d), or (R_cap, d) when the plan is dispatched; last stride 1
  ExpertWeights weights;  //
  TensorView scores;      // (slots) fp32/float64; dispatched: (R_cap), or absent for 1
  RoutingPlan plan;       //
  TensorView h;           // (R_cap, h)  out, present exactly under SavePolicy::preactivation
  TensorView output;      // (T, d)      out; dispatched: (R_cap, d), row r is S_r Y_r
  Workspace workspace;
};

// Whether a weight gradient is written or added to.
enum class GradMode : uint8_t { overwrite, accumulate };

struct WeightGrads {
  ExpertWeights into;  // same shapes as the weights, their dtype or fp32; absent: not wanted
  GradMode mode = GradMode::overwrite;
  TensorView trainable;  // (E) uint8, absent: all. Frozen experts (0) get no gradient work:
                         // their slices are left as they are in either mode.
};

// dH and A' between the two halves of a backward pass whose weight gradients come later. dh may
// be H itself where KeptH says that H is overwritten.
struct DelayedWeightGrads {
  TensorView dh;        // (R_cap, h)  written by backward_data, read by backward_weights
  TensorView a_scaled;  // (R_cap, n)
};

struct ExpertsBackwardArgs {
  ExpertsConfig config;
  TensorView d_output;    // (T, d), or (R_cap, d) when dispatched; last stride 1
  TensorView x;           //
  ExpertWeights weights;  //
  TensorView scores;      //
  RoutingPlan plan;       //
  TensorView h;           // as forward left it, see KeptH; absent under SavePolicy::input
  TensorView dx;          // (T, d) out; dispatched: (R_cap, d); absent: not wanted
  TensorView dscores;     // (slots) out, dtype of scores; skipped slots get 0; absent: not wanted
  WeightGrads weight_grads;
  // Given to backward_data and backward_weights only. backward_data takes no weight gradients;
  // backward_weights takes no dx and no dscores, reads no weight's elements, and needs no h.
  DelayedWeightGrads delayed;
  Workspace workspace;
};

// Exact bytes of workspace that a call needs on the context's backend.
PENSTOCK_API int64_t forward_workspace_bytes(const ExpertsProblem& problem, const Context& context);
PENSTOCK_API int64_t backward_workspace_bytes(const ExpertsProblem& problem,
                                              const Context& context);
PENSTOCK_API int64_t backward_data_workspace_bytes(const ExpertsProblem& problem,
                                                   const Context& context);
PENSTOCK_API int64_t backward_weights_workspace_bytes(const ExpertsProblem& problem,
                                                      const Context& context);

// Bytes kept between forward and backward, X and the weights aside: H (preactivation only), scores
// and ids of every slot, the three maps, counts and offsets. (The token_offsets of a routing with
// differing numbers of experts are the caller's own and not counted; dispatched rows have a score
// each, and neither ids nor maps.)
PENSTOCK_API int64_t saved_bytes(const ExpertsProblem& problem);

PENSTOCK_API void experts_forward(const ExpertsForwardArgs& args, const Context& context);
PENSTOCK_API void experts_backward(const ExpertsBackwardArgs& args, const Context& context);

// The same in two calls, for pipeline schedules: dX and dS now, weight gradients later.
PENSTOCK_API void experts_backward_data(const ExpertsBackwardArgs& args, const Context& context);
PENSTOCK_API void experts_backward_weights(const ExpertsBackwardArgs& args, const Context& context);

PENSTOCK_API ExpertsProblem problem_of(const ExpertsForwardArgs& args);
PENSTOCK_API ExpertsProblem problem_of(const ExpertsBackwardArgs& args);

}  // namespace penstock
