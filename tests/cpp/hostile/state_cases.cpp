// SPDX-License-Identifier: Apache-2.0
//
// Hostile cases 18, 26, 27, 28 and 34: calls at once, in other company, again, on top of earlier
// gradients, and in a forked child. Everywhere the question is the same: are the bits the same?
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "call.h"

namespace penstock::hostile {
namespace {

class HostileState : public Hostile {};

TEST_P(HostileState, Case18_host_threads_at_once) {
  std::vector<Layer> layers;
  std::vector<std::map<std::string, Bytes>> serial;
  for (const cases::Shape& shape : cases::case_18::shapes)
    layers.push_back(make_layer(shape, dtype()));
  for (const Layer& layer : layers) {
    Call call(layer, context());
    call.run();
    serial.push_back(call.all_results());
  }
  std::atomic<int> differing{0};
  const auto work = [&](size_t first) {
    for (int64_t i = 0; i < cases::case_18::calls_each; ++i) {
      const size_t which = (first + static_cast<size_t>(i)) % layers.size();
      Call call(layers[which], context(1 + static_cast<int32_t>(i % 3)));
      call.run();
      if (call.all_results() != serial[which]) ++differing;
    }
  };
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < cases::case_18::host_threads; ++t)
    threads.emplace_back(work, static_cast<size_t>(t));
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(differing.load(), 0);
}

TEST_P(HostileState, Case18_two_calls_share_their_weights) {
  const Layer layer = make_layer(cases::case_18::shapes[0], dtype());
  Call owner(layer, context()), guest(layer, context());
  guest.forward_args.weights = guest.backward_args.weights = owner.forward_args.weights;
  Call serial(layer, context());
  serial.run();
  std::thread other([&] { guest.run(); });
  owner.run();
  other.join();
  expect_same_bits(owner.all_results(), serial.all_results());
  expect_same_bits(guest.all_results(), serial.all_results());
}

TEST_P(HostileState, Case18_thread_count_does_not_show) {
  const Layer layer = make_layer(cases::case_18::shapes[0], dtype());
  Call one(layer, context(1));
  one.run();
  for (int32_t threads : {0, 2, 3, 8}) {
    Call call(layer, context(threads));
    call.run();
    expect_same_bits(call.all_results(), one.all_results());
  }
}

TEST_P(HostileState, Case26_a_token_alone_and_in_a_batch) {
  const Layer batch = make_layer(cases::case_26::shape, dtype());
  const size_t d = static_cast<size_t>(batch.shape.hidden_size);
  const size_t K = static_cast<size_t>(batch.shape.top_k);
  Call together(batch, context());
  together.run();
  for (int64_t token : cases::case_26::tokens) {
    SCOPED_TRACE(token);
    const size_t t = static_cast<size_t>(token);
    Layer alone = batch;
    alone.shape.num_tokens = 1;
    alone.x.assign(batch.x.begin() + token * static_cast<int64_t>(d),
                   batch.x.begin() + (token + 1) * static_cast<int64_t>(d));
    alone.d_output.assign(batch.d_output.data() + t * d, batch.d_output.data() + (t + 1) * d);
    alone.scores.assign(batch.scores.data() + t * K, batch.scores.data() + (t + 1) * K);
    alone.ids.assign(batch.ids.data() + t * K, batch.ids.data() + (t + 1) * K);
    Call call(alone, context());
    call.run();
    for (const char* name : {"output", "dx", "dscores"}) {
      const Bytes one = call.bytes(name), all = together.bytes(name);
      EXPECT_TRUE(
          std::equal(one.begin(), one.end(), all.begin() + static_cast<int64_t>(t * one.size())))
          << name;
    }
  }
}

TEST_P(HostileState, Case27_recomputation_and_backward_twice) {
  Layer layer = make_layer(cases::case_27::shape, dtype());
  Call call(layer, context());
  call.run();
  const auto first = call.all_results();
  call.backward();
  expect_same_bits(call.all_results(), first);
  call.forward();
  expect_same_bits(call.all_results(), first);

  layer.config.save = SavePolicy::input;
  Call recomputing(layer, context());
  recomputing.run();
  expect_same_bits(recomputing.all_results(), first);
}

TEST_P(HostileState, Case27_inference_keeps_nothing) {
  Layer layer = make_layer(cases::case_27::shape, dtype());
  Call training(layer, context());
  training.run();
  layer.config.save = SavePolicy::nothing;
  Call inference(layer, context());
  inference.build_plan();
  inference.forward();
  EXPECT_TRUE(inference.bytes("output") == training.bytes("output"));
  const auto before = inference.all_results();
  Buffer space(1 << 20);
  inference.backward_args.workspace = {space.data(), space.bytes()};
  error_of([&] { experts_backward(inference.backward_args, context()); },
           ErrorCode::invalid_argument);
  expect_same_bits(inference.all_results(), before);
}

constexpr const char* kGradients[] = {"dw1", "dw2", "db1", "db2"};

TensorView& gradient(ExpertWeights& into, const std::string& name) {
  if (name == "dw1") return into.w1;
  if (name == "dw2") return into.w2;
  return name == "db1" ? into.b1 : into.b2;
}

TEST_P(HostileState, Case28_accumulates_into_main_grad) {
  const Layer layer = make_layer(cases::case_28::shape, dtype());
  const DType wide = accumulator_of(dtype());  // main_grad of bf16 and fp16 weights is fp32
  Call plain(layer, context()), call(layer, context());
  plain.run();
  const Results expected = statement(layer);
  std::map<std::string, Buffer> sums;
  for (const char* name : kGradients) {
    TensorView& view = gradient(call.backward_args.weight_grads.into, name);
    Buffer& buffer = sums[name] = Buffer(view.numel() * size_of(wide));
    store(std::vector<double>(static_cast<size_t>(view.numel()), 3.0), wide, buffer.data());
    view.data = buffer.data();
    view.dtype = wide;
  }
  call.backward_args.weight_grads.mode = GradMode::accumulate;
  call.run();
  call.backward();  // twice: 3 + 2 dW
  const auto check = [&](const char* name, std::vector<double> gradient_values) {
    for (double& value : gradient_values) value = 3.0 + 2.0 * value;
    const Buffer& sum = sums[name];
    const auto got = loaded(sum.data(), static_cast<int64_t>(gradient_values.size()), wide);
    EXPECT_LE(relative_l2(got, gradient_values), bound_for(got.size(), dtype())) << name;
    EXPECT_TRUE(sum.guards_intact());
  };
  check("dw1", expected.dw1);
  check("dw2", expected.dw2);
  check("db1", expected.db1);
  check("db2", expected.db2);
}

void check_frozen(const Layer& layer, GradMode mode, const Context& context) {
  Call call(layer, context, 0x11);  // 0x1111...: a small finite value in every type
  Call reference(layer, context, 0x11);
  reference.backward_args.weight_grads.mode = mode;
  reference.run();
  const int64_t E = layer.shape.num_experts;
  Buffer trainable(E, 1);
  for (int64_t e : cases::case_28::frozen) trainable.data()[e] = 0;
  call.backward_args.weight_grads.trainable =
      TensorView::contiguous(trainable.data(), DType::uint8, {E});
  call.backward_args.weight_grads.mode = mode;
  const auto before = call.all_results();
  call.run();
  for (const char* name : kGradients) {
    const Bytes got = call.bytes(name), full = reference.bytes(name), old = before.at(name);
    const int64_t length = static_cast<int64_t>(got.size()) / E;
    for (int64_t e = 0; e < E; ++e) {
      const Bytes& expected = trainable.data()[e] != 0 ? full : old;
      EXPECT_TRUE(std::equal(got.begin() + e * length, got.begin() + (e + 1) * length,
                             expected.begin() + e * length))
          << name << " of expert " << e;
    }
  }
  EXPECT_TRUE(call.bytes("dx") == reference.bytes("dx"));  // frozen weights still pass gradients on
}

TEST_P(HostileState, Case28_frozen_experts) {
  const Layer layer = make_layer(cases::case_28::shape, dtype());
  check_frozen(layer, GradMode::overwrite, context());
  check_frozen(layer, GradMode::accumulate, context());
}

#if defined(__SANITIZE_THREAD__)
constexpr bool kForkWorks = false;  // ThreadSanitizer refuses threads in a forked child
#else
constexpr bool kForkWorks = true;
#endif

TEST_P(HostileState, Case34_fork) {
  if (!kForkWorks) GTEST_SKIP() << "ThreadSanitizer does not follow a forked child";
  const Layer layer = make_layer(cases::case_34::shape, dtype());
  Call call(layer, context());
  call.run();  // whatever the library keeps (threads) exists before the fork
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(static_cast<unsigned>(cases::case_34::timeout_s));  // a hang ends in a signal
    Call again(layer, context());
    again.run();
    _exit(again.all_results() == call.all_results() ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status)) << "the child ended by signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0) << "other bits in the child";
  Call after(layer, context());
  after.run();
  expect_same_bits(after.all_results(), call.all_results());
}

PENSTOCK_EVERY_DOOR(HostileState);

}  // namespace
}  // namespace penstock::hostile
