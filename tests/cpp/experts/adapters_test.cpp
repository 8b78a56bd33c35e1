// SPDX-License-Identifier: Apache-2.0
//
// Experts with low-rank adapters against experts whose weights were merged: small integers, so that
// both are exact and every bit must agree. The adapters' gradients follow from those of the merged
// weights: dA = B^T dW, dB = dW A^T. Then what is refused, with nothing written.
#include "penstock/adapters.h"

#include <gtest/gtest.h>

#include <string>

#include "support/backends.h"
#include "support/compare.h"
#include "support/layer_call.h"

namespace penstock::test {
namespace {

constexpr int64_t kUpRank = 2;
constexpr int64_t kDownRank = 3;

// A factor and its gradient.
struct Factor {
  Tensor value;
  Tensor grad;

  Factor(DType dtype, Index shape, Random& random) : value(dtype, shape), grad(dtype, shape) {
    const TensorView& view = value.view();
    for (int64_t e = 0; e < view.size(0); ++e)
      for (int64_t i = 0; i < view.size(1); ++i)
        for (int64_t j = 0; j < view.size(2); ++j)
          set(view, {e, i, j}, static_cast<double>(random.below(3) - 1));
  }
};

struct Form {
  Run run;
  Activation activation;
  SavePolicy save;
  RowSource rows;
};

std::vector<Form> forms() {
  std::vector<Form> all;
  for (const Run& run : cpu_runs()) {
    if (size_of(run.dtype) < 4) continue;  // sums of the merged layer would not be exact
    for (Activation activation : {Activation::relu, Activation::reglu})
      for (SavePolicy save : {SavePolicy::preactivation, SavePolicy::input})
        for (RowSource rows : {RowSource::routed, RowSource::dispatched})
          all.push_back({run, activation, save, rows});
  }
  return all;
}

void PrintTo(const Form& form, std::ostream* out) {
  *out << text_of(form.run) << " " << name_of(form.activation) << " " << name_of(form.save)
       << (form.rows == RowSource::routed ? " routed" : " dispatched");
}

class AdaptedLayer {
 public:
  explicit AdaptedLayer(const Form& form) : AdaptedLayer(form, layer_form(form), Random(3)) {}

  void forward() {
    workspace_ = Block(adapted_forward_workspace_bytes(problem(), adapted.context));
    AdaptedForwardArgs args = forward_args();
    adapted_experts_forward(args, adapted.context);
  }
  void backward() {
    backward_workspace_ = Block(adapted_backward_workspace_bytes(problem(), adapted.context));
    AdaptedBackwardArgs args = backward_args();
    adapted_experts_backward(args, adapted.context);
  }

  AdaptedForwardArgs forward_args() {
    AdaptedForwardArgs args{adapted.forward_args, factors(), rows()};
    args.experts.workspace = {workspace_.data(), workspace_.bytes()};
    return args;
  }
  AdaptedBackwardArgs backward_args() {
    AdaptedBackwardArgs args{adapted.backward_args, factors(), rows(), grads()};
    args.experts.weight_grads = {};
    args.experts.workspace = {backward_workspace_.data(), backward_workspace_.bytes()};
    return args;
  }
  AdaptedProblem problem() const { return {problem_of(adapted.forward_args), kUpRank, kDownRank}; }
  ExpertAdapters factors() const {
    return {up_a.value.view(), up_b.value.view(), down_a.value.view(), down_b.value.view()};
  }
  AdapterRows rows() const { return {up_rows.view(), down_rows.view()}; }
  ExpertAdapters grads() const {
    return {up_a.grad.view(), up_b.grad.view(), down_a.grad.view(), down_b.grad.view()};
  }

  // W += B A in the other layer.
  void merge() {
    const ExpertWeights& weights = merged.forward_args.weights;
    add_product(weights.w1, up_b.value.view(), up_a.value.view());
    add_product(weights.w2, down_b.value.view(), down_a.value.view());
  }

  std::string backend;  // contexts refer to it
  LayerCall adapted;
  LayerCall merged;
  Factor up_a, up_b, down_a, down_b;
  Tensor up_rows, down_rows;

 private:
  AdaptedLayer(const Form& form, const LayerForm& sizes, Random random)
      : backend(form.run.backend),
        adapted(sizes, context_of(backend)),
        merged(sizes, context_of(backend)),
        up_a(sizes.dtype, {sizes.num_experts, kUpRank, sizes.hidden_size}, random),
        up_b(sizes.dtype,
             {sizes.num_experts, sizes.config.halves() * sizes.intermediate_size, kUpRank}, random),
        down_a(sizes.dtype, {sizes.num_experts, kDownRank, sizes.intermediate_size}, random),
        down_b(sizes.dtype, {sizes.num_experts, sizes.hidden_size, kDownRank}, random),
        up_rows(sizes.dtype, {problem_of(adapted.forward_args).row_capacity, kUpRank}),
        down_rows(sizes.dtype, {problem_of(adapted.forward_args).row_capacity, kDownRank}) {}

  static LayerForm layer_form(const Form& form) {
    LayerForm layer;
    layer.config.activation = form.activation;
    layer.config.save = form.save;
    layer.dtype = layer.grad_dtype = form.run.dtype;
    layer.rows = form.rows;
    layer.values = Values::small_integers;
    return layer;
  }

  static void add_product(const TensorView& w, const TensorView& b, const TensorView& a) {
    for (int64_t e = 0; e < w.size(0); ++e)
      for (int64_t i = 0; i < w.size(1); ++i)
        for (int64_t j = 0; j < w.size(2); ++j) {
          double sum = get(w, {e, i, j});
          for (int64_t r = 0; r < a.size(1); ++r) sum += get(b, {e, i, r}) * get(a, {e, r, j});
          set(w, {e, i, j}, sum);
        }
  }

  Block workspace_;
  Block backward_workspace_;
};

// dA = B^T dW and dB = dW A^T, exactly.
void expect_factor_grads(const Factor& a, const Factor& b, const TensorView& dw) {
  const int64_t rank = a.value.view().size(1);
  for (int64_t e = 0; e < dw.size(0); ++e)
    for (int64_t r = 0; r < rank; ++r) {
      for (int64_t j = 0; j < dw.size(2); ++j) {
        double expected = 0;
        for (int64_t i = 0; i < dw.size(1); ++i)
          expected += get(b.value.view(), {e, i, r}) * get(dw, {e, i, j});
        ASSERT_EQ(get(a.grad.view(), {e, r, j}), expected) << "expert " << e;
      }
      for (int64_t i = 0; i < dw.size(1); ++i) {
        double expected = 0;
        for (int64_t j = 0; j < dw.size(2); ++j)
          expected += get(dw, {e, i, j}) * get(a.value.view(), {e, r, j});
        ASSERT_EQ(get(b.grad.view(), {e, i, r}), expected) << "expert " << e;
      }
    }
}

class AdaptersTest : public testing::TestWithParam<Form> {};

TEST_P(AdaptersTest, EqualsMergedWeightsExactly) {
  AdaptedLayer layer(GetParam());
  layer.merge();
  layer.forward();
  layer.merged.forward();
  layer.backward();
  layer.merged.backward();
  const ResultBytes got = layer.adapted.result_bytes();
  const ResultBytes expected = layer.merged.result_bytes();
  for (size_t array : {0u, 1u, 2u})  // output, dx, dscores
    EXPECT_EQ(got.arrays[array], expected.arrays[array]) << "array " << array;
  const ExpertWeights& grads = layer.merged.backward_args.weight_grads.into;
  expect_factor_grads(layer.up_a, layer.up_b, grads.w1);
  expect_factor_grads(layer.down_a, layer.down_b, grads.w2);
  for (const Factor* factor : {&layer.up_a, &layer.up_b, &layer.down_a, &layer.down_b})
    EXPECT_TRUE(factor->grad.block().guards_intact());
  EXPECT_TRUE(layer.up_rows.block().guards_intact());
  EXPECT_TRUE(layer.down_rows.block().guards_intact());
}

INSTANTIATE_TEST_SUITE_P(All, AdaptersTest, testing::ValuesIn(forms()));

class AdaptersRefusal : public testing::Test {
 protected:
  AdaptersRefusal()
      : layer_({{"reference", DType::float32},
                Activation::relu,
                SavePolicy::preactivation,
                RowSource::routed}) {
    layer_.forward();
    layer_.backward();
  }
  const Context& context() const { return layer_.adapted.context; }

  AdaptedLayer layer_;
};

TEST_F(AdaptersRefusal, AWorkspaceOneByteShort) {
  AdaptedForwardArgs forward = layer_.forward_args();
  --forward.experts.workspace.bytes;
  expect_invalid([&] { adapted_experts_forward(forward, context()); },
                 {"workspace", "adapted_forward_workspace_bytes"});
  AdaptedBackwardArgs backward = layer_.backward_args();
  --backward.experts.workspace.bytes;
  expect_invalid([&] { adapted_experts_backward(backward, context()); },
                 {"workspace", "adapted_backward_workspace_bytes"});
}

TEST_F(AdaptersRefusal, AbsentOrUnequalFactors) {
  AdaptedForwardArgs args = layer_.forward_args();
  args.adapters = {};
  expect_invalid([&] { adapted_experts_forward(args, context()); }, {"adapters", "none"});
  args = layer_.forward_args();
  args.adapters.up_b = {};
  expect_invalid([&] { adapted_experts_forward(args, context()); }, {"adapters.up_b"});
  args = layer_.forward_args();
  args.adapters.down_b = args.adapters.up_b;
  expect_invalid([&] { adapted_experts_forward(args, context()); },
                 {"adapters.down_b", "(E, d, r2)"});
}

TEST_F(AdaptersRefusal, RowsAbsentOrTooMany) {
  AdaptedForwardArgs forward = layer_.forward_args();
  forward.rows.up = {};
  expect_invalid([&] { adapted_experts_forward(forward, context()); }, {"rows.up"});
  forward = layer_.forward_args();
  forward.experts.config.save = SavePolicy::nothing;
  forward.experts.h = {};
  expect_invalid([&] { adapted_experts_forward(forward, context()); },
                 {"rows.up", "save is nothing"});
  AdaptedBackwardArgs backward = layer_.backward_args();
  backward.rows.down = layer_.up_rows.view();
  expect_invalid([&] { adapted_experts_backward(backward, context()); },
                 {"rows.down", "(R_cap, r2)"});
  backward = layer_.backward_args();
  backward.adapters.down_a = backward.adapters.down_b = {};
  expect_invalid([&] { adapted_experts_backward(backward, context()); },
                 {"rows.down", "no adapter"});
}

TEST_F(AdaptersRefusal, GradientsOfFrozenWeightsAndSharedMemory) {
  AdaptedBackwardArgs args = layer_.backward_args();
  args.experts.weight_grads = layer_.adapted.backward_args.weight_grads;
  expect_invalid([&] { adapted_experts_backward(args, context()); }, {"weight_grads", "frozen"});
  args = layer_.backward_args();
  args.grads.up_a = args.adapters.up_a;
  expect_invalid([&] { adapted_experts_backward(args, context()); },
                 {"grads.up_a", "adapters.up_a"});
  AdaptedForwardArgs forward = layer_.forward_args();
  forward.rows.down.data = forward.experts.x.data;
  expect_invalid([&] { adapted_experts_forward(forward, context()); }, {"rows.down", "x"});
}

}  // namespace
}  // namespace penstock::test
