// SPDX-License-Identifier: Apache-2.0
//
// Times each product on its own: CUDA events, the L2 cleared before every run, medians.
#include <cstdio>
#include <functional>

#include "backends/cuda/check/checks.h"

namespace penstock::cuda::check {
namespace {

class Timer {
 public:
  Timer() : flush_(int64_t{192} << 20) {
    require(cudaEventCreate(&begin_), "event");
    require(cudaEventCreate(&end_), "event");
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }

  float median_ms(const std::function<void()>& launch) {
    constexpr int kRuns = 9;
    launch();
    launch();
    std::vector<float> times;
    for (int run = 0; run < kRuns; ++run) {
      flush_.zero();
      require(cudaEventRecord(begin_), "event");
      launch();
      require(cudaEventRecord(end_), "event");
      require(cudaEventSynchronize(end_), "timed run");
      float ms = 0.0f;
      require(cudaEventElapsedTime(&ms, begin_, end_), "event");
      times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[kRuns / 2];
  }

 private:
  DeviceArray<uint8_t> flush_;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

}  // namespace

// One launch of each, for a profiler.
void launch_products(const LayerShape& shape) {
  Layer<__nv_bfloat16> layer(shape, {}, 5);
  launch_up_projection(layer.up_args(), {});
  launch_down_projection(layer.down_args(), {});
  launch_down_backward(layer.down_backward_args(), {});
  launch_up_backward(layer.up_backward_args(), {});
  launch_weight_gradient(layer.dw1_args(), {});
  launch_weight_gradient(layer.dw2_args(), {});
  require(cudaDeviceSynchronize(), "profile");
}

void time_products(const char* name, const LayerShape& shape) {
  using Element = __nv_bfloat16;
  Layer<Element> layer(shape, {}, 5);
  Timer timer;
  const double rows = static_cast<double>(shape.tokens * shape.top_k);
  const double product = 2.0 * rows * static_cast<double>(shape.d * shape.n);
  const double r2 = 2.0 * rows;
  const double d = static_cast<double>(shape.d), n = static_cast<double>(shape.n);
  const double weights = 2.0 * static_cast<double>(shape.experts) * d * n;
  const double tokens = 2.0 * static_cast<double>(shape.tokens) * d;
  struct Row {
    const char* what;
    double flop, bytes;
    std::function<void()> launch;
  };
  // Bytes: each tensor once, gathered rows as if every token were read once.
  const Row table[] = {
      {"up_projection", 2 * product, tokens + 2 * weights + r2 * 3 * n,
       [&] { launch_up_projection(layer.up_args(), {}); }},
      {"down_projection", product, r2 * n + weights + r2 * d,
       [&] { launch_down_projection(layer.down_args(), {}); }},
      {"down_backward", product, tokens + weights + r2 * 5 * n,
       [&] { launch_down_backward(layer.down_backward_args(), {}); }},
      {"up_backward", 2 * product, r2 * 2 * n + 2 * weights + r2 * d,
       [&] { launch_up_backward(layer.up_backward_args(), {}); }},
      {"weight_gradient 1", 2 * product, r2 * 2 * n + tokens + 2 * weights,
       [&] { launch_weight_gradient(layer.dw1_args(), {}); }},
      {"weight_gradient 2", product, r2 * n + tokens + weights,
       [&] { launch_weight_gradient(layer.dw2_args(), {}); }},
  };
  double sum = 0.0, flop = 0.0;
  for (const Row& row : table) {
    const double ms = timer.median_ms(row.launch);
    std::printf("time %-12s %-18s %8.3f ms %7.1f TFLOP/s %7.0f GB/s\n", name, row.what, ms,
                row.flop / ms * 1e-9, row.bytes / ms * 1e-6);
    sum += ms;
    flop += row.flop;
  }
  std::printf("time %-12s %-18s %8.3f ms %7.1f TFLOP/s\n", name, "all six", sum, flop / sum * 1e-9);
  std::fflush(stdout);
}

}  // namespace penstock::cuda::check
