// SPDX-License-Identifier: Apache-2.0
//
// One MoE layer's inputs as plain values, and its float64 statement. Values are rounded to the
// storage type when a layer is made, so the statement and the library see the same inputs. Weights
// are output_major, gate and up concatenated; ids outside [0, E) skip their slot.
#pragma once

#include <cstdint>
#include <vector>

#include "penstock/experts.h"
#include "penstock_cases.h"

namespace penstock::hostile {

struct Layer {
  cases::Shape shape;
  ExpertsConfig config;
  DType dtype = DType::float32;
  std::vector<double> x;         // (T, d)
  std::vector<double> w1;        // (E, h, d)
  std::vector<double> w2;        // (E, d, n)
  std::vector<double> b1;        // (E, h), empty: no bias
  std::vector<double> b2;        // (E, d), empty: no bias
  std::vector<double> scores;    // (T, K)
  std::vector<int32_t> ids;      // (T, K)
  std::vector<double> d_output;  // (T, d)

  int64_t preactivation_size() const { return config.halves() * shape.intermediate_size; }
  int64_t num_slots() const { return shape.num_tokens * shape.top_k; }
};

enum class Bias : uint8_t { none, both };

// Random values of size O(1), K distinct random experts a token.
Layer make_layer(const cases::Shape& shape, DType dtype, Bias bias = Bias::both, uint64_t seed = 1);

// Ids that never name an expert of `empty` (which leaves at least K others).
template <size_t N>
void avoid_experts(Layer& layer, const int64_t (&empty)[N]);

struct Results {
  std::vector<double> output, dx, dscores, dw1, dw2, db1, db2;
};

// The whole layer in float64, straight from the formulas, rounded only where the contract stores a
// value (H, A, A', dH, Y, dX~). What is left to differ is the library's own arithmetic, so the
// bound is that of a stage even where a layer is too small for errors to average out.
Results statement(const Layer& layer);

// ||a - b|| / ||b||; the norm of a where b is all zero.
double relative_l2(const std::vector<double>& a, const std::vector<double>& b);

// Deterministic on every platform, unlike the distributions of <random>.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-52 - 1.0; }  // [-1, 1)
  int64_t below(int64_t bound) {
    return static_cast<int64_t>(next() % static_cast<uint64_t>(bound));
  }

 private:
  uint64_t state_;
};

template <size_t N>
void avoid_experts(Layer& layer, const int64_t (&empty)[N]) {
  std::vector<int32_t> live;
  for (int32_t e = 0; e < layer.shape.num_experts; ++e) {
    bool is_empty = false;
    for (int64_t other : empty) is_empty = is_empty || other == e;
    if (!is_empty) live.push_back(e);
  }
  for (size_t slot = 0; slot < layer.ids.size(); ++slot) {
    const size_t choice = slot % static_cast<size_t>(layer.shape.top_k);
    const size_t token = slot / static_cast<size_t>(layer.shape.top_k);
    layer.ids[slot] = live[(token + choice) % live.size()];
  }
}

}  // namespace penstock::hostile
