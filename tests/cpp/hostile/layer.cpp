// SPDX-License-Identifier: Apache-2.0
//
// See layer.h. The statement is written from the formulas in penstock/experts.h and shares no code
// with the library.
#include "layer.h"

#include <cmath>

#include "buffer.h"

namespace penstock::hostile {
namespace {

std::vector<double> random_values(int64_t count, double scale, DType dtype, Random& random) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = rounded(scale * random.uniform(), dtype);
  return values;
}

double sigmoid(double v) { return 1.0 / (1.0 + std::exp(-v)); }
double normal_cdf(double v) { return 0.5 * std::erfc(-v / std::sqrt(2.0)); }
double normal_pdf(double v) { return std::exp(-0.5 * v * v) / std::sqrt(2.0 * std::acos(-1.0)); }

// act(gate, up) and its two partial derivatives.
struct Activated {
  double value;
  double by_gate;
  double by_up;
};

Activated clamped_swiglu(double gate, double up, const ExpertsConfig& config) {
  const double alpha = static_cast<double>(config.clamp_alpha);
  const double limit = static_cast<double>(config.clamp_limit);
  const double g = std::isnan(gate) ? gate : std::fmin(gate, limit);
  const double u = std::isnan(up) ? up : std::fmax(std::fmin(up, limit), -limit);
  const double s = sigmoid(alpha * g);
  const double slope = s + alpha * g * s * (1.0 - s);
  return {g * s * (u + 1.0), gate <= limit ? slope * (u + 1.0) : 0.0,
          up >= -limit && up <= limit ? g * s : 0.0};
}

Activated one_sided(Activation kind, double v) {
  const double s = sigmoid(v);
  switch (kind) {
    case Activation::swiglu:
    case Activation::silu:
      return {v * s, s + v * s * (1.0 - s), 0.0};
    case Activation::geglu:
    case Activation::gelu:
      return {v * normal_cdf(v), normal_cdf(v) + v * normal_pdf(v), 0.0};
    case Activation::gelu_tanh: {
      const double c = std::sqrt(2.0 / std::acos(-1.0));
      const double t = std::tanh(c * (v + 0.044715 * v * v * v));
      const double dt = (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * v * v);
      return {0.5 * v * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * v * dt, 0.0};
    }
    case Activation::relu_squared:
      return {v > 0.0 ? v * v : 0.0, v > 0.0 ? 2.0 * v : 0.0, 0.0};
    default:  // relu, reglu; a NaN stays one
      return {std::isnan(v) ? v : std::fmax(v, 0.0), v > 0.0 ? 1.0 : 0.0, 0.0};
  }
}

Activated activated(const ExpertsConfig& config, double gate, double up) {
  if (config.activation == Activation::swiglu_clamped) return clamped_swiglu(gate, up, config);
  const Activated one = one_sided(config.activation, gate);
  if (!is_gated(config.activation)) return one;
  return {one.value * up, one.by_gate * up, one.value};
}

double dot(const double* a, const double* b, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(double* out, const double* values, double scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += scale * values[i];
}

const double* at(const std::vector<double>& values, int64_t index) { return values.data() + index; }
double* at(std::vector<double>& values, int64_t index) { return values.data() + index; }

// One slot's forward and backward, added into the results.
class SlotStatement {
 public:
  SlotStatement(const Layer& layer, Results& results)
      : layer_(layer),
        results_(results),
        d_(layer.shape.hidden_size),
        n_(layer.shape.intermediate_size),
        h_(layer.preactivation_size()) {}

  void add(int64_t slot) {
    const int64_t e = layer_.ids[static_cast<size_t>(slot)];
    if (e < 0 || e >= layer_.shape.num_experts) return;
    const int64_t token = slot / layer_.shape.top_k;
    const double score = layer_.scores[static_cast<size_t>(slot)];
    const double* x = at(layer_.x, token * d_);
    const double* d_output = at(layer_.d_output, token * d_);
    activate(e, x);

    std::vector<double> g(static_cast<size_t>(n_), 0.0);  // dO W2
    const std::vector<double> a = stored(a_, 1.0), a_scaled = stored(a_, score);
    double d_score = 0.0;
    for (int64_t i = 0; i < d_; ++i) {
      const double* w2 = at(layer_.w2, (e * d_ + i) * n_);
      const double b2 = layer_.b2.empty() ? 0.0 : *at(layer_.b2, e * d_ + i);
      const double y = rounded(dot(a.data(), w2, n_) + b2, layer_.dtype);
      *at(results_.output, token * d_ + i) += score * y;
      add_scaled(g.data(), w2, d_output[i], n_);
      add_scaled(at(results_.dw2, (e * d_ + i) * n_), a_scaled.data(), d_output[i], n_);
      if (!layer_.b2.empty()) *at(results_.db2, e * d_ + i) += score * d_output[i];
      d_score += d_output[i] * b2;
    }
    *at(results_.dscores, slot) = d_score + dot(g.data(), a_.data(), n_);

    std::vector<double> dx(static_cast<size_t>(d_), 0.0);
    for (int64_t row = 0; row < h_; ++row) {
      const double dh = rounded(*at(slopes_, row) * score * *at(g, row % n_), layer_.dtype);
      add_scaled(dx.data(), at(layer_.w1, (e * h_ + row) * d_), dh, d_);
      add_scaled(at(results_.dw1, (e * h_ + row) * d_), x, dh, d_);
      if (!layer_.b1.empty()) *at(results_.db1, e * h_ + row) += dh;
    }
    add_scaled(at(results_.dx, token * d_), stored(dx, 1.0).data(), 1.0, d_);
  }

 private:
  std::vector<double> stored(const std::vector<double>& values, double scale) const {
    std::vector<double> result(values);
    for (double& value : result) value = rounded(scale * value, layer_.dtype);
    return result;
  }

  void activate(int64_t e, const double* x) {
    a_.assign(static_cast<size_t>(n_), 0.0);
    slopes_.assign(static_cast<size_t>(h_), 0.0);
    for (int64_t j = 0; j < n_; ++j) {
      const double gate = preactivation(e, j, x);
      const double up = h_ > n_ ? preactivation(e, n_ + j, x) : 0.0;
      const Activated result = activated(layer_.config, gate, up);
      *at(a_, j) = result.value;
      *at(slopes_, j) = result.by_gate;
      if (h_ > n_) *at(slopes_, n_ + j) = result.by_up;
    }
  }

  double preactivation(int64_t e, int64_t row, const double* x) const {
    const double bias = layer_.b1.empty() ? 0.0 : *at(layer_.b1, e * h_ + row);
    return rounded(dot(x, at(layer_.w1, (e * h_ + row) * d_), d_) + bias, layer_.dtype);
  }

  const Layer& layer_;
  Results& results_;
  const int64_t d_, n_, h_;
  std::vector<double> a_, slopes_;
};

}  // namespace

Layer make_layer(const cases::Shape& shape, DType dtype, Bias bias, uint64_t seed) {
  Random random(seed);
  Layer layer;
  layer.shape = shape;
  layer.dtype = dtype;
  const int64_t d = shape.hidden_size, n = shape.intermediate_size, e = shape.num_experts;
  const int64_t h = layer.preactivation_size();
  layer.x = random_values(shape.num_tokens * d, 1.0, dtype, random);
  layer.w1 = random_values(e * h * d, 2.0 / std::sqrt(static_cast<double>(d)), dtype, random);
  layer.w2 = random_values(e * d * n, 2.0 / std::sqrt(static_cast<double>(n)), dtype, random);
  if (bias == Bias::both) {
    layer.b1 = random_values(e * h, 0.5, dtype, random);
    layer.b2 = random_values(e * d, 0.5, dtype, random);
  }
  layer.d_output = random_values(shape.num_tokens * d, 1.0, dtype, random);
  layer.scores = random_values(layer.num_slots(), 1.0, accumulator_of(dtype), random);
  for (int64_t token = 0; token < shape.num_tokens; ++token) {
    const int64_t first = random.below(e);
    for (int32_t k = 0; k < shape.top_k; ++k)
      layer.ids.push_back(static_cast<int32_t>((first + k) % e));
  }
  return layer;
}

Results statement(const Layer& layer) {
  Results results;
  results.output.assign(layer.x.size(), 0.0);
  results.dx.assign(layer.x.size(), 0.0);
  results.dscores.assign(layer.scores.size(), 0.0);
  results.dw1.assign(layer.w1.size(), 0.0);
  results.dw2.assign(layer.w2.size(), 0.0);
  results.db1.assign(layer.b1.size(), 0.0);
  results.db2.assign(layer.b2.size(), 0.0);
  SlotStatement slots(layer, results);
  for (int64_t slot = 0; slot < layer.num_slots(); ++slot) slots.add(slot);
  return results;
}

double relative_l2(const std::vector<double>& a, const std::vector<double>& b) {
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return norm > 0.0 ? std::sqrt(error / norm) : std::sqrt(error);
}

}  // namespace penstock::hostile
