// SPDX-License-Identifier: Apache-2.0
//
// Every way in which a call can be wrong is refused before anything is written, with an error that
// names the argument, what it was, and what it should have been.
#include <gtest/gtest.h>

#include "support/compare.h"
#include "support/layer_call.h"

namespace penstock::test {
namespace {

using Words = std::initializer_list<const char*>;

LayerForm float_form() {
  LayerForm form;
  form.dtype = form.grad_dtype = DType::float32;
  return form;
}

template <typename Bend>
void refuse_forward(Bend bend, Words words, const LayerForm& form = float_form()) {
  LayerCall call(form);
  const auto before = call.result_bytes();
  const int64_t bytes = forward_workspace_bytes(problem_of(call.forward_args), {});
  Block workspace(bytes);
  call.forward_args.workspace = {workspace.data(), bytes};
  ExpertsForwardArgs bent = call.forward_args;
  bend(bent);
  expect_invalid([&] { experts_forward(bent, {}); }, words);
  EXPECT_EQ(call.result_bytes(), before);
  EXPECT_EQ(workspace.contents(), Block(bytes).contents());
}

using Pass = void (*)(const ExpertsBackwardArgs&, const Context&);

template <typename Bend>
void refuse_backward(Bend bend, Words words, const LayerForm& form = float_form(),
                     Pass pass = experts_backward) {
  LayerCall call(form);
  call.forward();
  const auto before = call.result_bytes();
  const int64_t bytes = backward_workspace_bytes(problem_of(call.backward_args), {});
  Block workspace(bytes);
  call.backward_args.workspace = {workspace.data(), bytes};
  ExpertsBackwardArgs bent = call.backward_args;
  bend(bent);
  expect_invalid([&] { pass(bent, {}); }, words);
  EXPECT_EQ(call.result_bytes(), before);
  EXPECT_EQ(workspace.contents(), Block(bytes).contents());
}

using Forward = ExpertsForwardArgs;
using Backward = ExpertsBackwardArgs;

TEST(ForwardValidation, MissingTensors) {
  refuse_forward([](Forward& a) { a.x = {}; }, {"x: got an absent tensor"});
  refuse_forward([](Forward& a) { a.weights.w1 = {}; }, {"weights.w1", "absent"});
  refuse_forward([](Forward& a) { a.weights.w2 = {}; }, {"weights.w2", "absent"});
  refuse_forward([](Forward& a) { a.scores = {}; }, {"scores", "absent"});
  refuse_forward([](Forward& a) { a.output = {}; }, {"output", "absent"});
  refuse_forward([](Forward& a) { a.plan.expert_counts = {}; }, {"plan.expert_counts", "absent"});
  refuse_forward([](Forward& a) { a.plan.row_to_slot = {}; }, {"plan.row_to_slot", "absent"});
  refuse_forward([](Forward& a) { a.plan.slot_to_row = {}; }, {"plan.slot_to_row", "absent"});
}

TEST(ForwardValidation, Shapes) {
  refuse_forward([](Forward& a) { a.x.rank = 1; }, {"x", "2 axes (T, d)"});
  refuse_forward([](Forward& a) { a.weights.w1.shape[1] = 13; },
                 {"weights.w1", "(5, 13, 13)", "(5, 14, 13) = (E, 2n, d)"});
  refuse_forward([](Forward& a) { a.weights.w2.shape[1] = 12; }, {"weights.w2", "(E, d, n)"});
  refuse_forward([](Forward& a) { a.weights.w1.shape[0] = 4; }, {"weights.w1", "(4, 14, 13)"});
  refuse_forward([](Forward& a) { a.weights.b1.shape[1] = 7; }, {"weights.b1", "(5, 14)"});
  refuse_forward([](Forward& a) { a.weights.b2.shape[1] = 7; }, {"weights.b2", "(5, 13)"});
  refuse_forward([](Forward& a) { a.scores.shape[0] = 32; }, {"scores", "(32,)", "(33,)"});
  refuse_forward([](Forward& a) { a.output.shape[0] = 10; }, {"output", "(10, 13)", "(11, 13)"});
  refuse_forward([](Forward& a) { a.plan.expert_offsets.shape[0] = 5; },
                 {"plan.expert_offsets", "(E+1)"});
  refuse_forward([](Forward& a) { a.plan.row_to_slot.shape[0] = 5; }, {"plan.row_to_slot"});
  refuse_forward([](Forward& a) { a.plan.top_k = 2; }, {"plan.top_k", "2 for 11 tokens", "33"});
  LayerForm ungated = float_form();
  ungated.config.activation = Activation::gelu;
  refuse_forward([](Forward& a) { a.weights.w1_up = a.weights.w1; }, {"weights.w1_up", "no gate"},
                 ungated);
}

TEST(ForwardValidation, DTypes) {
  refuse_forward([](Forward& a) { a.weights.w1.dtype = DType::bfloat16; },
                 {"weights.w1: got bfloat16, expected float32 (from x)", "Convert"});
  refuse_forward([](Forward& a) { a.weights.b2.dtype = DType::float64; },
                 {"weights.b2", "float64"});
  refuse_forward([](Forward& a) { a.scores.dtype = DType::bfloat16; },
                 {"scores", "bfloat16", "float32 (from the accumulator of x)"});
  refuse_forward([](Forward& a) { a.output.dtype = DType::float16; }, {"output", "float16"});
  refuse_forward([](Forward& a) { a.plan.slot_to_row.dtype = DType::int64; },
                 {"plan.slot_to_row", "int64", "int32"});
  refuse_forward([](Forward& a) { a.x.dtype = DType::int32; }, {"dtype", "int32", "from x"});
}

TEST(ForwardValidation, Devices) {
  const Device gpu{DeviceType::cuda, 1};
  refuse_forward([&](Forward& a) { a.weights.w2.device = gpu; },
                 {"weights.w2", "cuda:1", "cpu (the device of x)"});
  refuse_forward([&](Forward& a) { a.plan.expert_counts.device = gpu; }, {"cuda:1", "cpu"});
  refuse_forward([&](Forward& a) { a.x.device = gpu; }, {"cpu", "cuda:1 (the device of x)"});
}

TEST(ForwardValidation, StridesAndPointers) {
  refuse_forward([](Forward& a) { a.x.strides = {26, 2}; }, {"x", "strides (26, 2)"});
  refuse_forward(
      [](Forward& a) {
        a.weights.w1.strides = {364, 26, 2};
      },
      {"weights.w1", "strides (364, 26, 2)", "last axis or the one before"});
  refuse_forward([](Forward& a) { a.weights.w1.strides[0] = 181; },
                 {"weights.w1", "expert stride"});
  refuse_forward([](Forward& a) { a.weights.w2.strides[0] = 0; }, {"weights.w2", "expert stride"});
  refuse_forward([](Forward& a) { a.output.strides[0] = 0; }, {"output", "contiguous"});
  refuse_forward([](Forward& a) { a.output.strides[0] = 14; }, {"output", "contiguous"});
  refuse_forward([](Forward& a) { a.scores.strides[0] = 0; }, {"scores", "contiguous"});
  refuse_forward([](Forward& a) { a.x.data = nullptr; }, {"x", "null"});
  refuse_forward([](Forward& a) { a.x.data = a.x.as<char>() + 2; }, {"x", "2 bytes past"});
  refuse_forward([](Forward& a) { a.output.data = a.x.data; }, {"output", "overlaps x"});
  refuse_forward([](Forward& a) { a.output.data = a.weights.w1.as<float>() + 5; },
                 {"output", "overlaps weights.w1"});
}

TEST(ForwardValidation, PreactivationsExactlyWhereTheyAreKept) {
  refuse_forward([](Forward& a) { a.h = {}; }, {"h", "absent"});
  refuse_forward([](Forward& a) { a.h.shape[1] = 7; }, {"h", "(33, 14) = (R_cap, h)"});
  for (SavePolicy save : {SavePolicy::input, SavePolicy::nothing}) {
    LayerForm form = float_form();
    form.config.save = save;
    refuse_forward([](Forward& a) { a.h = a.output; }, {"h", "save is", name_of(save).data()},
                   form);
  }
}

TEST(ForwardValidation, SeparateGateAndUp) {
  LayerForm form = float_form();
  form.up = UpForm::separate;
  refuse_forward([](Forward& a) { a.weights.b1_up = {}; }, {"weights.b1_up", "absent"}, form);
  refuse_forward([](Forward& a) { a.weights.b1 = {}; }, {"weights.b1_up", "weights.b1 is absent"},
                 form);
  refuse_forward([](Forward& a) { a.weights.w1_up = {}; },
                 {"weights.b1_up", "weights.w1_up is absent"}, form);
  refuse_forward([](Forward& a) { a.weights.w1_up.shape[1] = 14; },
                 {"weights.w1_up", "(5, 7, 13) = (E, n, d)"}, form);
}

TEST(ForwardValidation, DispatchedRows) {
  LayerForm form = float_form();
  form.rows = RowSource::dispatched;
  refuse_forward([](Forward& a) { a.plan.row_to_slot = a.plan.expert_counts; },
                 {"plan.row_to_slot", "dispatched"}, form);
  refuse_forward([](Forward& a) { a.plan.token_offsets = a.plan.expert_counts; },
                 {"plan.token_offsets", "dispatched"}, form);
  const auto bend_offset = [&](size_t expert, int32_t value) {
    refuse_forward([&](Forward& a) { a.plan.expert_offsets.as<int32_t>()[expert] = value; },
                   {"plan.expert_offsets", "for expert", "rows of x"}, form);
  };
  bend_offset(0, -1);
  bend_offset(2, 0);
  bend_offset(4, 1000);
  refuse_forward([](Forward& a) { a.plan.expert_counts.as<int32_t>()[1] = -3; },
                 {"plan.expert_offsets", "expert 1"}, form);
}

TEST(ForwardValidation, DifferingNumbersOfExperts) {
  LayerForm form = float_form();
  form.slots = SlotForm::variable;
  refuse_forward([](Forward& a) { a.plan.top_k = 3; }, {"plan.top_k", "token_offsets"}, form);
  refuse_forward([](Forward& a) { a.plan.token_offsets.shape[0] = 4; }, {"(T+1)"}, form);
}

TEST(BackwardValidation, Tensors) {
  refuse_backward([](Backward& a) { a.d_output = {}; }, {"d_output", "absent"});
  refuse_backward([](Backward& a) { a.d_output.shape[0] = 3; }, {"d_output", "(3, 13)"});
  refuse_backward([](Backward& a) { a.d_output.dtype = DType::float16; }, {"d_output", "float16"});
  refuse_backward([](Backward& a) { a.h = {}; }, {"h", "absent"});
  refuse_backward([](Backward& a) { a.dx.strides[0] = 0; }, {"dx", "contiguous"});
  refuse_backward([](Backward& a) { a.dx.data = a.x.data; }, {"dx", "overlaps x"});
  refuse_backward([](Backward& a) { a.dscores.data = a.scores.data; },
                  {"dscores", "overlaps scores"});
  refuse_backward([](Backward& a) { a.dscores.dtype = DType::float64; }, {"dscores", "float64"});
  refuse_backward([](Backward& a) { a.delayed.dh = a.h; }, {"delayed.dh", "experts_backward"});
  LayerForm overwritten = float_form();
  overwritten.config.kept_h = KeptH::overwritten;
  refuse_backward([](Backward& a) { a.dx.data = a.h.data; }, {"dx", "overlaps h"}, overwritten);
  refuse_backward([](Backward& a) { a.config.save = SavePolicy::nothing; }, {"save", "nothing"});
}

TEST(BackwardValidation, WeightGradients) {
  refuse_backward([](Backward& a) { a.weight_grads.into.w1.dtype = DType::bfloat16; },
                  {"weight_grads.into.w1", "bfloat16", "float32 (from x)"});
  refuse_backward([](Backward& a) { a.weight_grads.into.w2.shape[2] = 6; },
                  {"weight_grads.into.w2", "(E, d, n)"});
  refuse_backward([](Backward& a) { a.weight_grads.into.w1.strides[0] = 0; },
                  {"weight_grads.into.w1", "no two elements"});
  refuse_backward([](Backward& a) { a.weight_grads.into.b1.strides[0] = 0; },
                  {"weight_grads.into.b1", "no two elements"});
  refuse_backward([](Backward& a) { a.weight_grads.into.w2.data = a.weights.w2.data; },
                  {"weight_grads.into.w2", "overlaps weights.w2"});
  refuse_backward([](Backward& a) { a.weight_grads.trainable = a.plan.expert_counts; },
                  {"weight_grads.trainable", "int32", "uint8"});
  LayerForm unbiased = float_form();
  unbiased.bias = Bias::none;
  refuse_backward([](Backward& a) { a.weight_grads.into.b2 = a.weights.w2; },
                  {"weight_grads.into.b2", "weights.b2 is absent"}, unbiased);
  LayerForm separate = float_form();
  separate.up = UpForm::separate;
  refuse_backward([](Backward& a) { a.weight_grads.into.w1_up = {}; },
                  {"weight_grads.into.w1_up", "both or neither"}, separate);
  LayerForm wide = float_form();
  wide.dtype = wide.grad_dtype = DType::float64;
  refuse_backward([](Backward& a) { a.weight_grads.into.w1.dtype = DType::float32; },
                  {"weight_grads.into.w1", "float32", "float64"}, wide);
}

TEST(BackwardValidation, HalvesOfThePass) {
  refuse_backward([](Backward& a) { a.weight_grads.into = {}; }, {"delayed.dh", "absent"},
                  float_form(), experts_backward_data);
  LayerForm delayed = float_form();
  Tensor dh(DType::float32, {33, 14});
  Tensor a_scaled(DType::float32, {33, 7});
  const auto give = [&](Backward& a) { a.delayed = {dh.view(), a_scaled.view()}; };
  refuse_backward([&](Backward& a) { give(a); }, {"weight_grads.into.w1", "backward_weights"},
                  delayed, experts_backward_data);
  refuse_backward(
      [&](Backward& a) {
        give(a);
        a.weight_grads.into = {};
        a.delayed.dh = a.h;
      },
      {"delayed.dh", "overlaps h"}, delayed, experts_backward_data);
  refuse_backward([&](Backward& a) { give(a); }, {"dx", "experts_backward_data"}, delayed,
                  experts_backward_weights);
  refuse_backward(
      [&](Backward& a) {
        give(a);
        a.dx = a.dscores = {};
        a.delayed.a_scaled.shape[1] = 6;
      },
      {"delayed.a_scaled", "(33, 7)"}, delayed, experts_backward_weights);
}

}  // namespace
}  // namespace penstock::test
