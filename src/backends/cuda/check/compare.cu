// SPDX-License-Identifier: Apache-2.0
//
// Applies the numbers contract on the device and keeps the score.
#include <algorithm>
#include <cstdio>

#include "backends/cuda/check/compare.h"

namespace penstock::cuda::check {
namespace {

// Half the distance of E's subnormals, which rounding alone may cost an element. A weight gradient
// of one token has whole rows that are subnormal in fp16.
template <typename E>
constexpr double kHalfSubnormal = 0.0;
template <>
constexpr double kHalfSubnormal<__half> = 0x1p-25;

// `free` of each squared error is what rounding alone may cost.
double worst_ratio(const std::vector<double>& error, const std::vector<double>& norm, double free) {
  double worst = 0.0;
  for (size_t i = 0; i < error.size(); ++i) {
    if (error[i] <= free) continue;
    worst = std::max(worst, std::sqrt((error[i] - free) / std::max(norm[i], 1e-300)));
  }
  return worst;
}

double total(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum;
}

}  // namespace

template <typename E>
void Report::judge(const std::string& stage, const std::string& where, const Compared& compared,
                   Tolerance tolerance, Values values) {
  DeviceArray<double> row_error(compared.rows), row_norm(compared.rows);
  const int64_t blocks = (compared.columns + 15) / 16;
  DeviceArray<double> block_error(blocks), block_norm(blocks);
  DeviceArray<double> rounding(1);
  DeviceArray<unsigned long long> counters(2);
  for (auto* array : {&row_error, &row_norm, &block_error, &block_norm, &rounding}) array->zero();
  counters.zero();
  compare<E><<<1024, 256>>>(
      compared, {row_error.data(), row_norm.data(), block_error.data(), block_norm.data(),
                 rounding.data(), counters.data(), counters.data() + 1});
  require(cudaDeviceSynchronize(), (stage + " " + where).c_str());
  const auto errors = row_error.host(), norms = row_norm.host();
  const auto count = counters.host();
  const double error = total(errors), norm = total(norms);
  const double overall = error == 0.0 ? 0.0 : std::sqrt(error / std::max(norm, 1e-300));
  // A handful of elements, or elements below the type's normal range, may round worse than the
  // contract; then the reference's own rounding is the measure.
  const double best = std::sqrt(rounding.host()[0] / std::max(norm, 1e-300));
  const double allowed = std::max(tolerance.overall, 1.2 * best);
  const double element = kHalfSubnormal<E> * kHalfSubnormal<E>;
  const double local =
      std::max(worst_ratio(errors, norms, element * static_cast<double>(compared.columns)),
               worst_ratio(block_error.host(), block_norm.host(),
                           element * 16 * static_cast<double>(compared.rows)));
  Stage& entry = stages_[stage];
  ++entry.checks;
  const bool exact_wanted = values == Values::integers;
  if (!exact_wanted) {
    entry.worst = std::max(entry.worst, overall / allowed);
    entry.worst_local = std::max(entry.worst_local, local / allowed);
  }
  const bool good =
      count[1] == 0 && (exact_wanted ? count[0] == 0 : overall <= allowed && local <= 4 * allowed);
  if (good) return;
  fail(stage, where,
       "rel L2 " + std::to_string(overall * 1e3) + "e-3, worst row or block " +
           std::to_string(local * 1e3) + "e-3, not exact " + std::to_string(count[0]) +
           ", NaN or guard " + std::to_string(count[1]) + " of " +
           std::to_string(compared.rows * compared.columns));
}

void Report::record(const std::string& stage, const std::string& where, double error,
                    Tolerance tolerance) {
  Stage& entry = stages_[stage];
  ++entry.checks;
  entry.worst = std::max(entry.worst, error / tolerance.overall);
  if (!(error <= tolerance.overall))
    fail(stage, where, "rel L2 " + std::to_string(error * 1e6) + "e-6");
}

void Report::fail(const std::string& stage, const std::string& where, const std::string& what) {
  ++stages_[stage].failures;
  if (++failures_ <= 60)
    std::printf("FAIL %-16s %s: %s\n", stage.c_str(), where.c_str(), what.c_str());
  std::fflush(stdout);
}

void Report::summarise() const {
  std::printf("%-18s %8s %8s %14s %14s\n", "stage", "checks", "failed", "worst/contract",
              "worst local/c.");
  for (const auto& [name, stage] : stages_) {
    std::printf("%-18s %8lld %8lld %14.3f %14.3f\n", name.c_str(),
                static_cast<long long>(stage.checks), static_cast<long long>(stage.failures),
                stage.worst, stage.worst_local);
  }
}

template void Report::judge<__nv_bfloat16>(const std::string&, const std::string&, const Compared&,
                                           Tolerance, Values);
template void Report::judge<__half>(const std::string&, const std::string&, const Compared&,
                                    Tolerance, Values);
template void Report::judge<float>(const std::string&, const std::string&, const Compared&,
                                   Tolerance, Values);

}  // namespace penstock::cuda::check
