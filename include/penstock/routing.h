// SPDX-License-Identifier: Apache-2.0
//
// Who goes where: router scores, and the plan that turns them into rows sorted by expert.
//
// A *slot* is one (token, choice) pair in token order: t * top_k + k, or token_offsets[t] + k
// when tokens have differing numbers of experts. A *row* is a routed slot; rows are sorted by
// expert, inside an expert by slot. The grouped products know only experts, rows and offsets.
#pragma once

#include <cstdint>
#include <string_view>

#include "penstock/export.h"
#include "penstock/tensor.h"

namespace penstock {

struct Context;

enum class RouterKind : uint8_t {
  softmax_topk,             // choose the K largest logits, softmax over the chosen
  topk_softmax,             // softmax over all E logits, choose the K largest, keep as they are
  topk_softmax_normalized,  // the same, then divided by the sum of the chosen
};

PENSTOCK_API std::string_view name_of(RouterKind kind);

// Forward: ids[t] holds the K experts of token t by falling logit; ties go to the lower id. A NaN
// logit ranks below every number, so a token always has K distinct valid ids; its scores are then
// NaN if a chosen logit is NaN (or, with softmax over all E, if any is). Among chosen logits that
// are all -inf, scores are NaN, as in torch.softmax.
struct RouterForwardArgs {
  RouterKind kind = RouterKind::softmax_topk;
  TensorView logits;  // (T, E)  fp32 or float64, last axis contiguous
  TensorView scores;  // (T, K)  out, dtype of logits, contiguous
  TensorView ids;     // (T, K)  out, int32, contiguous
};

// Backward: dlogits from dscores. Overwrites every element of dlogits; elements that the scores
// do not depend on are exact zeros.
struct RouterBackwardArgs {
  RouterKind kind = RouterKind::softmax_topk;
  TensorView logits;   // (T, E)  may be absent for softmax_topk, whose scores say all
  TensorView scores;   // (T, K)
  TensorView ids;      // (T, K)  int32
  TensorView dscores;  // (T, K)
  TensorView dlogits;  // (T, E)  out
};

// Any routing, ours or the caller's. Scores and ids are flat over slots, in token order. An id of
// -1, or any id >= E, skips its slot.
struct Routing {
  TensorView scores;         // (slots)  fp32 or float64
  TensorView ids;            // (slots)  int32 or int64
  TensorView token_offsets;  // (T+1)    int32, absent when every token has top_k slots
  int64_t num_tokens = 0;
  int32_t top_k = 0;  // 0 when token_offsets is given

  int64_t num_slots() const { return ids.numel(); }
};

// The plan: int32 arrays that the caller owns, filled by build_plan, read by everything after.
//
// Rows of expert e are expert_offsets[e] .. expert_offsets[e] + expert_counts[e]. Plans built here
// have no gaps (offsets[e+1] = offsets[e] + counts[e]); a caller who brings rows already dispatched
// may leave gaps (a padded receive buffer), and rows in a gap are never read or written.
// Rows at or past row_capacity do not exist: a slot that would land there is skipped
// (slot_to_row = -1), taken off the counts, and counted in `dropped_slots`.
struct RoutingPlan {
  TensorView expert_counts;   // (E)
  TensorView expert_offsets;  // (E+1)    exclusive, leading 0
  TensorView row_to_token;    // (R_cap)  absent: rows are already dispatched, row r reads X[r]
  TensorView row_to_slot;     // (R_cap)  absent: as above, scores (if any) are per row
  TensorView slot_to_row;     // (slots)  -1: skipped; absent: as above
  TensorView token_offsets;   // (T+1)    absent when every token has top_k slots
  TensorView dropped_slots;   // (1)      slots dropped for want of capacity; absent: not wanted
  int32_t top_k = 0;          // 0 when token_offsets is given

  int64_t num_experts() const { return expert_counts.numel(); }
  bool dispatched() const { return !row_to_token.present(); }
};

// How user-given ids are treated. `trusted`: every id outside [0, E) skips its slot, a duplicate
// is one more row. `checked`: a negative id other than -1, or a duplicate within a token, is an
// error that names the token (this reads the ids on the host, so never inside a graph capture).
enum class IdChecks : uint8_t { trusted, checked };

PENSTOCK_API void router_forward(const RouterForwardArgs& args, const Context& context);
PENSTOCK_API void router_backward(const RouterBackwardArgs& args, const Context& context);

// What the router's own products depend on, for workspace queries.
struct RouterProblem {
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int64_t num_experts = 0;
  DType dtype = DType::float32;  // of x and the router weight
  Device device = {};
};

// Exact bytes of workspace for router_logits and for router_logits_backward (the larger of both).
PENSTOCK_API int64_t router_workspace_bytes(const RouterProblem& problem, const Context& context);
// Exact bytes of workspace for build_plan.
PENSTOCK_API int64_t plan_workspace_bytes(int64_t num_slots, int64_t num_experts, Device device,
                                          const Context& context);

// logits = X Wr^T, in the accumulator type. One row's result does not depend on other rows.
struct RouterLogitsArgs {
  TensorView x;              // (T, d)
  TensorView router_weight;  // (E, d)  dtype of x, contiguous
  TensorView logits;         // (T, E)  out, fp32 (float64 for float64 x)
  Workspace workspace;
};
PENSTOCK_API void router_logits(const RouterLogitsArgs& args, const Context& context);

struct RouterLogitsBackwardArgs {
  TensorView dlogits;         // (T, E)  fp32 or float64
  TensorView x;               // (T, d)
  TensorView router_weight;   // (E, d)
  TensorView dx;              // (T, d)  out, absent: not wanted
  TensorView drouter_weight;  // (E, d)  out, dtype of x or fp32, absent: not wanted
  Workspace workspace;
};
PENSTOCK_API void router_logits_backward(const RouterLogitsBackwardArgs& args,
                                         const Context& context);

// Fills the plan, with context.id_checks applied. Throws if slots or R_cap do not fit int32.
// Stable: rows of an expert are in slot order, so the same ids give the same plan on every backend.
PENSTOCK_API void build_plan(const Routing& routing, const RoutingPlan& plan, Workspace workspace,
                             const Context& context);

}  // namespace penstock
