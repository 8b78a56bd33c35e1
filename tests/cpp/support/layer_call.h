// SPDX-License-Identifier: Apache-2.0
//
// One layer, run through the public calls in any of the forms that the experts' interface allows
// (LayerForm), and its float64 oracle. Inputs are rounded to the dtype before the oracle sees them.
// Every output, workspace, gap row and unused byte is poison, between guards.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "penstock/penstock.h"
#include "support/memory.h"
#include "support/oracle.h"

namespace penstock::test {

enum class Bias : uint8_t { none, both };
enum class UpForm : uint8_t { joined, separate };    // gate and up in one tensor or in two
enum class SlotForm : uint8_t { top_k, variable };   // variable: token_offsets and skipped slots
enum class PassForm : uint8_t { whole, delayed };    // backward in one call or in two
enum class Training : uint8_t { all, some_frozen };  // odd experts are frozen
// stored_h: float64 but for H, which is rounded as it is stored. exact: float64 throughout.
enum class Oracle : uint8_t { stored_h, exact };

struct LayerForm {
  ExpertsConfig config;
  DType dtype = DType::float64;
  DType grad_dtype = DType::float64;  // of the weight gradients
  Bias bias = Bias::both;
  UpForm up = UpForm::joined;
  RowSource rows = RowSource::routed;
  SlotForm slots = SlotForm::top_k;
  PassForm passes = PassForm::whole;
  GradMode mode = GradMode::overwrite;
  Training training = Training::all;
  Oracle oracle = Oracle::stored_h;
  int64_t num_tokens = 11;
  int64_t hidden_size = 13;
  int64_t intermediate_size = 7;
  int64_t num_experts = 5;
  int32_t top_k = 3;
};

std::string text_of(const LayerForm& form);

class LayerCall {
 public:
  explicit LayerCall(const LayerForm& form, const Context& context = {}, uint64_t seed = 1);

  void forward();
  void backward();
  // Against the oracle; guards, gap rows and frozen slices too. Failures are gtest's.
  void check_forward() const;
  void check_backward() const;

  // The bytes of every result, for comparisons bit by bit.
  std::vector<std::vector<uint8_t>> result_bytes() const;

  const DenseLayer& dense() const { return dense_; }

  // Built by the constructor; a test may bend them before a call.
  ExpertsForwardArgs forward_args;
  ExpertsBackwardArgs backward_args;
  Context context;

 private:
  // The weights' tensors: what the caller of the library owns.
  struct WeightTensors {
    Tensor w1, w1_up, w2, b1, b1_up, b2;
    ExpertWeights views() const;
  };

  void make_dense(uint64_t seed);
  void make_slots(Random& random);
  WeightTensors make_weight_tensors(DType dtype) const;
  // Moves values between a meaning (half, row, col) and the place that the form gives it.
  void write_weights(const DenseWeights& from, const ExpertWeights& to) const;
  DenseWeights read_weights(const ExpertWeights& from) const;
  TensorView w1_part(const ExpertWeights& weights, int half) const;
  TensorView b1_part(const ExpertWeights& weights, int half) const;

  void make_routed_plan();
  void make_dispatched_plan();
  void make_inputs();
  void make_outputs(uint64_t seed);
  Workspace workspace(Block& block, int64_t bytes);
  void check_rows(const char* name, const Tensor& got, const std::vector<double>& by_token,
                  const std::vector<double>& by_slot) const;
  void check_scores() const;
  void check_weight_grads() const;
  bool dispatched() const { return form_.rows == RowSource::dispatched; }
  int halves() const { return static_cast<int>(form_.config.halves()); }

  LayerForm form_;
  DenseLayer dense_;
  DenseResults expected_;
  DenseWeights prior_;                // what the gradients held before
  std::vector<int64_t> slot_of_row_;  // dispatched: the slot of each row, -1 for gaps

  WeightTensors weights_, grads_;
  Tensor x_, d_output_, scores_, output_, h_, dx_, dscores_, trainable_, dh_, a_scaled_;
  Tensor counts_, offsets_, row_to_token_, row_to_slot_, slot_to_row_, token_offsets_, ids_;
  Block forward_block_, backward_block_, data_block_, weights_block_, plan_block_;
};

}  // namespace penstock::test
