// SPDX-License-Identifier: Apache-2.0
//
// What must not change a result's bits (save policy, two halves, threads, repetition, strides,
// alignment, absent outputs), what must be exact, and the corner cases of sizes.
#include <gtest/gtest.h>

#include "support/backends.h"
#include "support/compare.h"
#include "support/layer_call.h"

namespace penstock::test {
namespace {

class PassesTest : public testing::TestWithParam<Run> {
 protected:
  Context context(int32_t threads = 2) const { return context_of(GetParam().backend, threads); }

  LayerForm form() const {
    LayerForm form;
    form.dtype = form.grad_dtype = GetParam().dtype;
    form.num_tokens = 40;
    form.hidden_size = 33;
    form.intermediate_size = 20;
    return form;
  }

  ResultBytes run(const LayerForm& form, int32_t threads = 2) const {
    LayerCall call(form, context(threads));
    call.forward();
    call.backward();
    return call.result_bytes();
  }
};

TEST_P(PassesTest, SavePoliciesGiveTheSameBits) {
  for (Activation activation : {Activation::swiglu, Activation::gelu}) {
    LayerForm kept = form();
    kept.config.activation = activation;
    LayerForm recomputed = kept;
    recomputed.config.save = SavePolicy::input;
    EXPECT_EQ(run(kept), run(recomputed));
  }
}

TEST_P(PassesTest, TwoHalvesGiveTheBitsOfTheWhole) {
  for (SavePolicy save : {SavePolicy::preactivation, SavePolicy::input}) {
    LayerForm whole = form();
    whole.config.save = save;
    LayerForm delayed = whole;
    delayed.passes = PassForm::delayed;
    EXPECT_EQ(run(whole), run(delayed));
  }
}

TEST_P(PassesTest, TheLowMemoryOrderGivesTheSameBits) {
  LayerForm fast = form();
  fast.hidden_size = 600;  // blocks of 256, 256 and 88 columns
  fast.intermediate_size = 8;
  std::vector<LayerForm> forms(7, fast);
  forms[1].config.weight_order = WeightOrder::input_major;
  forms[2].config.gate_layout = GateLayout::interleaved;
  forms[3].up = UpForm::separate;
  forms[4].slots = SlotForm::variable;
  forms[5].passes = PassForm::delayed;
  forms[6].rows = RowSource::dispatched;
  for (LayerForm& one : forms) {
    const ResultBytes bytes = run(one);
    one.config.order = LaunchOrder::low_memory;
    EXPECT_EQ(run(one), bytes) << text_of(one);
  }
}

TEST_P(PassesTest, OverwritingHGivesTheSameBits) {
  for (PassForm passes : {PassForm::whole, PassForm::delayed}) {
    LayerForm preserved = form();
    preserved.passes = passes;
    LayerForm overwritten = preserved;
    overwritten.config.kept_h = KeptH::overwritten;
    EXPECT_EQ(run(overwritten), run(preserved));
    // Where H is not kept there is none to overwrite.
    overwritten.config.save = SavePolicy::input;
    EXPECT_EQ(run(overwritten), run(preserved));
  }
}

TEST_P(PassesTest, NumberOfThreadsDoesNotChangeBits) {
  const ResultBytes one = run(form(), 1);
  for (int32_t threads : {2, 3, 5}) EXPECT_EQ(run(form(), threads), one) << threads;
}

TEST_P(PassesTest, BackwardTwiceGivesTheSameBits) {
  LayerCall call(form(), context());
  call.forward();
  call.backward();
  const ResultBytes once = call.result_bytes();
  call.backward();
  EXPECT_EQ(call.result_bytes(), once);
}

TEST_P(PassesTest, StridesAndAlignmentDoNotChangeBits) {
  for (WeightOrder order : {WeightOrder::output_major, WeightOrder::input_major}) {
    LayerForm spread_form = form();
    spread_form.config.weight_order = order;
    const ResultBytes packed = run(spread_form);
    const int64_t size = size_of(GetParam().dtype);
    for (int64_t offset : {int64_t{0}, size, 3 * size}) {
      LayerCall call(spread_form, context());
      call.spread(/*pad=*/7, offset);
      call.forward();
      call.backward();
      EXPECT_EQ(call.result_bytes(), packed) << offset;
    }
  }
}

TEST_P(PassesTest, RowsOfXMayRepeatOneAnother) {
  LayerCall repeated(form(), context());
  LayerCall expanded(form(), context());
  TensorView& rows = repeated.forward_args.x;
  for (int64_t token = 1; token < rows.size(0); ++token)
    for (int64_t c = 0; c < rows.size(1); ++c) set(rows, {token, c}, get(rows, {0, c}));
  expanded.forward_args.x.strides[0] = 0;
  expanded.backward_args.x.strides[0] = 0;
  for (LayerCall* call : {&repeated, &expanded}) {
    call->forward();
    call->backward();
  }
  EXPECT_EQ(repeated.result_bytes(), expanded.result_bytes());
}

TEST_P(PassesTest, AbsentResultsChangeNoOther) {
  const ResultBytes all = run(form());
  const LayerCall untouched(form(), context());
  const ResultBytes before = untouched.result_bytes();
  const auto leave_out = [&](size_t index, auto absent) {
    LayerCall call(form(), context());
    const ExpertsBackwardArgs full = call.backward_args;
    absent(call.backward_args);
    call.forward();
    call.backward();
    call.backward_args = full;
    ResultBytes expected = all;
    expected.arrays[index] = before.arrays[index];
    EXPECT_EQ(call.result_bytes(), expected) << index;
  };
  leave_out(1, [](ExpertsBackwardArgs& a) { a.dx = {}; });
  leave_out(2, [](ExpertsBackwardArgs& a) { a.dscores = {}; });
  leave_out(3, [](ExpertsBackwardArgs& a) { a.weight_grads.into.w1 = {}; });
  leave_out(5, [](ExpertsBackwardArgs& a) { a.weight_grads.into.w2 = {}; });
  leave_out(6, [](ExpertsBackwardArgs& a) { a.weight_grads.into.b1 = {}; });
  leave_out(8, [](ExpertsBackwardArgs& a) { a.weight_grads.into.b2 = {}; });

  LayerCall only_b2(form(), context());
  const ExpertsBackwardArgs full = only_b2.backward_args;
  only_b2.backward_args.dx = only_b2.backward_args.dscores = {};
  only_b2.backward_args.weight_grads.into = {};
  only_b2.backward_args.weight_grads.into.b2 = full.weight_grads.into.b2;
  only_b2.forward();
  only_b2.backward();
  only_b2.backward_args = full;
  EXPECT_EQ(only_b2.result_bytes().arrays[8], all.arrays[8]);
  EXPECT_EQ(only_b2.result_bytes().arrays[3], before.arrays[3]);
}

TEST_P(PassesTest, DispatchedRowsWithoutScoresAreScaledByOne) {
  LayerForm dispatched = form();
  dispatched.rows = RowSource::dispatched;
  LayerCall ones(dispatched, context());
  LayerCall absent(dispatched, context());
  const TensorView& scores = ones.forward_args.scores;
  for (int64_t row = 0; row < scores.numel(); ++row) set(scores, {row}, 1.0);
  absent.forward_args.scores = absent.backward_args.scores = {};
  for (LayerCall* call : {&ones, &absent}) {
    call->forward();
    call->backward();
  }
  EXPECT_EQ(ones.result_bytes(), absent.result_bytes());
}

TEST_P(PassesTest, SmallIntegersAreExact) {
  LayerForm small = form();
  small.config.activation = Activation::relu;
  small.values = Values::small_integers;
  small.num_tokens = 11;
  small.hidden_size = 4;
  small.intermediate_size = 3;
  for (RowSource rows : {RowSource::routed, RowSource::dispatched}) {
    for (SlotForm slots : {SlotForm::top_k, SlotForm::variable}) {
      small.rows = rows;
      small.slots = slots;
      LayerCall call(small, context());
      call.forward();
      call.backward();
      call.check_exact();
    }
  }
}

// Against float64 throughout, as a user would compare.
TEST_P(PassesTest, EndToEndWithinTheContract) {
  for (Activation activation : {Activation::swiglu, Activation::geglu, Activation::gelu_tanh}) {
    LayerForm large = form();
    large.config.activation = activation;
    large.oracle = Oracle::exact;
    large.num_tokens = 150;
    large.hidden_size = 72;
    large.intermediate_size = 56;
    LayerCall call(large, context());
    call.forward();
    call.backward();
    call.check_forward();
    call.check_backward();
  }
}

TEST_P(PassesTest, NoTokensAtAll) {
  for (GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
    for (RowSource rows : {RowSource::routed, RowSource::dispatched}) {
      LayerForm empty = form();
      empty.num_tokens = 0;
      empty.mode = mode;
      empty.rows = rows;
      LayerCall call(empty, context());
      call.forward();
      call.backward();
      call.check_exact();  // gradients exactly zero, or as they were
    }
  }
}

TEST_P(PassesTest, OneOfEverything) {
  LayerForm one = form();
  one.num_tokens = one.hidden_size = one.intermediate_size = one.num_experts = one.top_k = 1;
  one.values = Values::small_integers;
  one.config.activation = Activation::relu;
  LayerCall call(one, context());
  call.forward();
  call.backward();
  call.check_exact();
}

TEST_P(PassesTest, InferenceKeepsNothing) {
  LayerForm inference = form();
  inference.config.save = SavePolicy::nothing;
  LayerCall call(inference, context());
  call.forward();
  call.check_forward();
  expect_invalid([&] { experts_backward(call.backward_args, context()); },
                 {"save", "nothing", "preactivation or input"});
}

INSTANTIATE_TEST_SUITE_P(Cpu, PassesTest, testing::ValuesIn(cpu_runs()),
                         [](const auto& test) { return text_of(test.param); });

}  // namespace
}  // namespace penstock::test
