// SPDX-License-Identifier: Apache-2.0
//
// Hostile cases 13 to 17 and 22: strides, alignment, dtypes, devices, workspaces.
#include <algorithm>
#include <cstring>

#include "call.h"

namespace penstock::hostile {
namespace {

class HostileMemory : public Hostile {};

TEST_P(HostileMemory, Case13_padded_rows_of_x) {
  const Layer layer = make_layer(cases::case_13::shape, dtype());
  const int64_t T = layer.shape.num_tokens, d = layer.shape.hidden_size;
  const int64_t wide = d + cases::case_13::padding, size = size_of(dtype());
  Call plain(layer, context());
  plain.run();

  // X and dO as columns [3, 3 + d) of wider tensors that are NaN elsewhere.
  Buffer wide_x(T * wide * size, 0xFF), wide_d_output(T * wide * size, 0xFF);
  Call call(layer, context());
  const auto widen = [&](TensorView& view, const Buffer& into) {
    for (int64_t t = 0; t < T; ++t)
      std::memcpy(into.data() + (t * wide + 3) * size,
                  static_cast<uint8_t*>(view.data) + t * d * size, static_cast<size_t>(d * size));
    view.data = into.data() + 3 * size;
    view.strides[0] = wide;
  };
  widen(call.forward_args.x, wide_x);
  widen(call.backward_args.d_output, wide_d_output);
  call.backward_args.x = call.forward_args.x;
  call.run();
  expect_same_bits(call.all_results(), plain.all_results());
  EXPECT_TRUE(call.guards_intact());
}

TEST_P(HostileMemory, Case13_expanded_x) {
  Layer layer = make_layer(cases::case_13::shape, dtype());
  const int64_t T = layer.shape.num_tokens, d = layer.shape.hidden_size;
  for (int64_t t = 1; t < T; ++t) std::copy_n(layer.x.begin(), d, layer.x.begin() + t * d);
  Call plain(layer, context()), call(layer, context());
  plain.run();
  call.forward_args.x.strides[0] = 0;  // every token reads the first row
  call.backward_args.x = call.forward_args.x;
  call.run();
  expect_same_bits(call.all_results(), plain.all_results());
}

// A tensor (E, rows, cols) stored as (E, cols, rows).
std::vector<double> transposed(const std::vector<double>& values, int64_t rows, int64_t cols) {
  std::vector<double> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t index = static_cast<int64_t>(i), matrix = index / (rows * cols);
    const int64_t row = index / cols % rows, col = index % cols;
    out[static_cast<size_t>(matrix * rows * cols + col * rows + row)] = values[i];
  }
  return out;
}

TEST_P(HostileMemory, Case13_transposed_weights) {
  const Layer layer = make_layer(cases::case_13::shape, dtype());
  const int64_t h = layer.preactivation_size(), d = layer.shape.hidden_size;
  const int64_t n = layer.shape.intermediate_size;
  Call call(layer, context());
  // The same logical (E, h, d), its last axis with stride h: allowed by the header.
  TensorView& w1 = call.forward_args.weights.w1;
  TensorView& w2 = call.forward_args.weights.w2;
  store(transposed(layer.w1, h, d), dtype(), w1.data);
  store(transposed(layer.w2, d, n), dtype(), w2.data);
  w1.strides = {h * d, 1, h};
  w2.strides = {d * n, 1, d};
  call.backward_args.weights = call.forward_args.weights;
  call.run();
  expect_near_statement(call, layer);
}

TEST_P(HostileMemory, Case13_weights_sliced_from_a_bigger_tensor) {
  const Layer layer = make_layer(cases::case_13::shape, dtype());
  Call plain(layer, context()), call(layer, context());
  plain.run();
  TensorView& w1 = call.forward_args.weights.w1;
  const int64_t E = layer.shape.num_experts, length = w1.stride(0), size = size_of(dtype());
  const int64_t stride = length + 2 * cases::case_13::padding;
  Buffer bigger(E * stride * size, 0xFF);
  for (int64_t e = 0; e < E; ++e)
    std::memcpy(bigger.data() + (e * stride + cases::case_13::padding) * size,
                static_cast<uint8_t*>(w1.data) + e * length * size,
                static_cast<size_t>(length * size));
  w1.data = bigger.data() + cases::case_13::padding * size;
  w1.strides[0] = stride;
  call.backward_args.weights = call.forward_args.weights;
  call.run();
  expect_same_bits(call.all_results(), plain.all_results());
}

TEST_P(HostileMemory, Case13_strides_that_are_refused) {
  const Layer layer = make_layer(cases::case_13::shape, dtype());
  Call call(layer, context());
  call.build_plan();
  const auto before = call.all_results();
  const TensorView x = call.forward_args.x, output = call.forward_args.output;
  call.forward_args.x.strides[1] = 2;
  call.forward_args.x.shape[1] = x.shape[1];
  const std::string message =
      error_of([&] { experts_forward(call.forward_args, context()); }, ErrorCode::invalid_argument);
  EXPECT_NE(message.find("x"), std::string::npos) << message;
  call.forward_args.x = x;
  call.forward_args.output.strides[0] = 0;  // every token would write the same row
  error_of([&] { call.forward(); }, ErrorCode::invalid_argument);
  call.forward_args.output = output;
  TensorView& w1 = call.forward_args.weights.w1;
  w1.strides = {w1.strides[0], 3, 2};  // neither of the last two axes is dense
  error_of([&] { call.forward(); }, ErrorCode::invalid_argument);
  expect_same_bits(call.all_results(), before);
}

TEST_P(HostileMemory, Case14_sizes_that_divide_nothing) {
  for (int64_t d : cases::case_14::sizes) {
    for (int64_t n : {int64_t{1}, d, int64_t{17}}) {
      SCOPED_TRACE(::testing::Message() << "d " << d << " n " << n);
      const Layer layer =
          make_layer({"", cases::case_14::num_tokens, d, n, cases::case_14::num_experts,
                      static_cast<int32_t>(cases::case_14::top_k)},
                     dtype());
      Call call(layer, context());
      call.run();
      expect_near_statement(call, layer);
    }
  }
}

TEST_P(HostileMemory, Case14_pointers_off_alignment) {
  const Layer layer = make_layer(cases::case_13::shape, dtype());
  Call plain(layer, context());
  plain.run();
  for (int64_t offset : cases::case_14::offsets) {
    SCOPED_TRACE(offset);
    Call call(layer, context());
    auto& f = call.forward_args;
    auto& b = call.backward_args;
    const bool aligned = offset % size_of(dtype()) == 0;
    f.x = b.x = call.moved("x", f.x, offset);
    if (!aligned) {
      call.build_plan();
      const auto before = call.all_results();
      error_of([&] { call.forward(); }, ErrorCode::invalid_argument);
      expect_same_bits(call.all_results(), before);
      continue;
    }
    f.weights.w1 = b.weights.w1 = call.moved("w1", f.weights.w1, offset);
    f.weights.w2 = b.weights.w2 = call.moved("w2", f.weights.w2, offset);
    f.weights.b1 = b.weights.b1 = call.moved("b1", f.weights.b1, offset);
    f.h = b.h = call.moved("h", f.h, offset);
    f.output = call.moved("output", f.output, offset);
    b.d_output = call.moved("d_output", b.d_output, offset);
    b.dx = call.moved("dx", b.dx, offset);
    b.weight_grads.into.w1 = call.moved("dw1", b.weight_grads.into.w1, offset);
    b.weight_grads.into.w2 = call.moved("dw2", b.weight_grads.into.w2, offset);
    call.run();
    expect_same_bits(call.all_results(), plain.all_results());
    EXPECT_TRUE(call.guards_intact());
  }
}

TEST_P(HostileMemory, Case15_mixed_dtypes) {
  const Layer layer = make_layer(cases::case_15::shape, dtype());
  const DType other = dtype() == DType::bfloat16 ? DType::float32 : DType::bfloat16;
  Call call(layer, context());
  call.build_plan();
  const auto before = call.all_results();
  const TensorView x = call.forward_args.x;
  call.forward_args.x.dtype = other;
  const std::string message =
      error_of([&] { experts_forward(call.forward_args, context()); }, ErrorCode::invalid_argument);
  EXPECT_NE(message.find(name_of(dtype())), std::string::npos) << message;
  EXPECT_NE(message.find(name_of(other)), std::string::npos) << message;
  call.forward_args.x = x;
  call.forward_args.scores.dtype = DType::bfloat16;
  error_of([&] { call.forward(); }, ErrorCode::invalid_argument);
  call.forward_args.scores = call.routing.scores;
  call.forward_args.x.dtype = DType::int32;
  error_of([&] { experts_forward(call.forward_args, context()); }, ErrorCode::invalid_argument);
  call.routing.ids.dtype = DType::float32;
  error_of([&] { call.build_plan(); }, ErrorCode::invalid_argument);
  expect_same_bits(call.all_results(), before);
}

TEST_P(HostileMemory, Case16_operands_on_different_devices) {
  const Layer layer = make_layer(cases::case_16::shape, dtype());
  const Device gpu{DeviceType::cuda, 1};
  Call call(layer, context());
  call.build_plan();
  const auto before = call.all_results();
  const auto refused = [&](TensorView& view) {
    const TensorView original = view;
    view.device = gpu;
    const std::string message = error_of([&] { experts_forward(call.forward_args, context()); },
                                         ErrorCode::invalid_argument);
    EXPECT_NE(message.find("cuda:1"), std::string::npos) << message;
    EXPECT_NE(message.find("cpu"), std::string::npos) << message;
    view = original;
  };
  refused(call.forward_args.weights.w1);
  refused(call.forward_args.weights.b2);
  refused(call.forward_args.output);
  refused(call.forward_args.plan.row_to_token);
  refused(call.forward_args.scores);
  expect_same_bits(call.all_results(), before);
}

TEST_P(HostileMemory, Case17_a_backend_that_is_not_there) {
  const Layer layer = make_layer(cases::case_17::shape, dtype());
  Call call(layer, context());
  call.build_plan();
  const auto before = call.all_results();
  Context named = context();
  const auto forward = [&] { experts_forward(call.forward_args, named); };
  named.backend = "no-such-backend";
  std::string message = error_of(forward, ErrorCode::invalid_argument);
  EXPECT_NE(message.find("no-such-backend"), std::string::npos) << message;
  named.backend = "cuda";  // known by name in every build, so that the reason can be told
  message = error_of(forward, ErrorCode::unsupported);
  EXPECT_NE(message.find("cuda"), std::string::npos) << message;
  EXPECT_FALSE(why_not("cuda", problem_of(call.forward_args)).empty());
  expect_same_bits(call.all_results(), before);
  for (const BackendInfo& info : list_backends()) EXPECT_EQ(info.available, info.reason.empty());
  call.forward();  // the CPU still works
  call.backward();
  expect_near_statement(call, layer);
}

TEST_P(HostileMemory, Case22_workspaces_that_do_not_fit) {
  const Layer layer = make_layer(cases::case_22::shape, dtype());
  Call call(layer, context());
  call.run();
  const int64_t forward_bytes = forward_workspace_bytes(problem_of(call.forward_args), context());
  const int64_t backward_bytes =
      backward_workspace_bytes(problem_of(call.backward_args), context());
  ASSERT_GT(forward_bytes, 0);
  ASSERT_GT(backward_bytes, 0);
  Call other(layer, context());
  other.build_plan();
  const auto before = other.all_results();
  Buffer space(std::max(forward_bytes, backward_bytes) + 64, 0x5A);
  const auto refused = [&](Workspace workspace, int64_t needed) {
    (needed == forward_bytes ? other.forward_args.workspace : other.backward_args.workspace) =
        workspace;
    const std::string message = error_of(
        [&] {
          if (needed == forward_bytes)
            experts_forward(other.forward_args, context());
          else
            experts_backward(other.backward_args, context());
        },
        ErrorCode::invalid_argument);
    if (workspace.bytes < needed) {
      EXPECT_NE(message.find(std::to_string(needed)), std::string::npos) << message;
    }
  };
  for (int64_t needed : {forward_bytes, backward_bytes}) {
    refused({space.data(), needed - 1}, needed);
    refused({nullptr, needed}, needed);
    refused({nullptr, 0}, needed);
    refused({space.data() + 4, needed}, needed);
    refused({space.data() + 32, needed}, needed);
  }
  expect_same_bits(other.all_results(), before);
  const Bytes untouched = space.copy();
  EXPECT_TRUE(std::all_of(untouched.begin(), untouched.end(), [](uint8_t b) { return b == 0x5A; }));
}

PENSTOCK_EVERY_DOOR(HostileMemory);

}  // namespace
}  // namespace penstock::hostile
