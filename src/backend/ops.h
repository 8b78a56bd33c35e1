// SPDX-License-Identifier: Apache-2.0
//
// The operations that a backend implements, one argument struct each, and the table that holds
// them. Callers (src/routing, src/experts) have checked every shape, dtype and stride before;
// an operation checks nothing again and throws only where its device fails.
//
// Shapes: T tokens, d hidden, n intermediate, h = 2n gated or n, E experts, R_cap row capacity.
// Rows of expert e are offsets[e] .. offsets[e] + counts[e]; rows outside are neither read nor
// written. Storage dtype is bf16, fp16, fp32 or fp64; sums are kept in accumulator_of(dtype).
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "penstock/backend.h"
#include "penstock/experts.h"
#include "penstock/routing.h"

namespace penstock {

// One matrix per expert, by strides in elements: (e, row, col) is at
// data + e * expert_stride + row * row_stride + col * col_stride. This one form carries both gate
// layouts, both weight orders and separate gate and up tensors without a copy.
struct GroupedMatrix {
  void* data = nullptr;  // null: absent
  DType dtype = DType::float32;
  int64_t expert_stride = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 0;

  bool present() const { return data != nullptr; }
};

struct GroupedVector {
  void* data = nullptr;  // null: absent
  DType dtype = DType::float32;
  int64_t expert_stride = 0;
  int64_t stride = 0;

  bool present() const { return data != nullptr; }
};

// W1 as its halves: [0] gate (or the only one), [1] up, each (n, d) by (row, col); b1 likewise (n).
// H and dH columns [0, n) belong to half 0, [n, 2n) to half 1.
struct UpWeights {
  std::array<GroupedMatrix, 2> w;
  std::array<GroupedVector, 2> b;
  int32_t halves = 1;
};

// W2 as (d, n) by (row, col); b2 (d).
struct DownWeights {
  GroupedMatrix w;
  GroupedVector b;
};

// A term of low rank in a product's sums: + rows_r matrix^T, where a fine-tuning adapter stands
// beside a weight. matrix[half] is (outputs, rank) by (row, col) for the outputs of that half.
struct LowRankTerm {
  TensorView rows;  // (R_cap, rank); absent: no term
  std::array<GroupedMatrix, 2> matrix = {};

  bool present() const { return rows.present(); }
};

// The rows an operation works on. row_to_token absent: operand row r is row r.
struct RowGroups {
  TensorView expert_counts;   // (E)    int32
  TensorView expert_offsets;  // (E+1)  int32
  TensorView row_to_token;    // (R_cap) int32 or absent
  TensorView row_to_slot;     // (R_cap) int32 or absent: scores are per row
  int64_t row_capacity = 0;

  int64_t num_experts() const { return expert_counts.numel(); }
};

struct ActivationSpec {
  Activation kind = Activation::swiglu;
  float clamp_alpha = 1.702f;
  float clamp_limit = 7.0f;
};

// plan arrays from routing; see RoutingPlan. scratch: plan_scratch_bytes.
struct PlanArgs {
  Routing routing;
  RoutingPlan plan;
  Workspace scratch;
};

// The routing that a router without a fixed K fills.
inline Routing chosen_routing(const RouterForwardArgs& args) {
  return {.scores = args.scores,
          .ids = args.ids,
          .token_offsets = args.token_offsets,
          .num_tokens = args.logits.size(0)};
}

// H_r = X_{token(r)} W1_e^T + b1_e + low rank (stored), A_r = act(H_r as stored).
struct UpProjectionArgs {
  RowGroups rows;
  ActivationSpec activation;
  TensorView x;       // (T or R_cap, d), row stride free, last stride 1
  UpWeights weights;  //
  TensorView h;       // (R_cap, h) out; absent: only A is wanted
  TensorView a;       // (R_cap, n) out; absent: only H is wanted
  Workspace scratch;
  LowRankTerm low_rank = {};
};

// Y_r = A_r W2_e^T + b2_e + low rank.
struct DownProjectionArgs {
  RowGroups rows;
  TensorView a;         // (R_cap, n)
  DownWeights weights;  //
  TensorView y;         // (R_cap, d) out
  Workspace scratch;
  LowRankTerm low_rank = {};
};

// O_t = sum over the slots of t, in slot order, of S_slot * Y_{slot_to_row[slot]}; tokens without
// a row get 0. Scores absent: plain sum (which is dX from dX~, launch 8).
struct CombineArgs {
  RoutingPlan plan;
  TensorView rows;    // (R_cap, d)
  TensorView scores;  // (slots) or absent
  TensorView output;  // (T, d) out
};

// Rows scaled by their scores, in place of a combine for rows already dispatched, and the thin rows
// of an adapter: out_r = S_r * in_r.
struct ScaleRowsArgs {
  RowGroups rows;
  TensorView scores;  // (slots or R_cap) or absent for 1
  TensorView input;   // (R_cap, columns)
  TensorView output;  // (R_cap, columns) out, may be input
};

// With G_r = dO_{token(r)} W2_e + low rank (never stored), A_r = act(H_r) unrounded and s = S of
// the row:
//   partials_{r, .} sums to <G_r, A_r>,  dH_r = act'(H_r) (s G_r),  A'_r = s A_r.
struct DownBackwardArgs {
  RowGroups rows;
  ActivationSpec activation;
  TensorView d_output;  // (T or R_cap, d), row stride free, last stride 1
  DownWeights weights;  // w only; b2's share of dS is score_gradient's
  TensorView scores;    // (slots or R_cap) or absent for 1
  TensorView h;         // (R_cap, h)
  TensorView dh;        // (R_cap, h) out; may be h itself
  TensorView a_scaled;  // (R_cap, n) out
  TensorView partials;  // (R_cap, score_partials(problem)) out, fp32/float64; absent: no dS wanted
  Workspace scratch;
  LowRankTerm low_rank = {};
};

// dscores of row r's slot = sum of partials_r in index order + <dO_{token(r)}, b2_e>; slots without
// a row get 0.
struct ScoreGradientArgs {
  RowGroups rows;
  TensorView partials;  // (R_cap, P)
  TensorView d_output;  // (T or R_cap, d)
  GroupedVector b2;     // (d) or absent
  TensorView dscores;   // (slots or R_cap) out
};

// dX~_r = dH_r W1_e + low rank.
struct UpBackwardArgs {
  RowGroups rows;
  TensorView dh;       // (R_cap, h)
  UpWeights weights;   // w only
  TensorView dx_rows;  // (R_cap, d) out
  Workspace scratch;
  LowRankTerm low_rank = {};
};

// Per expert, out(row, col) (+)= sum_r left_{l(r), row} right_{m(r), col}, for dW1 (left dH, right
// gathered X) and dW2 (left gathered dO, right A'). `left_gather` / `right_gather` say which side
// is read through row_to_token. An expert without rows gets exact zeros (overwrite) or keeps its
// accumulator; a frozen expert is not touched.
enum class RowAccess : uint8_t { direct, gathered };

struct WeightGradientArgs {
  RowGroups rows;
  TensorView left;        // (.., num_left)
  RowAccess left_access;  //
  TensorView right;       // (.., num_right)
  RowAccess right_access;
  // Per expert (num_left / halves, num_right) each, storage dtype or fp32: columns [0, n) of left
  // belong to out[0], [n, 2n) to out[1], which is how dW1 is laid out for every gate layout.
  std::array<GroupedMatrix, 2> out;
  int32_t halves = 1;
  GradMode mode;
  TensorView trainable;  // (E) uint8 or absent
  Workspace scratch;
};

// Per expert, out (+)= sum_r s_r v_{l(r)}: db1 (v = dH, no scores), db2 (v = gathered dO, s = S).
struct BiasGradientArgs {
  RowGroups rows;
  TensorView values;                 // (.., length)
  RowAccess access;                  //
  TensorView scores;                 // (slots or R_cap) or absent for 1
  std::array<GroupedVector, 2> out;  // (length / halves) per expert each, as above
  int32_t halves = 1;
  GradMode mode;
  TensorView trainable;
  Workspace scratch;
};

// A backend: one table of functions. `priority` orders the backends of a device, highest first.
struct Backend {
  const char* name;
  DeviceType device;
  int32_t priority;

  std::string (*description)();
  // Empty if usable on this machine, otherwise why not (missing instruction set, GPU, driver).
  std::string (*why_unavailable)();
  // Empty if it runs this problem, otherwise why not.
  std::string (*why_not)(const ExpertsProblem& problem);
  // The same for the router's operations, which depend on the storage dtype alone.
  std::string (*why_not_dtype)(DType dtype);

  // Empty if router_forward and router_backward run this router, otherwise why not.
  std::string (*why_not_router)(const RouteProblem& problem);

  // Exact scratch bytes: the largest that any of the operations of this problem needs.
  int64_t (*scratch_bytes)(const ExpertsProblem& problem, const Context& context);
  int64_t (*router_scratch_bytes)(const RouterProblem& problem, const Context& context);
  int64_t (*route_scratch_bytes)(const RouteProblem& problem, const Context& context);
  int64_t (*plan_scratch_bytes)(int64_t num_slots, int64_t num_experts, const Context& context);
  // Columns of `partials` in DownBackwardArgs.
  int64_t (*score_partials)(const ExpertsProblem& problem);
  // Rows of one tile of the grouped products: what token rounding rounds to.
  int64_t (*tile_rows)(const ExpertsProblem& problem);

  void (*router_logits)(const RouterLogitsArgs&, const Context&);
  void (*router_logits_backward)(const RouterLogitsBackwardArgs&, const Context&);
  void (*router_forward)(const RouterForwardArgs&, const Context&);
  void (*router_backward)(const RouterBackwardArgs&, const Context&);
  void (*build_plan)(const PlanArgs&, const Context&);
  void (*up_projection)(const UpProjectionArgs&, const Context&);
  void (*down_projection)(const DownProjectionArgs&, const Context&);
  void (*combine)(const CombineArgs&, const Context&);
  void (*scale_rows)(const ScaleRowsArgs&, const Context&);
  void (*down_backward)(const DownBackwardArgs&, const Context&);
  void (*score_gradient)(const ScoreGradientArgs&, const Context&);
  void (*up_backward)(const UpBackwardArgs&, const Context&);
  void (*weight_gradient)(const WeightGradientArgs&, const Context&);
  void (*bias_gradient)(const BiasGradientArgs&, const Context&);
};

}  // namespace penstock
