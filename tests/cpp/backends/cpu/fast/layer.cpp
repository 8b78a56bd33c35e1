// SPDX-License-Identifier: Apache-2.0
//
// See layer.h. Comparison is by relative L2 over the whole, every row and every 16 columns.
#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <stdexcept>

#include "backends/cpu/common/activation.h"
#include "backends/cpu/reference/reference_backend.h"
#include "penstock_cases.h"
#include "tensor/dispatch.h"

namespace penstock::cpu::fast_test {
namespace {

double normal(std::mt19937_64& random) {
  const double u = (static_cast<double>(random() >> 11) + 0.5) * 0x1p-53;
  const double v = static_cast<double>(random() >> 11) * 0x1p-53;
  return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
}

void fill(Tensor& tensor, double scale, Values values, std::mt19937_64& random) {
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    const double integer = static_cast<double>(static_cast<int64_t>(random() % 5)) - 2.0;
    tensor.set(i, values == Values::normal ? scale * normal(random) : integer);
  }
}

int64_t expert_of_choice(const LayerSpec& spec, int64_t choice, std::mt19937_64& random) {
  if (spec.load == Load::one_expert) return spec.experts / 2;
  int64_t expert = static_cast<int64_t>(random() % static_cast<uint64_t>(spec.experts));
  if (spec.load == Load::skewed) expert = expert * expert / spec.experts / 2;
  return (expert + choice * 7) % spec.experts;
}

}  // namespace

Tensor::Tensor(DType dtype, std::vector<int64_t> shape) : dtype_(dtype), shape_(std::move(shape)) {
  bytes_.assign(static_cast<size_t>(numel() * size_of(dtype)), 0xff);
}

int64_t Tensor::numel() const {
  int64_t count = present() ? 1 : 0;
  for (int64_t extent : shape_) count *= extent;
  return count;
}

TensorView Tensor::view() {
  if (!present()) return {};
  if (shape_.size() == 1) return TensorView::contiguous(bytes_.data(), dtype_, {shape_[0]});
  if (shape_.size() == 2)
    return TensorView::contiguous(bytes_.data(), dtype_, {shape_[0], shape_[1]});
  return TensorView::contiguous(bytes_.data(), dtype_, {shape_[0], shape_[1], shape_[2]});
}

double Tensor::get(int64_t index) const {
  if (!is_floating(dtype_)) return reinterpret_cast<const int32_t*>(bytes_.data())[index];
  return visit_floating(dtype_, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return static_cast<double>(load(reinterpret_cast<const T*>(bytes_.data())[index]));
  });
}

void Tensor::set(int64_t index, double value) {
  visit_floating(dtype_, [&](auto tag) {
    using T = typename decltype(tag)::type;
    store(reinterpret_cast<T*>(bytes_.data())[index], static_cast<Accumulator<T>>(value));
  });
}

void Tensor::poison() { std::fill(bytes_.begin(), bytes_.end(), uint8_t{0xff}); }

Tensor Tensor::to_float64() const {
  if (!present()) return {};
  Tensor result(DType::float64, shape_);
  for (int64_t i = 0; i < numel(); ++i) result.set(i, get(i));
  return result;
}

std::string LayerSpec::name() const {
  std::string text = std::string(name_of(dtype)) + " T" + std::to_string(tokens) + " d" +
                     std::to_string(hidden) + " n" + std::to_string(intermediate) + " E" +
                     std::to_string(experts) + " K" + std::to_string(top_k) + " " +
                     std::string(name_of(activation)) + " " + std::string(name_of(gate_layout)) +
                     " " + std::string(name_of(weight_order));
  if (biases == Biases::present) text += " biases";
  if (load != Load::random) text += load == Load::skewed ? " skewed" : " one_expert";
  if (grad_mode == GradMode::accumulate) text += " accumulate";
  return text;
}

ExpertsProblem LayerSpec::problem() const {
  ExpertsProblem problem;
  problem.config.activation = activation;
  problem.config.gate_layout = gate_layout;
  problem.config.weight_order = weight_order;
  problem.num_tokens = tokens;
  problem.hidden_size = hidden;
  problem.intermediate_size = intermediate;
  problem.num_experts = experts;
  problem.num_slots = tokens * top_k;
  problem.row_capacity = tokens * top_k;
  problem.dtype = dtype;
  return problem;
}

Layer::Layer(const LayerSpec& layer_spec) : spec(layer_spec) {
  const int64_t T = spec.tokens, d = spec.hidden, n = spec.intermediate, E = spec.experts;
  const int64_t h_size = spec.halves() * n, slots = T * spec.top_k;
  const bool swapped = spec.weight_order == WeightOrder::input_major;
  std::mt19937_64 random(spec.seed);
  const auto make = [&](std::vector<int64_t> shape, double scale) {
    Tensor tensor(spec.dtype, std::move(shape));
    fill(tensor, scale, spec.values, random);
    return tensor;
  };
  x = make({T, d}, 1.0);
  d_output = make({T, d}, 1.0);
  w1 = make(swapped ? std::vector{E, d, h_size} : std::vector{E, h_size, d},
            1.0 / std::sqrt(static_cast<double>(d)));
  w2 = make(swapped ? std::vector{E, n, d} : std::vector{E, d, n},
            1.0 / std::sqrt(static_cast<double>(n)));
  router_weight = make({E, d}, 1.0 / std::sqrt(static_cast<double>(d)));
  if (spec.biases == Biases::present) {
    b1 = make({E, h_size}, 1.0);
    b2 = make({E, d}, 1.0);
  }
  scores = Tensor(DType::float32, {slots});
  fill(scores, 1.0, spec.values, random);
  ids = Tensor(DType::int32, {slots});
  for (int64_t slot = 0; slot < slots; ++slot) {
    const bool skipped = random() % 16 == 0;
    const int64_t expert = expert_of_choice(spec, slot % spec.top_k, random);
    ids.data<int32_t>()[slot] = skipped ? -1 : static_cast<int32_t>(expert);
  }
  counts = Tensor(DType::int32, {E});
  offsets = Tensor(DType::int32, {E + 1});
  row_to_token = Tensor(DType::int32, {slots});
  row_to_slot = Tensor(DType::int32, {slots});
  slot_to_row = Tensor(DType::int32, {slots});
  logits = Tensor(DType::float32, {T, E});
  router_scores = Tensor(DType::float32, {T, spec.top_k});
  router_ids = Tensor(DType::int32, {T, spec.top_k});
  d_logits = Tensor(DType::float32, {T, E});
  router_dx = Tensor(spec.dtype, {T, d});
  d_router_weight = Tensor(DType::float32, {E, d});
  h = Tensor(spec.dtype, {slots, h_size});
  a = Tensor(spec.dtype, {slots, n});
  y = Tensor(spec.dtype, {slots, d});
  output = Tensor(spec.dtype, {T, d});
  dh = h;
  a_scaled = a;
  dscores = Tensor(DType::float32, {slots});
  dx_rows = y;
  dx = output;
  dw1 = w1;
  dw2 = w2;
  db1 = b1;
  db2 = b2;
}

RoutingPlan Layer::plan() {
  RoutingPlan result;
  result.expert_counts = counts.view();
  result.expert_offsets = offsets.view();
  result.row_to_token = row_to_token.view();
  result.row_to_slot = row_to_slot.view();
  result.slot_to_row = slot_to_row.view();
  result.top_k = static_cast<int32_t>(spec.top_k);
  return result;
}

RowGroups Layer::groups() {
  return {counts.view(), offsets.view(), row_to_token.view(), row_to_slot.view(),
          row_to_token.numel()};
}

UpWeights Layer::up_weights(Tensor& w, Tensor& b) {
  const int64_t d = spec.hidden, n = spec.intermediate, halves = spec.halves();
  const bool swapped = spec.weight_order == WeightOrder::input_major;
  const bool interleaved = spec.gate_layout == GateLayout::interleaved && halves == 2;
  const int64_t row_stride = swapped ? 1 : d;
  UpWeights result;
  result.halves = static_cast<int32_t>(halves);
  for (int64_t half = 0; half < halves; ++half) {
    const int64_t first = interleaved ? half : half * n;
    GroupedMatrix& matrix = result.w[static_cast<size_t>(half)];
    matrix.dtype = w.dtype();
    matrix.data = w.data<char>() + first * row_stride * size_of(w.dtype());
    matrix.expert_stride = halves * n * d;
    matrix.row_stride = interleaved ? 2 * row_stride : row_stride;
    matrix.col_stride = swapped ? halves * n : 1;
    if (!b.present()) continue;
    GroupedVector& vector = result.b[static_cast<size_t>(half)];
    vector = {b.data<char>() + first * size_of(b.dtype()), b.dtype(), halves * n,
              interleaved ? 2 : 1};
  }
  return result;
}

DownWeights Layer::down_weights(Tensor& w, Tensor& b) {
  const int64_t d = spec.hidden, n = spec.intermediate;
  const bool swapped = spec.weight_order == WeightOrder::input_major;
  DownWeights result;
  result.w = {w.data<char>(), w.dtype(), d * n, swapped ? 1 : n, swapped ? d : 1};
  if (b.present()) result.b = {b.data<char>(), b.dtype(), d, 1};
  return result;
}

std::vector<Tensor*> Layer::floating() {
  return {&x,        &w1,       &w2,  &b1,        &b2,        &scores,    &d_output, &router_weight,
          &logits,   &router_scores,  &d_logits,  &router_dx, &d_router_weight,      &h,
          &a,        &y,        &output, &dh,     &a_scaled,  &partials,  &dscores,  &dx_rows,
          &dx,       &dw1,      &dw2, &db1,       &db2};
}

Layer Layer::to_float64() const {
  Layer result = *this;
  result.spec.dtype = DType::float64;
  for (Tensor* tensor : result.floating()) *tensor = tensor->to_float64();
  return result;
}

namespace {

double tolerance_of(const Layer& layer, Tensor Layer::* output) {
  if (output == &Layer::dscores) return cases::tolerance::dscores(layer.spec.dtype);
  return cases::tolerance::stage((layer.*output).dtype());
}

struct Distance {
  double error = 0.0;
  double norm = 0.0;

  void add(double actual, double expected) {
    error += (actual - expected) * (actual - expected);
    norm += expected * expected;
  }
  // Not `>`: a NaN is outside.
  bool within(double tolerance) const { return error <= tolerance * tolerance * norm; }
  std::string text() const { return std::to_string(1e9 * std::sqrt(error / norm)) + "e-9"; }
};

std::string compare(const Tensor& actual, const Tensor& expected, double tolerance,
                    int64_t num_rows) {
  const double loose = tolerance * cases::tolerance::block_factor;
  const int64_t cols = num_rows > 0 ? actual.numel() / num_rows : 0;
  Distance whole;
  std::vector<Distance> blocks(static_cast<size_t>((cols + 15) / 16));
  for (int64_t i = 0; i < num_rows; ++i) {
    Distance row;
    for (int64_t j = 0; j < cols; ++j) {
      const double value = actual.get(i * cols + j), wanted = expected.get(i * cols + j);
      if (std::isnan(wanted)) continue;  // a row that no expert owns
      for (Distance* distance : {&whole, &row, &blocks[static_cast<size_t>(j / 16)]})
        distance->add(value, wanted);
    }
    // Of fewer columns the sums of a single row can all cancel.
    if (cols >= 16 && !row.within(loose)) return "row " + std::to_string(i) + ": " + row.text();
  }
  for (size_t block = 0; block < blocks.size(); ++block)
    if (!blocks[block].within(loose))
      return "columns from " + std::to_string(16 * block) + ": " + blocks[block].text();
  return whole.within(tolerance) ? "" : "whole: " + whole.text();
}

// act(H) of H as the layer stores it: A's own stage.
Tensor activation_of_stored_h(const Layer& layer) {
  Tensor result(DType::float64, {layer.a.size(0), layer.a.size(1)});
  ActivationSpec activation;
  activation.kind = layer.spec.activation;
  const int64_t n = layer.spec.intermediate, halves = layer.spec.halves();
  for (int64_t row = 0; row < layer.a.size(0); ++row) {
    for (int64_t col = 0; col < n; ++col) {
      const double gate = layer.h.get(row * halves * n + col);
      const double up = layer.h.get(row * halves * n + (halves - 1) * n + col);
      result.set(row * n + col, activate(activation, gate, up));
    }
  }
  return result;
}

}  // namespace

std::string check_operation(Layer& layer, const Operation& operation, const Runner& runner) {
  Layer exact = layer.to_float64();
  operation.run(layer, runner);
  const Runner reference = {&reference_backend(), 1};
  operation.run(exact, reference);
  exact.a = activation_of_stored_h(layer);
  for (Tensor Layer::* member : operation.outputs) {
    const Tensor& actual = layer.*member;
    if (!actual.present()) continue;
    const int64_t rows = actual.size(0);
    const std::string wrong =
        compare(actual, exact.*member, tolerance_of(layer, member), rows);
    if (!wrong.empty()) return std::string(operation.name) + ", " + wrong;
  }
  return "";
}

}  // namespace penstock::cpu::fast_test
