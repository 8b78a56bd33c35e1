// SPDX-License-Identifier: Apache-2.0
//
// See layer_call.h. This file makes a call's tensors and runs it; layer_check.cpp judges it.
#include "support/layer_call.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace penstock::test {
namespace {

constexpr int64_t kGapRows = 2;  // between the experts of dispatched rows

// The step that takes row i of a half to its row in a tensor that holds both.
TensorView half_rows(TensorView view, int32_t axis, int half, GateLayout layout) {
  const auto a = static_cast<size_t>(axis);
  const int64_t n = view.shape[a] / 2;
  const int64_t start = layout == GateLayout::interleaved ? half : half * n;
  view.data = view.as<char>() + start * view.strides[a] * size_of(view.dtype);
  if (layout == GateLayout::interleaved) view.strides[a] *= 2;
  view.shape[a] = n;
  return view;
}

// (E, a, b) seen as (E, b, a).
TensorView transposed(TensorView view) {
  std::swap(view.shape[1], view.shape[2]);
  std::swap(view.strides[1], view.strides[2]);
  return view;
}

template <typename Visit>
void for_each(const Array3& array, int64_t experts, Visit&& visit) {
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t r = 0; r < array.rows; ++r)
      for (int64_t c = 0; c < array.cols; ++c) visit(e, r, c);
}

}  // namespace

std::string text_of(const LayerForm& form) {
  const ExpertsConfig& config = form.config;
  std::string text(name_of(config.activation));
  for (std::string_view part :
       {name_of(form.dtype), name_of(form.grad_dtype), name_of(config.gate_layout),
        name_of(config.weight_order), name_of(config.save)})
    text.append(1, ' ').append(part);
  text += form.bias == Bias::both ? " biases" : " no-bias";
  text += form.up == UpForm::separate ? " separate-up" : " joined-up";
  text += form.rows == RowSource::dispatched ? " dispatched" : " routed";
  text += form.slots == SlotForm::variable ? " variable-slots" : " top-k";
  text += form.passes == PassForm::delayed ? " delayed" : " whole";
  text += form.mode == GradMode::accumulate ? " accumulate" : " overwrite";
  text += form.training == Training::some_frozen ? " some-frozen" : " all-trainable";
  return text;
}

ExpertWeights LayerCall::WeightTensors::views() const {
  return {w1.view(), w1_up.view(), w2.view(), b1.view(), b1_up.view(), b2.view()};
}

LayerCall::LayerCall(const LayerForm& form, const Context& call_context, uint64_t seed)
    : context(call_context), form_(form) {
  make_dense(seed);
  expected_ = run_dense(dense_);
  if (dispatched())
    make_dispatched_plan();
  else
    make_routed_plan();
  make_inputs();
  make_outputs(seed);
}

void LayerCall::make_dense(uint64_t seed) {
  Random random(seed);
  const int64_t d = form_.hidden_size;
  const int64_t n = form_.intermediate_size;
  const int64_t experts = form_.num_experts;
  const auto values = [&](int64_t count, double scale) {
    std::vector<double> v(static_cast<size_t>(count));
    for (double& value : v)
      value = form_.values == Values::small_integers ? static_cast<double>(random.below(3) - 1)
                                                     : rounded(random.value() * scale, form_.dtype);
    return v;
  };
  const auto array = [&](int64_t rows, int64_t cols, double scale) {
    Array3 a(experts, rows, cols);
    if (scale > 0) a.values = values(experts * rows * cols, scale);
    return a;
  };
  dense_.activation = form_.config.activation;
  dense_.clamp_alpha = form_.config.clamp_alpha;
  dense_.clamp_limit = form_.config.clamp_limit;
  dense_.h_dtype = form_.oracle == Oracle::stored_h ? form_.dtype : DType::float64;
  dense_.num_tokens = form_.num_tokens;
  dense_.hidden_size = d;
  dense_.intermediate_size = n;
  dense_.num_experts = experts;
  dense_.x = values(form_.num_tokens * d, 1);
  dense_.d_output = values(form_.num_tokens * d, 1);
  const double bias_scale = form_.bias == Bias::both ? 0.5 : 0;
  for (int half = 0; half < 2; ++half) {
    const bool used = half < halves();
    dense_.weights.w1[half] = array(n, d, used ? 1 / std::sqrt(static_cast<double>(d)) : 0);
    dense_.weights.b1[half] = array(n, 1, used ? bias_scale : 0);
  }
  dense_.weights.w2 = array(d, n, 1 / std::sqrt(static_cast<double>(n)));
  dense_.weights.b2 = array(d, 1, bias_scale);
  make_slots(random);
}

void LayerCall::make_slots(Random& random) {
  std::vector<int32_t> token_offsets = {0};
  for (int64_t token = 0; token < form_.num_tokens; ++token) {
    // Differing numbers of experts, none at all among them.
    const int64_t count =
        form_.slots == SlotForm::variable ? random.below(form_.top_k + 1) : int64_t{form_.top_k};
    const int64_t first = random.below(form_.num_experts);
    for (int64_t k = 0; k < count; ++k) {
      const bool skipped = form_.slots == SlotForm::variable && random.below(4) == 0;
      const double score =
          form_.values == Values::small_integers
              ? static_cast<double>(1 + random.below(2))
              : rounded(0.1 + std::abs(random.value()), accumulator_of(form_.dtype));
      dense_.slots.push_back({token, skipped ? -1 : (first + k) % form_.num_experts, score});
    }
    token_offsets.push_back(static_cast<int32_t>(dense_.slots.size()));
  }
  if (form_.slots == SlotForm::variable) token_offsets_ = int32_tensor(token_offsets);
}

void LayerCall::make_routed_plan() {
  const auto num_slots = static_cast<int64_t>(dense_.slots.size());
  std::vector<int32_t> ids;
  for (const DenseSlot& slot : dense_.slots)
    // Both ways to skip.
    ids.push_back(static_cast<int32_t>(slot.expert >= 0 ? slot.expert
                                       : slot.token % 2 ? -1
                                                        : form_.num_experts));
  ids_ = int32_tensor(ids);
  const auto index = [](int64_t size) { return Tensor(DType::int32, {size}); };
  counts_ = index(form_.num_experts);
  offsets_ = index(form_.num_experts + 1);
  row_to_token_ = index(num_slots);
  row_to_slot_ = index(num_slots);
  slot_to_row_ = index(num_slots);
  RoutingPlan plan;
  plan.expert_counts = counts_.view();
  plan.expert_offsets = offsets_.view();
  plan.row_to_token = row_to_token_.view();
  plan.row_to_slot = row_to_slot_.view();
  plan.slot_to_row = slot_to_row_.view();
  plan.token_offsets = token_offsets_.view();
  plan.top_k = token_offsets_.view().present() ? 0 : form_.top_k;
  Routing routing;
  routing.ids = ids_.view();
  routing.token_offsets = token_offsets_.view();
  routing.num_tokens = form_.num_tokens;
  routing.top_k = plan.top_k;
  const int64_t bytes = plan_workspace_bytes(num_slots, form_.num_experts, Device{}, context);
  build_plan(routing, plan, workspace(plan_block_, bytes), context);
  forward_args.plan = plan;
}

void LayerCall::make_dispatched_plan() {
  std::vector<int32_t> counts;
  std::vector<int32_t> offsets;
  for (int64_t expert = 0; expert < form_.num_experts; ++expert) {
    offsets.push_back(static_cast<int32_t>(slot_of_row_.size()));
    for (size_t slot = 0; slot < dense_.slots.size(); ++slot)
      if (dense_.slots[slot].expert == expert) slot_of_row_.push_back(static_cast<int64_t>(slot));
    counts.push_back(static_cast<int32_t>(slot_of_row_.size()) - offsets.back());
    slot_of_row_.insert(slot_of_row_.end(), kGapRows, -1);
  }
  offsets.push_back(static_cast<int32_t>(slot_of_row_.size()));
  counts_ = int32_tensor(counts);
  offsets_ = int32_tensor(offsets);
  forward_args.plan.expert_counts = counts_.view();
  forward_args.plan.expert_offsets = offsets_.view();
}

void LayerCall::make_inputs() {
  const int64_t d = form_.hidden_size;
  const DType score_dtype = accumulator_of(form_.dtype);
  const auto num_slots = static_cast<int64_t>(dense_.slots.size());
  const int64_t rows = dispatched() ? static_cast<int64_t>(slot_of_row_.size()) : form_.num_tokens;
  x_ = Tensor(form_.dtype, {rows, d});
  d_output_ = Tensor(form_.dtype, {rows, d});
  scores_ = Tensor(score_dtype, {dispatched() ? rows : num_slots});
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t slot = dispatched() ? slot_of_row_[static_cast<size_t>(row)] : -1;
    if (dispatched() && slot < 0) continue;  // gaps stay poison
    const int64_t token = dispatched() ? dense_.slots[static_cast<size_t>(slot)].token : row;
    for (int64_t c = 0; c < d; ++c) {
      set(x_.view(), {row, c}, dense_.x[static_cast<size_t>(token * d + c)]);
      set(d_output_.view(), {row, c}, dense_.d_output[static_cast<size_t>(token * d + c)]);
    }
    if (dispatched()) set(scores_.view(), {row}, dense_.slots[static_cast<size_t>(slot)].score);
  }
  if (!dispatched())
    for (int64_t slot = 0; slot < num_slots; ++slot)
      set(scores_.view(), {slot}, dense_.slots[static_cast<size_t>(slot)].score);
  weights_ = make_weight_tensors(form_.dtype);
  write_weights(dense_.weights, weights_.views());
  forward_args.config = form_.config;
  forward_args.x = x_.view();
  forward_args.scores = scores_.view();
  forward_args.weights = weights_.views();
}

LayerCall::WeightTensors LayerCall::make_weight_tensors(DType dtype) const {
  const int64_t experts = form_.num_experts;
  const int64_t d = form_.hidden_size;
  const int64_t n = form_.intermediate_size;
  const bool separate = form_.up == UpForm::separate && halves() == 2;
  const int64_t h = separate ? n : halves() * n;
  const bool output_major = form_.config.weight_order == WeightOrder::output_major;
  const auto matrix = [&](int64_t rows, int64_t cols) {
    return output_major ? Tensor(dtype, {experts, rows, cols})
                        : Tensor(dtype, {experts, cols, rows});
  };
  WeightTensors made;
  made.w1 = matrix(h, d);
  made.w2 = matrix(d, n);
  if (separate) made.w1_up = matrix(n, d);
  if (form_.bias == Bias::none) return made;
  made.b1 = Tensor(dtype, {experts, h});
  made.b2 = Tensor(dtype, {experts, d});
  if (separate) made.b1_up = Tensor(dtype, {experts, n});
  return made;
}

TensorView LayerCall::w1_part(const ExpertWeights& weights, int half) const {
  const bool output_major = form_.config.weight_order == WeightOrder::output_major;
  const TensorView& tensor = half == 1 && weights.w1_up.present() ? weights.w1_up : weights.w1;
  const TensorView rows_first = output_major ? tensor : transposed(tensor);
  if (halves() == 1 || weights.w1_up.present()) return rows_first;
  return half_rows(rows_first, 1, half, form_.config.gate_layout);
}

TensorView LayerCall::b1_part(const ExpertWeights& weights, int half) const {
  const TensorView& tensor = half == 1 && weights.b1_up.present() ? weights.b1_up : weights.b1;
  if (halves() == 1 || weights.b1_up.present()) return tensor;
  return half_rows(tensor, 1, half, form_.config.gate_layout);
}

void LayerCall::write_weights(const DenseWeights& from, const ExpertWeights& to) const {
  const bool output_major = form_.config.weight_order == WeightOrder::output_major;
  const TensorView w2 = output_major ? to.w2 : transposed(to.w2);
  for (int half = 0; half < halves(); ++half) {
    const TensorView w1 = w1_part(to, half);
    for_each(from.w1[half], form_.num_experts, [&](int64_t e, int64_t r, int64_t c) {
      set(w1, {e, r, c}, from.w1[half].at(e, r, c));
    });
    if (form_.bias == Bias::none) continue;
    const TensorView b1 = b1_part(to, half);
    for_each(from.b1[half], form_.num_experts, [&](int64_t e, int64_t r, int64_t) {
      set(b1, {e, r}, from.b1[half].at(e, r, 0));
    });
  }
  for_each(from.w2, form_.num_experts, [&](int64_t e, int64_t r, int64_t c) {
    set(w2, {e, r, c}, from.w2.at(e, r, c));
  });
  if (form_.bias == Bias::both)
    for_each(from.b2, form_.num_experts, [&](int64_t e, int64_t r, int64_t) {
      set(to.b2, {e, r}, from.b2.at(e, r, 0));
    });
}

void LayerCall::make_outputs(uint64_t seed) {
  const ExpertsProblem problem = problem_of(forward_args);
  output_ = Tensor(form_.dtype, {problem.num_tokens, form_.hidden_size});
  dx_ = Tensor(form_.dtype, {problem.num_tokens, form_.hidden_size});
  dscores_ = Tensor(scores_.view().dtype, {scores_.view().numel()});
  grads_ = make_weight_tensors(form_.grad_dtype);
  Random random(seed + 1000);
  prior_ = expected_.grads;
  for (Array3* array :
       {&prior_.w1[0], &prior_.w1[1], &prior_.b1[0], &prior_.b1[1], &prior_.w2, &prior_.b2})
    for (double& value : array->values) value = rounded(random.value(), form_.grad_dtype);
  write_weights(prior_, grads_.views());
  forward_args.output = output_.view();
  backward_args = {};
  backward_args.config = form_.config;
  backward_args.d_output = d_output_.view();
  backward_args.x = forward_args.x;
  backward_args.weights = forward_args.weights;
  backward_args.scores = forward_args.scores;
  backward_args.plan = forward_args.plan;
  backward_args.dx = dx_.view();
  backward_args.dscores = dscores_.view();
  backward_args.weight_grads.into = grads_.views();
  backward_args.weight_grads.mode = form_.mode;
  if (form_.config.save == SavePolicy::preactivation) {
    h_ = Tensor(form_.dtype, {problem.row_capacity, problem.preactivation_size()});
    forward_args.h = backward_args.h = h_.view();
  }
  if (form_.training == Training::some_frozen) {
    trainable_ = Tensor(DType::uint8, {form_.num_experts});
    for (int64_t e = 0; e < form_.num_experts; ++e)
      trainable_.view().as<uint8_t>()[e] = e % 2 == 0 ? 1 : 0;
    backward_args.weight_grads.trainable = trainable_.view();
  }
  if (form_.passes == PassForm::delayed) {
    dh_ = Tensor(form_.dtype, {problem.row_capacity, problem.preactivation_size()});
    a_scaled_ = Tensor(form_.dtype, {problem.row_capacity, form_.intermediate_size});
  }
}

void LayerCall::spread(int64_t pad, int64_t offset) {
  const auto move = [&](TensorView& view, int64_t outer_pad) {
    if (!view.present()) return;
    TensorView moved = view;
    moved.strides[0] += outer_pad;
    Block block(moved.size(0) * moved.strides[0] * size_of(view.dtype) + offset);
    moved.data = block.data() + offset;
    for (int64_t i = 0; i < view.size(0); ++i)
      std::memcpy(address_at(moved, {i}), address_at(view, {i}),
                  static_cast<size_t>(view.bytes() / view.size(0)));
    spread_.push_back(std::move(block));
    view = moved;
  };
  move(forward_args.x, pad);
  move(backward_args.d_output, pad);
  backward_args.x = forward_args.x;
  for (ExpertWeights* weights : {&forward_args.weights, &backward_args.weight_grads.into})
    for (TensorView* view :
         {&weights->w1, &weights->w1_up, &weights->w2, &weights->b1, &weights->b1_up, &weights->b2})
      move(*view, pad);
  backward_args.weights = forward_args.weights;
}

Workspace LayerCall::workspace(Block& block, int64_t bytes) {
  block = Block(bytes);
  return {block.data(), bytes};
}

void LayerCall::forward() {
  const int64_t bytes = forward_workspace_bytes(problem_of(forward_args), context);
  forward_args.workspace = workspace(forward_block_, bytes);
  experts_forward(forward_args, context);
}

void LayerCall::backward() {
  const ExpertsProblem problem = problem_of(backward_args);
  if (form_.passes == PassForm::whole) {
    backward_args.workspace =
        workspace(backward_block_, backward_workspace_bytes(problem, context));
    return experts_backward(backward_args, context);
  }
  ExpertsBackwardArgs data = backward_args;
  const bool in_place = form_.config.kept_h == KeptH::overwritten && backward_args.h.present();
  data.delayed = {in_place ? backward_args.h : dh_.view(), a_scaled_.view()};
  data.weight_grads = {};
  data.workspace = workspace(data_block_, backward_data_workspace_bytes(problem, context));
  experts_backward_data(data, context);
  ExpertsBackwardArgs weights = backward_args;
  weights.delayed = data.delayed;
  weights.dx = weights.dscores = weights.h = TensorView{};
  weights.workspace = workspace(weights_block_, backward_weights_workspace_bytes(problem, context));
  experts_backward_weights(weights, context);
}

}  // namespace penstock::test
