// SPDX-License-Identifier: Apache-2.0
//
// See validate.h. x gives the sizes, the dtype and the device; everything else must agree with it.
#include "experts/validate.h"

#include <array>
#include <string>

#include "experts/problem.h"
#include "tensor/checks.h"
#include "tensor/overlap.h"

namespace penstock {
namespace {

// One of the six weight tensors: its names, axes and shape under a configuration.
struct WeightEntry {
  TensorView ExpertWeights::*member;
  std::string_view name;
  std::string_view grad_name;
  std::string_view axes;
  Extents extents;
};

std::array<WeightEntry, 6> weight_entries(const ExpertsProblem& problem, bool separate_up) {
  const int64_t num_experts = problem.num_experts;
  const int64_t d = problem.hidden_size;
  const int64_t n = problem.intermediate_size;
  const int64_t h = separate_up ? n : problem.preactivation_size();
  const bool output_major = problem.config.weight_order == WeightOrder::output_major;
  const std::string_view up_axes = output_major ? "(E, n, d)" : "(E, d, n)";
  const std::string_view w1_axes = h == n ? up_axes : (output_major ? "(E, 2n, d)" : "(E, d, 2n)");
  const Extents w1 = output_major ? Extents{num_experts, h, d} : Extents{num_experts, d, h};
  const Extents up = output_major ? Extents{num_experts, n, d} : Extents{num_experts, d, n};
  const Extents w2 = output_major ? Extents{num_experts, d, n} : Extents{num_experts, n, d};
  return {{
      {&ExpertWeights::w1, "weights.w1", "weight_grads.into.w1", w1_axes, w1},
      {&ExpertWeights::w1_up, "weights.w1_up", "weight_grads.into.w1_up", up_axes, up},
      {&ExpertWeights::w2, "weights.w2", "weight_grads.into.w2",
       output_major ? "(E, d, n)" : "(E, n, d)", w2},
      {&ExpertWeights::b1,
       "weights.b1",
       "weight_grads.into.b1",
       h == n ? "(E, n)" : "(E, 2n)",
       {num_experts, h}},
      {&ExpertWeights::b1_up,
       "weights.b1_up",
       "weight_grads.into.b1_up",
       "(E, n)",
       {num_experts, n}},
      {&ExpertWeights::b2, "weights.b2", "weight_grads.into.b2", "(E, d)", {num_experts, d}},
  }};
}

Layout layout_of(const WeightEntry& entry) {
  return entry.extents.rank == 3 ? Layout::matrices : Layout::distinct_rows;
}

DTypeRule dtype_of_x(const ExpertsProblem& problem) { return {problem.dtype, "x"}; }
DeviceRule device_of_x(const ExpertsProblem& problem) { return {problem.device, "x"}; }

void check_weights(const ExpertWeights& weights, const ExpertsProblem& problem) {
  const bool separate_up = weights.w1_up.present();
  if (!is_gated(problem.config.activation)) {
    constexpr std::string_view kUngated = "the activation has no gate";
    check_absent(weights.w1_up, "weights.w1_up", kUngated);
    check_absent(weights.b1_up, "weights.b1_up", kUngated);
  }
  if (!separate_up) check_absent(weights.b1_up, "weights.b1_up", "weights.w1_up is absent");
  if (separate_up && weights.b1.present()) check_present(weights.b1_up, "weights.b1_up");
  if (separate_up && !weights.b1.present())
    check_absent(weights.b1_up, "weights.b1_up", "weights.b1 is absent");
  for (const WeightEntry& entry : weight_entries(problem, separate_up)) {
    const TensorView& view = weights.*entry.member;
    if (!view.present()) continue;
    check_tensor(view, {entry.name, entry.axes, entry.extents, dtype_of_x(problem),
                        device_of_x(problem), layout_of(entry)});
  }
}

void check_same_presence(const TensorView& a, const TensorView& b, std::string_view a_name,
                         std::string_view b_name) {
  if (a.present() == b.present()) return;
  const bool first = a.present();
  fail({std::string(first ? b_name : a_name), "an absent tensor",
        "a tensor, because " + std::string(first ? a_name : b_name) + " is wanted",
        "Pass both or neither; gate and up gradients are computed together."});
}

void check_weight_grads(const WeightGrads& grads, const ExpertWeights& weights,
                        const ExpertsProblem& problem) {
  const bool separate_up = weights.w1_up.present();
  const ExpertWeights& into = grads.into;
  if (separate_up) {
    check_same_presence(into.w1, into.w1_up, "weight_grads.into.w1", "weight_grads.into.w1_up");
    check_same_presence(into.b1, into.b1_up, "weight_grads.into.b1", "weight_grads.into.b1_up");
  }
  for (const WeightEntry& entry : weight_entries(problem, separate_up)) {
    const TensorView& view = into.*entry.member;
    if (!view.present()) continue;
    if (!(weights.*entry.member).present())
      check_absent(view, entry.grad_name, std::string(entry.name) + " is absent");
    DTypeRule dtype = dtype_of_x(problem);
    if (view.dtype == DType::float32 && problem.dtype != DType::float64) dtype = {DType::float32};
    check_tensor(view, {entry.grad_name, entry.axes, entry.extents, dtype, device_of_x(problem),
                        layout_of(entry)});
  }
  if (separate_up && into.w1.present())
    check_dtype(into.w1_up, "weight_grads.into.w1_up", {into.w1.dtype, "weight_grads.into.w1"});
  if (separate_up && into.b1.present())
    check_dtype(into.b1_up, "weight_grads.into.b1_up", {into.b1.dtype, "weight_grads.into.b1"});
  if (grads.trainable.present())
    check_tensor(grads.trainable, {"weight_grads.trainable",
                                   "(E)",
                                   {problem.num_experts},
                                   {DType::uint8},
                                   device_of_x(problem)});
}

// Counts and offsets that another program wrote address rows of the caller's buffers.
void check_dispatched_offsets(const RoutingPlan& plan, const ExpertsProblem& problem) {
  if (problem.device.type != DeviceType::cpu) return;
  const int32_t* counts = plan.expert_counts.as<const int32_t>();
  const int32_t* offsets = plan.expert_offsets.as<const int32_t>();
  int64_t end = 0;  // of the experts before
  for (int64_t expert = 0; expert < problem.num_experts; ++expert) {
    const int64_t begin = offsets[expert];
    const int64_t count = counts[expert];
    if (count >= 0 && begin >= end && begin + count <= problem.row_capacity) {
      end = begin + count;
      continue;
    }
    fail({"plan.expert_offsets",
          "rows " + std::to_string(begin) + " to " + std::to_string(begin + count) +
              " for expert " + std::to_string(expert),
          "rows from " + std::to_string(end) + " to at most " +
              std::to_string(problem.row_capacity) + ", the rows of x",
          "Pass counts and offsets of experts in rising order that fit the buffer."});
  }
}

void check_plan(const RoutingPlan& plan, const ExpertsProblem& problem) {
  const DTypeRule index{DType::int32};
  const DeviceRule device = device_of_x(problem);
  check_tensor(plan.expert_counts,
               {"plan.expert_counts", "(E)", {problem.num_experts}, index, device});
  check_tensor(plan.expert_offsets,
               {"plan.expert_offsets", "(E+1)", {problem.num_experts + 1}, index, device});
  if (plan.dispatched()) {
    constexpr std::string_view kDispatched = "plan.row_to_token is absent (dispatched rows)";
    check_absent(plan.row_to_slot, "plan.row_to_slot", kDispatched);
    check_absent(plan.slot_to_row, "plan.slot_to_row", kDispatched);
    check_absent(plan.token_offsets, "plan.token_offsets", kDispatched);
    check_dispatched_offsets(plan, problem);
    return;
  }
  const Extents rows{problem.row_capacity};
  check_tensor(plan.row_to_token, {"plan.row_to_token", "(R_cap)", rows, index, device});
  check_tensor(plan.row_to_slot, {"plan.row_to_slot", "(R_cap)", rows, index, device});
  check_tensor(plan.slot_to_row,
               {"plan.slot_to_row", "(slots)", {problem.num_slots}, index, device});
  if (plan.token_offsets.present()) {
    check_tensor(plan.token_offsets,
                 {"plan.token_offsets", "(T+1)", {problem.num_tokens + 1}, index, device});
    if (plan.top_k == 0) return;
    fail({"plan.top_k", std::to_string(plan.top_k), "0, because plan.token_offsets is given",
          "Set one of the two."});
  }
  if (plan.top_k < 0 || problem.num_tokens * plan.top_k != problem.num_slots)
    fail({"plan.top_k",
          std::to_string(plan.top_k) + " for " + std::to_string(problem.num_tokens) + " tokens",
          "slots = T * top_k = " + std::to_string(problem.num_slots),
          "Pass token_offsets where tokens have differing numbers of experts."});
}

TensorSpec score_spec(std::string_view name, const ExpertsProblem& problem) {
  const bool dispatched = problem.rows == RowSource::dispatched;
  return {name,
          dispatched ? "(R_cap)" : "(slots)",
          {dispatched ? problem.row_capacity : problem.num_slots},
          {accumulator_of(problem.dtype), "the accumulator of x"},
          device_of_x(problem)};
}

void check_scores(const TensorView& scores, const ExpertsProblem& problem) {
  if (problem.rows == RowSource::dispatched && !scores.present()) return;  // all are 1
  check_tensor(scores, score_spec("scores", problem));
}

TensorSpec token_rows(std::string_view name, const ExpertsProblem& problem, Layout layout) {
  return {name,
          problem.rows == RowSource::dispatched ? "(R_cap, d)" : "(T, d)",
          {problem.num_tokens, problem.hidden_size},
          dtype_of_x(problem),
          device_of_x(problem),
          layout};
}

TensorSpec row_buffer(std::string_view name, std::string_view axes, int64_t width,
                      const ExpertsProblem& problem) {
  return {name, axes, {problem.row_capacity, width}, dtype_of_x(problem), device_of_x(problem)};
}

void check_preactivation(const TensorView& h, const ExpertsProblem& problem) {
  if (problem.config.save == SavePolicy::preactivation)
    return check_tensor(h, row_buffer("h", "(R_cap, h)", problem.preactivation_size(), problem));
  check_absent(h, "h", "save is " + std::string(name_of(problem.config.save)));
}

void check_delayed(const DelayedWeightGrads& delayed, const ExpertsProblem& problem,
                   BackwardPass pass) {
  if (pass == BackwardPass::whole) {
    constexpr std::string_view kWhole = "experts_backward makes both halves";
    check_absent(delayed.dh, "delayed.dh", kWhole);
    check_absent(delayed.a_scaled, "delayed.a_scaled", kWhole);
    return;
  }
  check_tensor(delayed.dh,
               row_buffer("delayed.dh", "(R_cap, h)", problem.preactivation_size(), problem));
  check_tensor(delayed.a_scaled,
               row_buffer("delayed.a_scaled", "(R_cap, n)", problem.intermediate_size, problem));
}

constexpr std::array kWeightMembers = {&ExpertWeights::w1,    &ExpertWeights::w1_up,
                                       &ExpertWeights::w2,    &ExpertWeights::b1,
                                       &ExpertWeights::b1_up, &ExpertWeights::b2};
constexpr std::array<std::string_view, 6> kWeightNames = {
    "weights.w1", "weights.w1_up", "weights.w2", "weights.b1", "weights.b1_up", "weights.b2"};
constexpr std::array<std::string_view, 6> kGradNames = {
    "weight_grads.into.w1", "weight_grads.into.w1_up", "weight_grads.into.w2",
    "weight_grads.into.b1", "weight_grads.into.b1_up", "weight_grads.into.b2"};

void add_inputs(AliasCheck& check, const ExpertWeights& weights, const RoutingPlan& plan) {
  for (size_t i = 0; i < kWeightMembers.size(); ++i)
    check.input(weights.*kWeightMembers[i], kWeightNames[i]);
  check.input(plan.expert_counts, "plan.expert_counts");
  check.input(plan.expert_offsets, "plan.expert_offsets");
  check.input(plan.row_to_token, "plan.row_to_token");
  check.input(plan.row_to_slot, "plan.row_to_slot");
  check.input(plan.slot_to_row, "plan.slot_to_row");
  check.input(plan.token_offsets, "plan.token_offsets");
}

}  // namespace

void check_forward(const ExpertsForwardArgs& args, const ExpertsProblem& problem) {
  check_problem(problem);
  check_tensor(args.x, token_rows("x", problem, Layout::readable_rows));
  check_weights(args.weights, problem);
  check_plan(args.plan, problem);
  check_scores(args.scores, problem);
  check_preactivation(args.h, problem);
  check_tensor(args.output, token_rows("output", problem, Layout::contiguous));
}

void check_backward(const ExpertsBackwardArgs& args, const ExpertsProblem& problem,
                    BackwardPass pass) {
  check_problem(problem);
  check_backward_possible(args.config);
  check_tensor(args.x, token_rows("x", problem, Layout::readable_rows));
  check_tensor(args.d_output, token_rows("d_output", problem, Layout::readable_rows));
  check_weights(args.weights, problem);
  check_plan(args.plan, problem);
  check_scores(args.scores, problem);
  check_delayed(args.delayed, problem, pass);
  if (pass == BackwardPass::weights) {
    constexpr std::string_view kData = "experts_backward_data computes it";
    check_absent(args.dx, "dx", kData);
    check_absent(args.dscores, "dscores", kData);
  } else {
    check_preactivation(args.h, problem);
  }
  if (pass == BackwardPass::data) {
    for (size_t i = 0; i < kWeightMembers.size(); ++i)
      check_absent(args.weight_grads.into.*kWeightMembers[i], kGradNames[i],
                   "experts_backward_weights computes it");
    check_absent(args.weight_grads.trainable, "weight_grads.trainable",
                 "experts_backward_weights computes the weight gradients");
  }
  if (args.dx.present()) check_tensor(args.dx, token_rows("dx", problem, Layout::contiguous));
  if (args.dscores.present()) check_tensor(args.dscores, score_spec("dscores", problem));
  check_weight_grads(args.weight_grads, args.weights, problem);
}

void check_aliases(const ExpertsForwardArgs& args, int64_t workspace_bytes) {
  AliasCheck check;
  check.input(args.x, "x");
  add_inputs(check, args.weights, args.plan);
  check.input(args.scores, "scores");
  check.output(args.h, "h");
  check.output(args.output, "output");
  check.workspace(args.workspace, workspace_bytes);
  check.run();
}

void check_aliases(const ExpertsBackwardArgs& args, int64_t workspace_bytes, BackwardPass pass) {
  AliasCheck check;
  check.input(args.x, "x");
  check.input(args.d_output, "d_output");
  add_inputs(check, args.weights, args.plan);
  check.input(args.scores, "scores");
  if (!overwrites_h(args.config)) {
    check.input(args.h, "h");
  } else if (args.h.data != args.delayed.dh.data) {  // otherwise one tensor, checked as dH below
    check.output(args.h, "h");
  }
  check.input(args.weight_grads.trainable, "weight_grads.trainable");
  check.output(args.dx, "dx");
  check.output(args.dscores, "dscores");
  for (size_t i = 0; i < kWeightMembers.size(); ++i)
    check.output(args.weight_grads.into.*kWeightMembers[i], kGradNames[i]);
  if (pass == BackwardPass::weights) {
    check.input(args.delayed.dh, "delayed.dh");
    check.input(args.delayed.a_scaled, "delayed.a_scaled");
  } else {
    check.output(args.delayed.dh, "delayed.dh");
    check.output(args.delayed.a_scaled, "delayed.a_scaled");
  }
  check.workspace(args.workspace, workspace_bytes);
  check.run();
}

}  // namespace penstock
