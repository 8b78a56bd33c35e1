// SPDX-License-Identifier: Apache-2.0
//
// Every form in which a layer can be called, end to end against the float64 oracle, on every CPU
// backend: activation x layout x order x bias x save x separate up x dispatched x delayed x
// accumulate x frozen experts x differing numbers of experts.
#include <gtest/gtest.h>

#include <tuple>

#include "support/backends.h"
#include "support/compare.h"
#include "support/layer_call.h"

namespace penstock::test {
namespace {

constexpr Activation kActivations[] = {
    Activation::swiglu,         Activation::geglu, Activation::reglu,
    Activation::swiglu_clamped, Activation::silu,  Activation::gelu,
    Activation::gelu_tanh,      Activation::relu,  Activation::relu_squared};
constexpr DType kDTypes[] = {DType::float64, DType::float32, DType::float16, DType::bfloat16};
constexpr int kBinaryAxes = 10;

// One bit for each axis with two values.
LayerForm form_of(Activation activation, DType dtype, unsigned bits) {
  LayerForm form;
  const auto take = [&bits] {
    const unsigned bit = bits & 1u;
    bits >>= 1;
    return bit == 1;
  };
  form.config.activation = activation;
  form.config.clamp_limit = 1.0f;  // so that both clamps act on inputs of size 1
  form.dtype = dtype;
  form.config.gate_layout = take() ? GateLayout::interleaved : GateLayout::concatenated;
  form.config.weight_order = take() ? WeightOrder::input_major : WeightOrder::output_major;
  form.config.save = take() ? SavePolicy::input : SavePolicy::preactivation;
  form.bias = take() ? Bias::none : Bias::both;
  form.rows = take() ? RowSource::dispatched : RowSource::routed;
  form.passes = take() ? PassForm::delayed : PassForm::whole;
  form.mode = take() ? GradMode::accumulate : GradMode::overwrite;
  form.training = take() ? Training::some_frozen : Training::all;
  form.slots = take() ? SlotForm::variable : SlotForm::top_k;
  form.up = take() ? UpForm::separate : UpForm::joined;
  // main_grad: fp32 gradients of narrower weights, wherever gradients accumulate.
  form.grad_dtype =
      dtype != DType::float64 && form.mode == GradMode::accumulate ? DType::float32 : dtype;
  if (size_of(dtype) == 2) {  // enough elements that the norm of rounding errors is steady
    form.num_tokens = 29;
    form.hidden_size = 21;
    form.intermediate_size = 17;
  }
  return form;
}

// Whether another form is the same call.
bool repeats(const LayerForm& form) {
  const bool interleaved = form.config.gate_layout == GateLayout::interleaved;
  const bool separate = form.up == UpForm::separate;
  return (!is_gated(form.config.activation) && (interleaved || separate)) ||
         (separate && interleaved);
}

using Parameters = std::tuple<std::string, DType, Activation>;

class Forms : public testing::TestWithParam<Parameters> {};

TEST_P(Forms, MatchTheOracle) {
  const auto& [backend, dtype, activation] = GetParam();
  if (!runs(backend, dtype)) GTEST_SKIP() << backend << " does not run " << name_of(dtype);
  for (unsigned bits = 0; bits < (1u << kBinaryAxes); ++bits) {
    const LayerForm form = form_of(activation, dtype, bits);
    if (repeats(form)) continue;
    LayerCall call(form, context_of(backend), bits + 1);
    call.forward();
    call.backward();
    call.check_forward();
    call.check_backward();
    if (HasFailure()) FAIL() << "form " << bits << ": " << text_of(form);
  }
}

std::string test_name(const testing::TestParamInfo<Parameters>& info) {
  const auto& [backend, dtype, activation] = info.param;
  return backend + "_" + std::string(name_of(dtype)) + "_" + std::string(name_of(activation));
}

INSTANTIATE_TEST_SUITE_P(Cpu, Forms,
                         testing::Combine(testing::ValuesIn(cpu_backends()),
                                          testing::ValuesIn(kDTypes),
                                          testing::ValuesIn(kActivations)),
                         test_name);

}  // namespace
}  // namespace penstock::test
