// SPDX-License-Identifier: Apache-2.0
//
// penstock_cuda_check: every CUDA product against float64 on hostile shapes, then timings.
// Usage: penstock_cuda_check [quick | check | sanitize | time [T d n E K] | profile | all]. Exit
// status 1 if a check failed.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "backends/cuda/check/checks.h"

namespace penstock::cuda::check {
namespace {

struct NamedShape {
  const char* name;
  LayerShape shape;
};

const NamedShape kShapes[] = {
    {"tiny", {5, 8, 8, 3, 2}},
    {"odd", {67, 72, 40, 4, 3}},
    {"tail", {257, 136, 200, 7, 2}},
    {"empty", {300, 264, 136, 9, 1, Load::skewed}},
    {"one expert", {333, 256, 320, 9, 2, Load::one_expert}},
    {"many experts", {400, 128, 96, 70, 4}},
    {"medium", {1500, 512, 256, 8, 4, Load::uniform, 0}},
    // Few rows: wide tiles that fill the chip, and narrow ones where they would not.
    {"many tiles", {400, 264, 200, 70, 4}},
    {"one token", {1, 1096, 328, 64, 8, Load::uniform, 0}},
};

CheckCase make_case(const NamedShape& shape, DType dtype, const Variant& variant) {
  static const char* const kLayouts[] = {"concatenated", "interleaved", "separate", "input_major"};
  std::string name = std::string(shape.name) + " " + std::string(name_of(dtype)) + " act" +
                     std::to_string(static_cast<int>(variant.activation)) + " " +
                     kLayouts[static_cast<int>(variant.layout)] + (variant.bias ? " bias" : "") +
                     (variant.mode == GradMode::accumulate ? " accumulate" : "") +
                     (variant.fp32_gradients ? " fp32-grads" : "") +
                     (variant.values == Values::integers ? " integers" : "");
  return {name, dtype, shape.shape, variant};
}

void check_everything(Report& report) {
  check_options(report);
  int turn = 0;
  for (const NamedShape& shape : kShapes) {
    for (const DType dtype : {DType::bfloat16, DType::float16}) {
      for (const Layout layout :
           {Layout::concatenated, Layout::interleaved, Layout::separate, Layout::input_major}) {
        // Every combination of bias, mode, gradient type and activation comes by turns.
        Variant variant;
        variant.layout = layout;
        variant.activation = static_cast<Activation>(turn % 9);
        variant.bias = turn % 2 == 0;
        variant.mode = turn % 3 == 0 ? GradMode::accumulate : GradMode::overwrite;
        variant.fp32_gradients = turn % 4 < 2;
        check_layer(report, make_case(shape, dtype, variant));
        ++turn;
        variant.activation = Activation::swiglu;
        variant.mode = GradMode::overwrite;
        check_layer(report, make_case(shape, dtype, variant));
      }
      Variant exact;
      exact.values = Values::integers;
      exact.activation = Activation::relu;
      check_layer(report, make_case(shape, dtype, exact));
    }
  }
  for (const DType dtype : {DType::bfloat16, DType::float16}) {
    check_router(report, dtype, 1000, 264, 61);
    check_router(report, dtype, 3000, 512, 128);
    check_router(report, dtype, 3, 64, 7);
    check_router(report, dtype, 40, 1288, 96);  // few tokens, more k tiles than the ring's stages
  }
}

// The first sign of life: one product after the other on one shape, with what fails named.
void check_quickly(Report& report) {
  check_layer(report, make_case(kShapes[6], DType::bfloat16, {}));
  Variant exact;
  exact.values = Values::integers;
  exact.activation = Activation::relu;
  check_layer(report, make_case(kShapes[6], DType::bfloat16, exact));
}

// Small enough for compute-sanitizer: tails, empty experts, both weight orders, every option.
void check_briefly(Report& report) {
  for (const NamedShape& shape : {kShapes[1], kShapes[2], kShapes[3]}) {
    check_layer(report, make_case(shape, DType::bfloat16, {}));
    check_layer(report, make_case(shape, DType::float16,
                                  {.activation = Activation::gelu, .layout = Layout::input_major}));
  }
  check_options(report);
  check_router(report, DType::float16, 300, 136, 61);
}

const NamedShape kTimed[] = {
    {"7B-n256", {24576, 1536, 256, 128, 8, Load::uniform, 0}},
    {"olmoe", {32768, 2048, 1024, 64, 8, Load::uniform, 0}},
    {"small-T", {1024, 2048, 1024, 64, 8, Load::uniform, 0}},
};

void time_everything() {
  for (const NamedShape& timed : kTimed) time_products(timed.name, timed.shape);
}

// The shape that five words give.
void time_shape(char** words) {
  const auto size = [&](int index) { return std::strtoll(words[index], nullptr, 10); };
  const std::string name = std::string(words[1]) + "," + words[2];  // d and n
  time_products(name.c_str(), {size(0), size(1), size(2), size(3), size(4), Load::uniform, 0});
}

int run(const char* what) {
  Report report;
  const bool all = std::strcmp(what, "all") == 0;
  if (all || std::strcmp(what, "quick") == 0) check_quickly(report);
  if (all || std::strcmp(what, "check") == 0) check_everything(report);
  if (std::strcmp(what, "sanitize") == 0) check_briefly(report);
  if (all || std::strcmp(what, "time") == 0) time_everything();
  if (std::strcmp(what, "profile") == 0) launch_products(kTimed[0].shape);
  report.summarise();
  return report.clean() ? 0 : 1;
}

}  // namespace
}  // namespace penstock::cuda::check

int main(int argc, char** argv) {
  try {
    if (argc == 7 && std::strcmp(argv[1], "time") == 0) {
      penstock::cuda::check::time_shape(argv + 2);
      return 0;
    }
    return penstock::cuda::check::run(argc > 1 ? argv[1] : "all");
  } catch (const std::exception& error) {
    std::printf("stopped: %s\n", error.what());
    return 2;
  }
}
