// SPDX-License-Identifier: Apache-2.0
//
// Verdicts of the check program: one line per comparison that fails, a summary per stage.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "backends/cuda/check/reference.cuh"

namespace penstock::cuda::check {

// The numbers contract by stored type; dS has its own.
struct Tolerance {
  double overall;
  static Tolerance bf16() { return {2.0e-3}; }
  static Tolerance fp16() { return {2.6e-4}; }
  static Tolerance fp32() { return {2.0e-6}; }
  static Tolerance score_gradient() { return {1.0e-5}; }
};

class Report {
 public:
  // Prints the failing comparison; with integer inputs every element must be exact.
  template <typename E>
  void judge(const std::string& stage, const std::string& where, const Compared& compared,
             Tolerance tolerance, Values values);

  // A relative error measured elsewhere.
  void record(const std::string& stage, const std::string& where, double error,
              Tolerance tolerance);

  void fail(const std::string& stage, const std::string& where, const std::string& what);
  void summarise() const;
  bool clean() const { return failures_ == 0; }

 private:
  struct Stage {
    int64_t checks = 0;
    int64_t failures = 0;
    double worst = 0.0;        // of overall / tolerance
    double worst_local = 0.0;  // of row or block / tolerance
  };
  std::map<std::string, Stage> stages_;
  int64_t failures_ = 0;
};

}  // namespace penstock::cuda::check
