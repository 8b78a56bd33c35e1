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
  sigmoid_topk,             // sigmoid scores, groups of experts, a bias that steers the choice
  token_rounding,           // topk_softmax with each expert's count rounded to whole tiles
  expert_choice,            // softmax over all E logits, each expert takes its best C tokens
  threshold,                // sigmoid scores, every expert whose score reaches the threshold
};

PENSTOCK_API std::string_view name_of(RouterKind kind);

// Whether every token has K slots: scores and ids are then (T, K). Otherwise they are flat over
// slots, tokens are told apart by token_offsets, and slots past the last token's are padding.
constexpr bool has_fixed_top_k(RouterKind kind) {
  return kind != RouterKind::token_rounding && kind != RouterKind::expert_choice &&
         kind != RouterKind::threshold;
}

// Whether the scores of a pair are divided by their sum over the token's top K.
enum class ScoreScaling : uint8_t { normalized, plain };

// How token_rounding rounds an expert's count f to a multiple of the tile M (SonicMoE, arXiv
// 2512.14080). No count passes the tokens that there are, rounded down.
enum class RoundingMode : uint8_t {
  nearest_count,     // NR-f: the nearer multiple; halfway, the even one
  stochastic_count,  // SR-f: up with probability (f mod M) / M
  nearest_score,     // NR-s: up if the chosen of the last tile weigh more than what would fill it
  balanced_count,    // Balance-f: nearest with the error of the experts before carried along
  up,
  down,
};

PENSTOCK_API std::string_view name_of(ScoreScaling scaling);
PENSTOCK_API std::string_view name_of(RoundingMode mode);

// What routers are told besides the logits. A router reads its own entries only.
struct RouterOptions {
  // sigmoid_topk, token_rounding
  ScoreScaling scaling = ScoreScaling::normalized;
  // sigmoid_topk: experts are cut into num_groups runs of equal length, and a token chooses from
  // its top_groups best; a group's worth is the sum of its two best biased scores (DeepSeek-V3,
  // arXiv 2412.19437). scale multiplies the final scores.
  int32_t num_groups = 1;
  int32_t top_groups = 1;
  double scale = 1.0;
  // token_rounding
  RoundingMode rounding = RoundingMode::nearest_count;
  int64_t tile = 0;  // M
  // threshold: scores lie in [0, 1]
  double threshold = 0.5;
};

// What a router without a fixed K counts, in this order, as int32 on the device.
enum class RouterReport : uint8_t {
  pairs,                  // live slots
  tokens_without_expert,  // their output is 0
  dropped,                // pairs that lost their place: to rounding, or for want of slots
  added,                  // pairs that rounding added
  rounded,                // 1; 0 where there are fewer tokens than a tile, and top K stays as it is
};
inline constexpr int64_t kRouterReportSize = 5;

// Whether a router chooses, or scores the ids (and token_offsets) that it is given: a replay.
enum class Selection : uint8_t { chosen, given };

PENSTOCK_API std::string_view name_of(Selection selection);

// Any routing, ours or the caller's. Scores and ids are flat over slots, in token order. An id of
// -1, or any id >= E, skips its slot.
struct Routing {
  TensorView scores;         // (slots)  fp32 or float64
  TensorView ids;            // (slots)  int32 or int64
  TensorView token_offsets;  // (T+1)    int32, absent when every token has top_k slots
                             // slots at or past the last offset are padding, with ids of -1
  int64_t num_tokens = 0;
  int32_t top_k = 0;  // 0 when token_offsets is given

  int64_t num_slots() const { return ids.numel(); }
};

// The plan: int32 arrays that the caller owns, filled by build_plan or by a router without a fixed
// K, read by everything after.
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

  bool present() const { return expert_counts.present(); }
  int64_t num_experts() const { return expert_counts.numel(); }
  bool dispatched() const { return !row_to_token.present(); }
};

// Forward: ids[t] holds the K experts of token t by falling score; ties go to the lower id. A NaN
// logit ranks below every number, so a token always has K distinct valid ids; its scores are then
// NaN if a chosen logit is NaN (or, with softmax over all E, if any is). Among chosen logits that
// are all -inf, normalised scores are NaN, as in torch.softmax.
// Without a fixed K: the slots of a token are its top K that stayed, then the others by rising id.
struct RouterForwardArgs {
  RouterKind kind = RouterKind::softmax_topk;
  TensorView logits;              // (T, E)  fp32 or float64, last axis contiguous
  TensorView scores;              // (T, K) or (slots)  out, dtype of logits, contiguous
  TensorView ids;                 // (T, K) or (slots)  out (in for Selection::given), int32
  RouterOptions options = {};     //
  int32_t top_k = 0;              // K of token_rounding
  TensorView bias = {};           // (E)   sigmoid_topk, dtype of logits, absent: none
  TensorView seed = {};           // (1)   RoundingMode::stochastic_count, int64
  TensorView token_offsets = {};  // (T+1) out (in for given), int32, only without a fixed K
  TensorView report = {};         // (kRouterReportSize) out, int32, absent: not wanted
  Selection selection = Selection::chosen;
  Workspace workspace = {};
  RoutingPlan plan = {};  // out, what build_plan makes of ids and token_offsets, where K is not
                          // fixed and they are chosen; absent: not wanted. R_cap = slots; its
                          // token_offsets are absent or the router's, dropped_slots are absent.
};

// Backward: dlogits from dscores. Overwrites every element of dlogits; elements that the scores
// do not depend on are exact zeros. Which pairs were chosen is no function of the logits here.
struct RouterBackwardArgs {
  RouterKind kind = RouterKind::softmax_topk;
  TensorView logits;   // (T, E)  may be absent for softmax_topk, whose scores say all
  TensorView scores;   // (T, K) or (slots)
  TensorView ids;      // (T, K) or (slots)  int32
  TensorView dscores;  // (T, K) or (slots)
  TensorView dlogits;  // (T, E)  out
  RouterOptions options = {};
  int32_t top_k = 0;
  TensorView token_offsets = {};
  Workspace workspace = {};
};

// What the workspace of the router itself depends on.
struct RouteProblem {
  RouterKind kind = RouterKind::softmax_topk;
  RouterOptions options = {};
  int64_t num_tokens = 0;
  int64_t num_experts = 0;
  int64_t num_slots = 0;
  int32_t top_k = 0;  // K, also of token_rounding
  Selection selection = Selection::chosen;
  DType dtype = DType::float32;
  Device device = {};
};

// Exact bytes of workspace for router_forward; router_backward needs those of Selection::given.
PENSTOCK_API int64_t route_workspace_bytes(const RouteProblem& problem, const Context& context);

// Slots that token_rounding may fill: T * K + E * (M - 1), or T * K where T < M and nothing is
// rounded. Its scores and ids have as many.
PENSTOCK_API int64_t token_rounding_slots(const RouteProblem& problem);

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
  TensorView addend = {};  // (T, d)  dtype of x, last stride 1, added to dx before its rounding:
                           // the gradient of x by its other uses; absent: none
};
PENSTOCK_API void router_logits_backward(const RouterLogitsBackwardArgs& args,
                                         const Context& context);

// Fills the plan, with context.id_checks applied. Throws if slots or R_cap do not fit int32.
// Stable: rows of an expert are in slot order, so the same ids give the same plan on every backend.
PENSTOCK_API void build_plan(const Routing& routing, const RoutingPlan& plan, Workspace workspace,
                             const Context& context);

}  // namespace penstock
