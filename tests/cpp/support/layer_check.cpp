// SPDX-License-Identifier: Apache-2.0
//
// How a LayerCall is judged: end-to-end tolerances from tests/cases, rows in gaps and frozen
// experts untouched to the bit, guards intact.
#include <gtest/gtest.h>

#include "support/compare.h"
#include "support/layer_call.h"

namespace penstock::test {
namespace {

bool all_poison(const TensorView& rows, int64_t row) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(address_at(rows, {row, 0}));
  for (int64_t i = 0; i < rows.size(1) * size_of(rows.dtype); ++i)
    if (bytes[i] != kPoison) return false;
  return true;
}

// Of one array's experts, those that must be as they were and those that were computed.
struct Compared {
  std::vector<double> got, expected;
};

}  // namespace

void LayerCall::check_rows(const char* name, const Tensor& got, const std::vector<double>& by_token,
                           const std::vector<double>& by_slot) const {
  const double tolerance = cases::tolerance::end_to_end(form_.dtype);
  const TensorView& view = got.view();
  std::vector<double> values;
  std::vector<double> expected;
  for (int64_t row = 0; row < view.size(0); ++row) {
    const int64_t from = dispatched() ? slot_of_row_[static_cast<size_t>(row)] : row;
    if (from < 0) {
      EXPECT_TRUE(all_poison(view, row)) << name << " wrote gap row " << row;
      continue;
    }
    for (int64_t c = 0; c < view.size(1); ++c) {
      values.push_back(get(view, {row, c}));
      const auto at = static_cast<size_t>(from * view.size(1) + c);
      expected.push_back(dispatched() ? by_slot[at] : by_token[at]);
    }
  }
  expect_close(values, expected, tolerance, name);
  EXPECT_TRUE(got.block().guards_intact()) << name;
}

void LayerCall::check_scores() const {
  std::vector<double> values;
  std::vector<double> expected;
  for (int64_t i = 0; i < dscores_.view().numel(); ++i) {
    const int64_t slot = dispatched() ? slot_of_row_[static_cast<size_t>(i)] : i;
    if (slot < 0) continue;
    values.push_back(get(dscores_.view(), {i}));
    expected.push_back(expected_.dscores[static_cast<size_t>(slot)]);
    if (dense_.slots[static_cast<size_t>(slot)].expert < 0) {
      EXPECT_EQ(values.back(), 0.0) << "skipped slot " << slot;
    }
  }
  expect_close(values, expected, cases::tolerance::end_to_end(form_.dtype), "dscores");
  EXPECT_TRUE(dscores_.block().guards_intact()) << "dscores";
}

DenseWeights LayerCall::read_weights(const ExpertWeights& from) const {
  DenseWeights read = prior_;
  const bool output_major = form_.config.weight_order == WeightOrder::output_major;
  const int64_t n = form_.intermediate_size;
  const int64_t d = form_.hidden_size;
  for (int64_t e = 0; e < form_.num_experts; ++e) {
    for (int half = 0; half < halves(); ++half) {
      const TensorView w1 = w1_part(from, half);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < d; ++c) read.w1[half].at(e, i, c) = get(w1, {e, i, c});
      if (form_.bias == Bias::none) continue;
      const TensorView b1 = b1_part(from, half);
      for (int64_t i = 0; i < n; ++i) read.b1[half].at(e, i, 0) = get(b1, {e, i});
    }
    for (int64_t c = 0; c < d; ++c) {
      for (int64_t i = 0; i < n; ++i)
        read.w2.at(e, c, i) = output_major ? get(from.w2, {e, c, i}) : get(from.w2, {e, i, c});
      if (form_.bias == Bias::both) read.b2.at(e, c, 0) = get(from.b2, {e, c});
    }
  }
  return read;
}

void LayerCall::check_weight_grads() const {
  const DenseWeights got = read_weights(grads_.views());
  const DenseWeights& made = expected_.grads;
  struct Named {
    const char* name;
    const Array3 &got, &made, &prior;
    bool used;
  };
  const bool biases = form_.bias == Bias::both;
  const bool gated = halves() == 2;
  const Named arrays[] = {
      {"dw1 half 0", got.w1[0], made.w1[0], prior_.w1[0], true},
      {"dw1 half 1", got.w1[1], made.w1[1], prior_.w1[1], gated},
      {"dw2", got.w2, made.w2, prior_.w2, true},
      {"db1 half 0", got.b1[0], made.b1[0], prior_.b1[0], biases},
      {"db1 half 1", got.b1[1], made.b1[1], prior_.b1[1], biases && gated},
      {"db2", got.b2, made.b2, prior_.b2, biases},
  };
  const size_t experts = static_cast<size_t>(form_.num_experts);
  for (const Named& array : arrays) {
    if (!array.used) continue;
    Compared compared;
    for (size_t i = 0; i < array.got.values.size(); ++i) {
      const size_t expert = i / (array.got.values.size() / experts);
      const bool frozen = form_.training == Training::some_frozen && expert % 2 == 1;
      if (frozen) {
        EXPECT_EQ(array.got.values[i], array.prior.values[i]) << array.name << " of a frozen one";
        continue;
      }
      const double before = form_.mode == GradMode::accumulate ? array.prior.values[i] : 0.0;
      compared.got.push_back(array.got.values[i]);
      compared.expected.push_back(before + array.made.values[i]);
    }
    expect_close(compared.got, compared.expected, cases::tolerance::end_to_end(form_.dtype),
                 array.name);
  }
  for (const Tensor* tensor :
       {&grads_.w1, &grads_.w1_up, &grads_.w2, &grads_.b1, &grads_.b1_up, &grads_.b2})
    if (tensor->view().present()) {
      EXPECT_TRUE(tensor->block().guards_intact());
    }
}

void LayerCall::check_forward() const {
  check_rows("output", output_, expected_.output, expected_.slot_output);
  EXPECT_TRUE(forward_block_.guards_intact()) << "forward workspace";
  if (h_.view().present()) {
    EXPECT_TRUE(h_.block().guards_intact()) << "h";
  }
}

void LayerCall::check_backward() const {
  check_rows("dx", dx_, expected_.dx, expected_.slot_dx);
  check_scores();
  check_weight_grads();
  for (const Block* block : {&backward_block_, &data_block_, &weights_block_})
    EXPECT_TRUE(block->guards_intact()) << "backward workspace";
}

std::vector<std::vector<uint8_t>> LayerCall::result_bytes() const {
  std::vector<std::vector<uint8_t>> bytes;
  for (const Tensor* tensor : {&output_, &dx_, &dscores_, &grads_.w1, &grads_.w1_up, &grads_.w2,
                               &grads_.b1, &grads_.b1_up, &grads_.b2})
    bytes.push_back(tensor->block().contents());
  return bytes;
}

}  // namespace penstock::test
