// SPDX-License-Identifier: Apache-2.0
//
// The threads: every task once, calls from several host threads at once, and a forked child.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "backends/cpu/fast/fast_backend.h"
#include "backends/cpu/fast/thread_team.h"
#include "layer.h"

namespace penstock::cpu::fast_test {
namespace {

using fast::parallel_for;

TEST(FastThreads, EveryTaskRunsOnceOnAValidWorker) {
  for (int32_t threads : {1, 2, 3, 7, 40}) {
    for (int64_t tasks : {0, 1, 2, 5, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
      std::vector<std::atomic<int>> busy(static_cast<size_t>(threads));
      std::atomic<int> wrong{0};
      parallel_for(threads, tasks, [&](int64_t task, int32_t worker) {
        if (worker < 0 || worker >= threads || busy[static_cast<size_t>(worker)]++ != 0) ++wrong;
        ++runs[static_cast<size_t>(task)];
        --busy[static_cast<size_t>(worker)];
      });
      EXPECT_EQ(wrong, 0);
      for (const auto& count : runs) EXPECT_EQ(count, 1);
    }
  }
}

TEST(FastThreads, SeveralHostThreadsAtOnce) {
  std::vector<std::thread> hosts;
  std::atomic<int64_t> sum{0};
  for (int host = 0; host < 6; ++host) {
    hosts.emplace_back([&] {
      for (int call = 0; call < 200; ++call)
        parallel_for(3, 10, [&](int64_t task, int32_t) { sum += task; });
    });
  }
  for (std::thread& host : hosts) host.join();
  EXPECT_EQ(sum, 6 * 200 * 45);
}

LayerSpec small_layer() {
  LayerSpec spec;
  spec.tokens = 200;
  spec.hidden = 64;
  spec.intermediate = 64;
  spec.experts = 4;
  spec.top_k = 2;
  return spec;
}

TEST(FastThreads, LayersOnSeveralHostThreadsGiveTheSameBits) {
  Layer expected(small_layer());
  run_all(expected, {&fast_backend(), 1});
  std::vector<Layer> layers(4, Layer(small_layer()));
  std::vector<std::thread> hosts;
  for (Layer& layer : layers)
    hosts.emplace_back([&layer] { run_all(layer, {&fast_backend(), 3}); });
  for (std::thread& host : hosts) host.join();
  for (const Layer& layer : layers) {
    EXPECT_TRUE(layer.output.same_bits(expected.output));
    EXPECT_TRUE(layer.dx.same_bits(expected.dx));
    EXPECT_TRUE(layer.dw1.same_bits(expected.dw1));
  }
}

// The child has only the thread that forked; the parent's helpers must not be waited for.
TEST(FastThreads, AForkedChildComputesTheSame) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer ends a child that starts threads after a fork";
#endif
  Layer expected(small_layer());
  run_all(expected, {&fast_backend(), 3});
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);  // ends the child if it hangs
    Layer layer(small_layer());
    run_all(layer, {&fast_backend(), 3});
    _exit(layer.dw1.same_bits(expected.dw1) && layer.output.same_bits(expected.output) ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  Layer again(small_layer());  // and the parent's team is still there
  run_all(again, {&fast_backend(), 3});
  EXPECT_TRUE(again.output.same_bits(expected.output));
}

TEST(FastThreads, CountIsTheRequestOrTheCoresAllowed) {
  EXPECT_EQ(fast::thread_count(5), 5);
  EXPECT_GE(fast::thread_count(0), 1);
}

TEST(FastBackend, SaysWhatItRuns) {
  const Backend& backend = fast_backend();
  EXPECT_EQ(backend.why_not_dtype(DType::float32), "");
  EXPECT_EQ(backend.why_not_dtype(DType::bfloat16), "");
  EXPECT_EQ(backend.why_not_dtype(DType::float16), "");
  EXPECT_NE(backend.why_not_dtype(DType::float64).find("reference"), std::string::npos);
  EXPECT_NE(backend.why_not_dtype(DType::int32), "");
  ExpertsProblem problem = small_layer().problem();
  EXPECT_EQ(backend.why_not(problem), "");
  problem.device.type = DeviceType::cuda;
  EXPECT_NE(backend.why_not(problem).find("cuda"), std::string::npos);
}

}  // namespace
}  // namespace penstock::cpu::fast_test
