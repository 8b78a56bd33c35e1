// SPDX-License-Identifier: Apache-2.0
//
// The choices declared in config.h; nothing here touches a GPU.
#include "backends/cuda/gemm/config.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace penstock::cuda {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tensor-map rows of 16-byte multiples, and 16-byte copies.
constexpr int64_t kGranule = 8;

// Multiprocessors of the chip that choices are made for: a constant, so that they are the same on
// every machine.
constexpr int64_t kMultiprocessors = 132;

}  // namespace

int32_t token_tile(int64_t row_capacity, int64_t num_experts) {
  const double mean = static_cast<double>(row_capacity) / static_cast<double>(num_experts);
  return mean + 2.0 * std::sqrt(mean) <= 64.0 ? 64 : 128;
}

bool narrow_tiles_pay(int64_t row_capacity, int64_t num_experts, int64_t columns,
                      TileWidths widths) {
  if (token_tile(row_capacity, num_experts) != 64) return false;
  // One tile of rows for each expert that can have any.
  const int64_t experts = std::min(num_experts, row_capacity);
  const auto tiles = [&](int64_t width) { return experts * ceil_div(columns, width); };
  const auto most_columns = [&](int64_t width) {
    return ceil_div(tiles(width), kMultiprocessors) * width;
  };
  return tiles(widths.wide) < kMultiprocessors &&
         most_columns(widths.narrow) < most_columns(widths.wide);
}

int64_t row_tiles_bound(int64_t row_capacity, int64_t num_experts, int64_t tile_rows) {
  return ceil_div(row_capacity, tile_rows) + std::min(num_experts, row_capacity);
}

int32_t router_gradient_slices(const RouterProblem& problem) {
  // One wave, slices of at least 512 rows.
  constexpr int64_t kLeastRows = 512;
  constexpr int64_t kMost = 32;
  const int64_t tiles =
      ceil_div(2 * problem.num_experts, kDirectTile) * ceil_div(problem.hidden_size, kGatheredTile);
  const int64_t by_rows = std::max<int64_t>(1, problem.num_tokens / kLeastRows);
  return static_cast<int32_t>(std::clamp<int64_t>(kMultiprocessors / std::max<int64_t>(1, tiles), 1,
                                                  std::min(kMost, by_rows)));
}

std::string why_not_shape(const ExpertsProblem& problem) {
  if (problem.dtype != DType::bfloat16 && problem.dtype != DType::float16)
    return "dtype " + std::string(name_of(problem.dtype)) + " (it runs bfloat16 and float16)";
  if (problem.hidden_size % kGranule != 0)
    return "hidden_size " + std::to_string(problem.hidden_size) + " is not a multiple of 8";
  if (problem.intermediate_size % kGranule != 0)
    return "intermediate_size " + std::to_string(problem.intermediate_size) +
           " is not a multiple of 8";
  if (problem.config.weight_order == WeightOrder::input_major &&
      problem.config.gate_layout == GateLayout::interleaved && is_gated(problem.config.activation))
    return "weight_order input_major with gate_layout interleaved: neither axis of gate or up is "
           "contiguous";
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (problem.row_capacity > kMost || problem.hidden_size > kMost ||
      problem.preactivation_size() > kMost)
    return "a size past 2^31 - 1";
  return {};
}

std::string why_not_adapters(const ExpertsProblem& problem) {
  if (problem.adapter_ranks == std::array<int64_t, 2>{}) return {};
  for (const int64_t rank : problem.adapter_ranks)
    if (rank % kGranule != 0)
      return "rank " + std::to_string(rank) + " of an adapter is not a multiple of 8";
  if (problem.config.weight_order == WeightOrder::input_major)
    return "adapters with weight_order input_major";
  return {};
}

int64_t score_partials_of(int64_t intermediate_size) {
  return ceil_div(intermediate_size, kDownBackwardTileN);
}

}  // namespace penstock::cuda
