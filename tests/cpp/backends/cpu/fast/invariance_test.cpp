// SPDX-License-Identifier: Apache-2.0
//
// What must not change a bit: the number of threads, a second run, and for a token's own results
// the other tokens of the batch. Small-integer inputs must come out exact.
#include <gtest/gtest.h>

#include "backends/cpu/fast/fast_backend.h"
#include "backends/cpu/reference/reference_backend.h"
#include "layer.h"

namespace penstock::cpu::fast_test {
namespace {

constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16};

LayerSpec layer_spec(DType dtype) {
  LayerSpec spec;
  spec.tokens = 211;
  spec.hidden = 300;
  spec.intermediate = 136;
  spec.experts = 5;
  spec.top_k = 2;
  spec.dtype = dtype;
  spec.biases = Biases::present;
  spec.load = Load::skewed;
  return spec;
}

std::vector<Tensor Layer::*> all_outputs() {
  std::vector<Tensor Layer::*> outputs;
  for (const Operation& operation : operations())
    outputs.insert(outputs.end(), operation.outputs.begin(), operation.outputs.end());
  return outputs;
}

void expect_exact(const LayerSpec& spec, const Backend& backend) {
  SCOPED_TRACE(spec.name());
  Layer layer(spec);
  Layer exact(spec);
  run_all(layer, {&backend, 2});
  run_all(exact, {&reference_backend(), 1});
  for (Tensor Layer::* output :
       {&Layer::logits, &Layer::h, &Layer::a, &Layer::y, &Layer::output, &Layer::dh,
        &Layer::a_scaled, &Layer::dscores, &Layer::dx_rows, &Layer::dx, &Layer::dw1, &Layer::dw2,
        &Layer::db1, &Layer::db2}) {
    for (int64_t i = 0; i < (layer.*output).numel(); ++i) {
      const double actual = (layer.*output).get(i), wanted = (exact.*output).get(i);
      if (wanted == wanted) {  // rows that no expert owns stay NaN
        ASSERT_EQ(actual, wanted) << i;
      }
    }
  }
}

class FastInvariance : public ::testing::TestWithParam<fast::Isa> {
 protected:
  const Backend backend = fast_backend_on(GetParam());
};

TEST_P(FastInvariance, ThreadsAndRepetitionDoNotChangeBits) {
  for (DType dtype : kDTypes) {
    Layer first(layer_spec(dtype));
    run_all(first, {&backend, 1});
    for (int32_t threads : {1, 2, 3, 7}) {
      Layer again(layer_spec(dtype));
      run_all(again, {&backend, threads});
      for (Tensor Layer::* output : all_outputs())
        EXPECT_TRUE((first.*output).same_bits(again.*output)) << threads << name_of(dtype);
    }
  }
}

// Copies token `token` and its slots out of `whole`, with the same weights.
Layer single_token(Layer& whole, int64_t token) {
  LayerSpec spec = whole.spec;
  spec.tokens = 1;
  Layer single(spec);
  single.w1 = whole.w1;
  single.w2 = whole.w2;
  single.b1 = whole.b1;
  single.b2 = whole.b2;
  single.router_weight = whole.router_weight;
  for (int64_t i = 0; i < spec.hidden; ++i) {
    single.x.set(i, whole.x.get(token * spec.hidden + i));
    single.d_output.set(i, whole.d_output.get(token * spec.hidden + i));
  }
  for (int64_t k = 0; k < spec.top_k; ++k) {
    single.scores.set(k, whole.scores.get(token * spec.top_k + k));
    single.ids.data<int32_t>()[k] = whole.ids.data<int32_t>()[token * spec.top_k + k];
  }
  return single;
}

TEST_P(FastInvariance, ATokensResultsDoNotDependOnTheBatch) {
  for (DType dtype : kDTypes) {
    Layer whole(layer_spec(dtype));
    run_all(whole, {&backend, 2});
    for (int64_t token : {0, 1, 6, 57, 58, 130, 210}) {
      Layer single = single_token(whole, token);
      run_all(single, {&backend, 2});
      for (Tensor Layer::* member :
           {&Layer::logits, &Layer::output, &Layer::dx, &Layer::router_dx, &Layer::dscores}) {
        const Tensor& alone = single.*member;
        const Tensor& batch = whole.*member;
        for (int64_t i = 0; i < alone.numel(); ++i)
          ASSERT_EQ(alone.get(i), batch.get(token * alone.numel() + i))
              << "token " << token << " " << name_of(dtype);
      }
    }
  }
}

// Every sum is exact in float, so every backend must store the same numbers.
TEST_P(FastInvariance, SmallIntegersAreExactForOddSizes) {
  for (DType dtype : kDTypes) {
    for (int64_t hidden : {1, 3, 8, 17, 64, 72, 130}) {
      for (int64_t intermediate : {1, 3, 8, 17, 64, 72, 130}) {
        LayerSpec spec = layer_spec(dtype);
        spec.tokens = 40 + hidden % 7;
        spec.hidden = hidden;
        spec.intermediate = intermediate;
        spec.activation = hidden % 2 == 0 ? Activation::relu : Activation::reglu;
        spec.gate_layout = hidden > 16 ? GateLayout::interleaved : GateLayout::concatenated;
        spec.weight_order =
            intermediate > 16 ? WeightOrder::input_major : WeightOrder::output_major;
        spec.values = Values::small_integers;
        expect_exact(spec, backend);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, FastInvariance, ::testing::ValuesIn(fast::supported_isas()),
                         [](const auto& isa) { return fast::name_of(isa.param); });

}  // namespace
}  // namespace penstock::cpu::fast_test
