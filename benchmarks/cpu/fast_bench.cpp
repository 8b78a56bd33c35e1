// SPDX-License-Identifier: Apache-2.0
//
// Checks, then times, the fast CPU backend operation by operation, on one instruction set or on
// every one that the processor has:
//
//   penstock_fast_bench [ISA|all] [THREADS] [fp32|bf16|fp16] [T,d,n,E,K ...]
//
// Prints GFLOP/s per product and for the layer (6 R n d forward, 12 R n d backward).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "backends/cpu/fast/fast_backend.h"
#include "layer.h"

namespace penstock::cpu::fast_test {
namespace {

struct Options {
  std::vector<fast::Isa> isas = {fast::best_isa()};
  int32_t threads = 2;
  DType dtype = DType::float32;
  std::vector<LayerSpec> shapes;
};

LayerSpec shape(int64_t tokens, int64_t hidden, int64_t intermediate, int64_t experts,
                int64_t top_k) {
  LayerSpec spec;
  spec.tokens = tokens;
  spec.hidden = hidden;
  spec.intermediate = intermediate;
  spec.experts = experts;
  spec.top_k = top_k;
  return spec;
}

Options parse(int argc, char** argv) {
  Options options;
  if (argc > 1 && std::strcmp(argv[1], "all") == 0) options.isas = fast::supported_isas();
  for (fast::Isa isa : fast::supported_isas())
    if (argc > 1 && std::strcmp(argv[1], fast::name_of(isa)) == 0) options.isas = {isa};
  if (argc > 2) options.threads = std::atoi(argv[2]);
  if (argc > 3 && std::strcmp(argv[3], "bf16") == 0) options.dtype = DType::bfloat16;
  if (argc > 3 && std::strcmp(argv[3], "fp16") == 0) options.dtype = DType::float16;
  for (int i = 4; i < argc; ++i) {
    long long size[5];
    if (std::sscanf(argv[i], "%lld,%lld,%lld,%lld,%lld", &size[0], &size[1], &size[2], &size[3],
                    &size[4]) == 5)
      options.shapes.push_back(shape(size[0], size[1], size[2], size[3], size[4]));
  }
  if (options.shapes.empty())
    options.shapes = {shape(2048, 512, 256, 32, 4), shape(4096, 768, 256, 64, 8),
                      shape(512, 1024, 512, 16, 2)};
  return options;
}

double milliseconds(const Operation& operation, Layer& layer, const Runner& runner) {
  const auto begin = std::chrono::steady_clock::now();
  operation.run(layer, runner);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

// Multiply-adds of an operation, in units of R n d.
int products(const char* name) {
  const std::string operation = name;
  if (operation == "up_projection" || operation == "up_backward") return 2;
  if (operation == "down_projection" || operation == "down_backward") return 1;
  return operation == "weight_gradient" ? 3 : 0;
}

int check(const LayerSpec& large, const Backend& backend, int32_t threads) {
  LayerSpec spec = large;
  spec.tokens = std::min<int64_t>(spec.tokens, 64);  // the reference is slow
  spec.experts = std::min<int64_t>(spec.experts, 4);
  spec.top_k = std::min<int64_t>(spec.top_k, 2);
  Layer layer(spec);
  int failures = 0;
  for (const Operation& operation : operations()) {
    const std::string wrong = check_operation(layer, operation, {&backend, threads});
    if (wrong.empty()) continue;
    std::printf("WRONG %s\n", wrong.c_str());
    ++failures;
  }
  return failures;
}

void time_layer(const LayerSpec& spec, const Backend& backend, int32_t threads) {
  Layer layer(spec);
  const Runner runner = {&backend, threads};
  constexpr int kRepetitions = 5;
  std::vector<std::vector<double>> times(operations().size());
  for (int repetition = 0; repetition <= kRepetitions; ++repetition) {
    for (size_t i = 0; i < operations().size(); ++i) {
      const double time = milliseconds(operations()[i], layer, runner);
      if (repetition > 0) times[i].push_back(time);
    }
  }
  const double rows = layer.offsets.get(spec.experts);
  const double unit = 2e-6 * rows * static_cast<double>(spec.intermediate * spec.hidden);
  double total = 0.0;
  for (size_t i = 0; i < times.size(); ++i) {
    std::sort(times[i].begin(), times[i].end());
    const double median = times[i][kRepetitions / 2];
    total += median;
    std::printf("  %-24s %9.3f ms", operations()[i].name, median);
    const int count = products(operations()[i].name);
    if (count > 0) std::printf("  %7.1f GFLOP/s", count * unit / median);
    std::printf("\n");
  }
  std::printf("  %-24s %9.3f ms  %7.1f GFLOP/s\n", "layer", total, 9 * unit / total);
}

int run(const Options& options) {
  int failures = 0;
  for (fast::Isa isa : options.isas) {
    const Backend backend = fast_backend_on(isa);
    for (LayerSpec spec : options.shapes) {
      spec.dtype = options.dtype;
      std::printf("%s, %d threads, %s\n", fast::name_of(isa), options.threads,
                  spec.name().c_str());
      failures += check(spec, backend, options.threads);
      time_layer(spec, backend, options.threads);
      std::fflush(stdout);
    }
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace penstock::cpu::fast_test

int main(int argc, char** argv) {
  return penstock::cpu::fast_test::run(penstock::cpu::fast_test::parse(argc, argv));
}
