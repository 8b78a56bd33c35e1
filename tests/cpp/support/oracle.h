// SPDX-License-Identifier: Apache-2.0
//
// An MoE layer in float64, token by token and slot by slot, straight from the formulas: no plan, no
// rows, no layouts, no code shared with the library. Derivatives of activations come from dual
// numbers, not from formulas of their own.
#pragma once

#include <cstdint>
#include <vector>

#include "penstock/experts.h"

namespace penstock::test {

// A dense (E, rows, cols) array.
struct Array3 {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<double> values;

  Array3() = default;
  Array3(int64_t experts, int64_t r, int64_t c)
      : rows(r), cols(c), values(static_cast<size_t>(experts * r * c), 0.0) {}
  double& at(int64_t e, int64_t r, int64_t c) {
    return values[static_cast<size_t>((e * rows + r) * cols + c)];
  }
  double at(int64_t e, int64_t r, int64_t c) const {
    return values[static_cast<size_t>((e * rows + r) * cols + c)];
  }
};

// Weights, or their gradients, by meaning: half 0 is the gate (or the only one), half 1 up.
struct DenseWeights {
  Array3 w1[2];  // (E, n, d)
  Array3 b1[2];  // (E, n, 1)
  Array3 w2;     // (E, d, n)
  Array3 b2;     // (E, d, 1)
};

struct DenseSlot {
  int64_t token;
  int64_t expert;  // -1: skipped
  double score;
};

struct DenseLayer {
  Activation activation = Activation::swiglu;
  double clamp_alpha = 1.702f;
  double clamp_limit = 7.0f;
  DType h_dtype = DType::float64;  // H is rounded to it before the activation, as the contract says
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_experts = 0;
  std::vector<double> x;  // (T, d)
  std::vector<double> d_output;
  DenseWeights weights;  // biases all zero where there are none
  std::vector<DenseSlot> slots;
};

struct DenseResults {
  std::vector<double> output;       // (T, d)
  std::vector<double> slot_output;  // (slots, d)  S Y of each slot
  std::vector<double> dx;           // (T, d)
  std::vector<double> slot_dx;      // (slots, d)
  std::vector<double> dscores;      // (slots)
  DenseWeights grads;
};

DenseResults run_dense(const DenseLayer& layer);

}  // namespace penstock::test
