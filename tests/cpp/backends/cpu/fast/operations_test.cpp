// SPDX-License-Identifier: Apache-2.0
//
// Every operation of the fast backend, on every instruction set that this processor has, against
// the reference backend in float64 fed the same stored inputs: activations, layouts, orders,
// biases, uneven loads.
#include <gtest/gtest.h>

#include "layer.h"
#include "variants.h"

namespace penstock::cpu::fast_test {
namespace {

constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16};

LayerSpec spec_of(int64_t tokens, int64_t hidden, int64_t intermediate, int64_t experts,
                  int64_t top_k) {
  LayerSpec spec;
  spec.tokens = tokens;
  spec.hidden = hidden;
  spec.intermediate = intermediate;
  spec.experts = experts;
  spec.top_k = top_k;
  return spec;
}

class FastOperations : public ::testing::TestWithParam<Variant> {
 protected:
  void check(const LayerSpec& spec) {
    SCOPED_TRACE(spec.name());
    const Backend backend = GetParam().backend;
    Layer layer(spec);
    for (const Operation& operation : operations())
      EXPECT_EQ(check_operation(layer, operation, {&backend, 2}), "");
  }
};

TEST_P(FastOperations, AgreeForEveryActivation) {
  for (DType dtype : kDTypes) {
    for (int kind = 0; kind <= static_cast<int>(Activation::relu_squared); ++kind) {
      LayerSpec spec = spec_of(70, 40, 72, 5, 2);
      spec.dtype = dtype;
      spec.activation = static_cast<Activation>(kind);
      spec.biases = kind % 2 == 0 ? Biases::present : Biases::absent;
      check(spec);
    }
  }
}

TEST_P(FastOperations, AgreeForEveryLayoutAndOrder) {
  for (DType dtype : kDTypes) {
    for (GateLayout layout : {GateLayout::concatenated, GateLayout::interleaved}) {
      for (WeightOrder order : {WeightOrder::output_major, WeightOrder::input_major}) {
        for (GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
          LayerSpec spec = spec_of(65, 72, 130, 3, 2);
          spec.dtype = dtype;
          spec.gate_layout = layout;
          spec.weight_order = order;
          spec.grad_mode = mode;
          spec.biases = Biases::present;
          spec.activation = Activation::swiglu_clamped;
          check(spec);
        }
      }
    }
  }
}

TEST_P(FastOperations, AgreeForUnevenLoads) {
  for (Load load : {Load::skewed, Load::one_expert}) {
    for (int64_t tokens : {1, 2, 5, 97, 300}) {
      LayerSpec spec = spec_of(tokens, 64, 48, 8, load == Load::one_expert ? 1 : 3);
      spec.load = load;
      check(spec);
    }
  }
}

TEST_P(FastOperations, AgreeOverManyBlocksOfK) {
  for (DType dtype : kDTypes) {
    LayerSpec spec = spec_of(8, 1030, 530, 2, 1);
    spec.dtype = dtype;
    check(spec);
    spec = spec_of(1100, 24, 17, 3, 1);  // k of the weights' gradients is the rows
    spec.dtype = dtype;
    spec.load = Load::one_expert;
    check(spec);
  }
}

// Sums are built in the outputs, past the caches where they are gradients; experts with few rows
// and with many take different sides of a product.
TEST_P(FastOperations, AgreeWhereOutputsAreWholePanels) {
  for (DType dtype : kDTypes) {
    LayerSpec spec = spec_of(40, 128, 64, 3, 2);
    spec.dtype = dtype;
    spec.load = Load::skewed;
    check(spec);
    spec.tokens = 300;
    check(spec);
    spec.grad_mode = GradMode::accumulate;
    check(spec);
  }
  // More than one block of k in a weight's gradient.
  LayerSpec spec = spec_of(600, 64, 64, 1, 1);
  check(spec);
}

TEST_P(FastOperations, AgreeWithNoTokens) { check(spec_of(0, 24, 16, 3, 2)); }

INSTANTIATE_TEST_SUITE_P(Variants, FastOperations, ::testing::ValuesIn(variants()),
                         [](const auto& variant) { return variant.param.name; });

}  // namespace
}  // namespace penstock::cpu::fast_test
