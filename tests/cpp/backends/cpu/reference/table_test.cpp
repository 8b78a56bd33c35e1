// SPDX-License-Identifier: Apache-2.0
//
// The backend's table: complete, honest about what it runs, and its operations put together give
// the gradients of the layer (central differences of the forward operations in float64).
#include <gtest/gtest.h>

#include "support.h"

namespace penstock::cpu::reference_test {
namespace {

TEST(Table, SaysWhatItIsAndRuns) {
  const Backend& reference = backend();
  EXPECT_STREQ(reference.name, "reference");
  EXPECT_EQ(reference.device, DeviceType::cpu);
  EXPECT_EQ(reference.description(), "plain loops");
  EXPECT_EQ(reference.why_unavailable(), "");
  ExpertsProblem problem;
  for (DType dtype : {DType::float64, DType::float32, DType::float16, DType::bfloat16}) {
    problem.dtype = dtype;
    EXPECT_EQ(reference.why_not(problem), "");
    EXPECT_EQ(reference.why_not_dtype(dtype), "");
  }
  problem.dtype = DType::int32;
  EXPECT_NE(reference.why_not(problem).find("int32"), std::string::npos);
  problem.dtype = DType::float32;
  problem.device = {DeviceType::cuda, 1};
  EXPECT_NE(reference.why_not(problem).find("cuda:1"), std::string::npos);
}

TEST(Table, NeedsNoScratch) {
  EXPECT_EQ(backend().scratch_bytes({}, kContext), 0);
  EXPECT_EQ(backend().router_scratch_bytes({}, kContext), 0);
  EXPECT_EQ(backend().plan_scratch_bytes(1000, 64, kContext), 0);
  EXPECT_EQ(backend().score_partials({}), 1);
  EXPECT_EQ(backend().tile_rows({}), 1);
}

TEST(Table, RefusesIntegerStorage) {
  Array<int32_t> x(2, 3), w(2, 3);
  Array<float> logits(2, 2);
  EXPECT_THROW(backend().router_logits({x.view(), w.view(), logits.view(), {}}, kContext), Error);
}

// One layer with everything on: gate, biases, skipped slots, an expert without rows.
struct Layer {
  static constexpr int64_t kTokens = 4, kHidden = 5, kInner = 3, kExperts = 4;

  explicit Layer(Activation activation)
      : kind(activation),
        halves(is_gated(activation) ? 2 : 1),
        rows(kTokens, 2, kExperts, 301),
        x(Array<double>::random(kTokens, kHidden, 1.0, 302)),
        scores(Array<double>::random(1, rows.num_slots(), 1.0, 303)),
        w1(kExperts, halves, kInner, kHidden, Layout::interleaved, Order::output_major),
        b1(kExperts, halves, kInner, 1, Layout::interleaved, Order::output_major),
        w2(kExperts, 1, kHidden, kInner, Layout::concatenated, Order::input_major),
        b2(kExperts, 1, kHidden, 1, Layout::concatenated, Order::output_major),
        direction(Array<double>::random(kTokens, kHidden, 1.0, 304)) {
    w1.randomize(1.0, 305);
    b1.randomize(1.0, 306);
    w2.randomize(1.0, 307);
    b2.randomize(1.0, 308);
  }

  UpWeights up() const { return {w1.matrix, b1.vectors(), static_cast<int32_t>(halves)}; }
  DownWeights down() const { return {w2.matrix[0], b2.vectors()[0]}; }

  // <direction, output>; leaves H in `h`.
  double value(Array<double>& h) {
    Array<double> a(rows.capacity(), kInner), y(rows.capacity(), kHidden), out(kTokens, kHidden);
    backend().up_projection({rows.groups(), {kind}, x.view(), up(), h.view(), a.view(), {}},
                            kContext);
    backend().down_projection({rows.groups(), a.view(), down(), y.view(), {}}, kContext);
    backend().combine({rows.plan(), y.view(), scores.view1(), out.view()}, kContext);
    double sum = 0.0;
    for (int64_t t = 0; t < kTokens; ++t)
      for (int64_t i = 0; i < kHidden; ++i) sum += direction(t, i) * out(t, i);
    return sum;
  }

  double value() {
    Array<double> h(rows.capacity(), halves * kInner);
    return value(h);
  }

  // Each element of `values` moved both ways; the last one is the guard past the end.
  void expect_gradient(std::vector<double>& values, const std::vector<double>& gradient) {
    constexpr double kStep = 1e-6;
    for (size_t i = 0; i + 1 < values.size(); ++i) {
      const double kept = values[i];
      values[i] = kept + kStep;
      const double above = value();
      values[i] = kept - kStep;
      const double below = value();
      values[i] = kept;
      EXPECT_NEAR(gradient[i], (above - below) / (2 * kStep), 2e-8) << "element " << i;
    }
  }

  Activation kind;
  int64_t halves;
  RoutedRows rows;
  Array<double> x, scores;
  Grouped<double> w1, b1, w2, b2;
  Array<double> direction;
};

// What a backward pass makes, each in the layout of what it belongs to.
struct Gradients {
  explicit Gradients(Layer& layer)
      : dx(layer.x),
        dscores(layer.scores),
        dw1(layer.w1),
        db1(layer.b1),
        dw2(layer.w2),
        db2(layer.b2) {
    const auto relocate = [](Grouped<double>& copy, const Grouped<double>& original) {
      for (size_t half = 0; half < 2; ++half) {
        if (!original.matrix[half].present()) continue;
        const auto* from = original.storage.data_pointer();
        copy.matrix[half].data = copy.storage.data().data() +
                                 (static_cast<const double*>(original.matrix[half].data) - from);
      }
      std::fill(copy.storage.data().begin(), copy.storage.data().end(), 0.0);
    };
    relocate(dw1, layer.w1);
    relocate(db1, layer.b1);
    relocate(dw2, layer.w2);
    relocate(db2, layer.b2);
  }

  Array<double> dx, dscores;
  Grouped<double> dw1, db1, dw2, db2;
};

void run_backward(Layer& layer, Gradients& out) {
  const RowGroups groups = layer.rows.groups();
  const int64_t capacity = layer.rows.capacity();
  const int32_t halves = static_cast<int32_t>(layer.halves);
  Array<double> h(capacity, layer.halves * Layer::kInner);
  layer.value(h);
  Array<double> a_scaled(capacity, Layer::kInner), partials(capacity, 1);
  Array<double> dx_rows(capacity, Layer::kHidden);
  const TensorView d_output = layer.direction.view();
  const TensorView dh = h.view();
  const Backend& ops = backend();
  ops.down_backward({groups,
                     {layer.kind},
                     d_output,
                     layer.down(),
                     layer.scores.view1(),
                     h.view(),
                     dh,
                     a_scaled.view(),
                     partials.view(),
                     {}},
                    kContext);
  ops.score_gradient(
      {groups, partials.view(), d_output, layer.b2.vectors()[0], out.dscores.view1()}, kContext);
  ops.up_backward({groups, dh, layer.up(), dx_rows.view(), {}}, kContext);
  ops.combine({layer.rows.plan(), dx_rows.view(), {}, out.dx.view()}, kContext);
  ops.weight_gradient({groups,
                       dh,
                       RowAccess::direct,
                       layer.x.view(),
                       RowAccess::gathered,
                       out.dw1.matrix,
                       halves,
                       GradMode::overwrite,
                       {},
                       {}},
                      kContext);
  ops.weight_gradient({groups,
                       d_output,
                       RowAccess::gathered,
                       a_scaled.view(),
                       RowAccess::direct,
                       out.dw2.matrix,
                       1,
                       GradMode::overwrite,
                       {},
                       {}},
                      kContext);
  ops.bias_gradient(
      {groups, dh, RowAccess::direct, {}, out.db1.vectors(), halves, GradMode::overwrite, {}, {}},
      kContext);
  ops.bias_gradient({groups,
                     d_output,
                     RowAccess::gathered,
                     layer.scores.view1(),
                     out.db2.vectors(),
                     1,
                     GradMode::overwrite,
                     {},
                     {}},
                    kContext);
}

TEST(Table, BackwardIsTheGradientOfForward) {
  for (Activation kind : {Activation::swiglu, Activation::geglu, Activation::swiglu_clamped,
                          Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
    SCOPED_TRACE(static_cast<int>(kind));
    Layer layer(kind);
    Gradients out(layer);
    run_backward(layer, out);
    layer.expect_gradient(layer.x.data(), out.dx.data());
    layer.expect_gradient(layer.scores.data(), out.dscores.data());
    layer.expect_gradient(layer.w1.storage.data(), out.dw1.storage.data());
    layer.expect_gradient(layer.b1.storage.data(), out.db1.storage.data());
    layer.expect_gradient(layer.w2.storage.data(), out.dw2.storage.data());
    layer.expect_gradient(layer.b2.storage.data(), out.db2.storage.data());
  }
}

}  // namespace
}  // namespace penstock::cpu::reference_test
