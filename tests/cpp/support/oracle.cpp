// SPDX-License-Identifier: Apache-2.0
//
// See oracle.h.
#include "support/oracle.h"

#include <array>
#include <cmath>

#include "support/memory.h"

namespace penstock::test {
namespace {

// A value and its derivatives by gate and by up.
struct Dual {
  double value;
  std::array<double, 2> by;
};

Dual operator+(Dual a, double b) { return {a.value + b, a.by}; }
Dual operator*(Dual a, Dual b) {
  return {a.value * b.value,
          {a.by[0] * b.value + a.value * b.by[0], a.by[1] * b.value + a.value * b.by[1]}};
}
Dual scaled(Dual a, double by) { return {a.value * by, {a.by[0] * by, a.by[1] * by}}; }
Dual applied(Dual a, double value, double slope) {
  return {value, {a.by[0] * slope, a.by[1] * slope}};
}
Dual sigmoid(Dual a) {
  const double s = 1.0 / (1.0 + std::exp(-a.value));
  return applied(a, s, s * (1.0 - s));
}
Dual normal_cdf(Dual a) {
  return applied(a, 0.5 * std::erfc(-a.value / std::sqrt(2.0)),
                 std::exp(-0.5 * a.value * a.value) / std::sqrt(2.0 * M_PI));
}
Dual tanh(Dual a) {
  const double t = std::tanh(a.value);
  return applied(a, t, 1.0 - t * t);
}
Dual relu(Dual a) { return a.value > 0 ? a : Dual{0, {0, 0}}; }
Dual clamped(Dual a, double low, double high) {  // torch passes the gradient at the edges
  if (a.value < low) return {low, {0, 0}};
  if (a.value > high) return {high, {0, 0}};
  return a;
}

Dual activated(const DenseLayer& layer, Dual g, Dual u) {
  switch (layer.activation) {
    case Activation::swiglu:
      return g * sigmoid(g) * u;
    case Activation::geglu:
      return g * normal_cdf(g) * u;
    case Activation::reglu:
      return relu(g) * u;
    case Activation::swiglu_clamped: {
      const Dual gate = clamped(g, -INFINITY, layer.clamp_limit);
      const Dual up = clamped(u, -layer.clamp_limit, layer.clamp_limit);
      return gate * sigmoid(scaled(gate, layer.clamp_alpha)) * (up + 1.0);
    }
    case Activation::silu:
      return g * sigmoid(g);
    case Activation::gelu:
      return g * normal_cdf(g);
    case Activation::gelu_tanh: {
      const Dual inner = g * (scaled(g * g, 0.044715) + 1.0);
      return scaled(g, 0.5) * (tanh(scaled(inner, std::sqrt(2.0 / M_PI))) + 1.0);
    }
    case Activation::relu:
      return relu(g);
    case Activation::relu_squared:
      return relu(g) * relu(g);
  }
  return {NAN, {NAN, NAN}};
}

DenseWeights zero_like(const DenseLayer& layer) {
  const int64_t e = layer.num_experts;
  DenseWeights grads;
  for (int half = 0; half < 2; ++half) {
    grads.w1[half] = Array3(e, layer.intermediate_size, layer.hidden_size);
    grads.b1[half] = Array3(e, layer.intermediate_size, 1);
  }
  grads.w2 = Array3(e, layer.hidden_size, layer.intermediate_size);
  grads.b2 = Array3(e, layer.hidden_size, 1);
  return grads;
}

// One slot's forward and backward, added into the results.
class SlotPass {
 public:
  SlotPass(const DenseLayer& layer, const DenseSlot& slot)
      : layer_(layer), slot_(slot), halves_(is_gated(layer.activation) ? 2 : 1) {}

  void run(size_t index, DenseResults& results) {
    forward(index, results);
    backward(index, results);
  }

 private:
  int64_t d() const { return layer_.hidden_size; }
  int64_t n() const { return layer_.intermediate_size; }
  double token_value(const std::vector<double>& rows, int64_t col) const {
    return rows[static_cast<size_t>(slot_.token * d() + col)];
  }

  void forward(size_t index, DenseResults& results) {
    const DenseWeights& w = layer_.weights;
    a_.resize(static_cast<size_t>(n()));
    for (int64_t i = 0; i < n(); ++i) {
      Dual pre[2] = {{0, {1, 0}}, {0, {0, 1}}};
      for (int half = 0; half < halves_; ++half) {
        pre[half].value = w.b1[half].at(slot_.expert, i, 0);
        for (int64_t c = 0; c < d(); ++c)
          pre[half].value += token_value(layer_.x, c) * w.w1[half].at(slot_.expert, i, c);
        pre[half].value = rounded(pre[half].value, layer_.h_dtype);
      }
      a_[static_cast<size_t>(i)] = activated(layer_, pre[0], pre[1]);
    }
    for (int64_t c = 0; c < d(); ++c) {
      double y = w.b2.at(slot_.expert, c, 0);
      for (int64_t i = 0; i < n(); ++i)
        y += a_[static_cast<size_t>(i)].value * w.w2.at(slot_.expert, c, i);
      results.dscores[index] += token_value(layer_.d_output, c) * y;
      results.output[static_cast<size_t>(slot_.token * d() + c)] += slot_.score * y;
      results.slot_output[index * static_cast<size_t>(d()) + static_cast<size_t>(c)] =
          slot_.score * y;
    }
  }

  void backward(size_t index, DenseResults& results) {
    const DenseWeights& w = layer_.weights;
    DenseWeights& grads = results.grads;
    const int64_t e = slot_.expert;
    for (int64_t c = 0; c < d(); ++c)
      grads.b2.at(e, c, 0) += slot_.score * token_value(layer_.d_output, c);
    for (int64_t i = 0; i < n(); ++i) {
      const Dual& a = a_[static_cast<size_t>(i)];
      double da = 0;
      for (int64_t c = 0; c < d(); ++c) {
        const double dy = slot_.score * token_value(layer_.d_output, c);
        da += dy * w.w2.at(e, c, i);
        grads.w2.at(e, c, i) += dy * a.value;
      }
      for (int half = 0; half < halves_; ++half) {
        const double dh = da * a.by[static_cast<size_t>(half)];
        grads.b1[half].at(e, i, 0) += dh;
        for (int64_t c = 0; c < d(); ++c) {
          const double dx = dh * w.w1[half].at(e, i, c);
          grads.w1[half].at(e, i, c) += dh * token_value(layer_.x, c);
          results.dx[static_cast<size_t>(slot_.token * d() + c)] += dx;
          results.slot_dx[index * static_cast<size_t>(d()) + static_cast<size_t>(c)] += dx;
        }
      }
    }
  }

  const DenseLayer& layer_;
  const DenseSlot& slot_;
  int halves_;
  std::vector<Dual> a_;
};

}  // namespace

DenseResults run_dense(const DenseLayer& layer) {
  DenseResults results;
  results.output.assign(layer.x.size(), 0.0);
  results.dx.assign(layer.x.size(), 0.0);
  results.slot_output.assign(layer.slots.size() * static_cast<size_t>(layer.hidden_size), 0.0);
  results.slot_dx = results.slot_output;
  results.dscores.assign(layer.slots.size(), 0.0);
  results.grads = zero_like(layer);
  for (size_t index = 0; index < layer.slots.size(); ++index)
    if (layer.slots[index].expert >= 0) SlotPass(layer, layer.slots[index]).run(index, results);
  return results;
}

}  // namespace penstock::test
