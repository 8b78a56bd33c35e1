// SPDX-License-Identifier: Apache-2.0
//
// Which tile a product runs on: a pure function of the problem, the same on every machine, so that
// results do not depend on the number of multiprocessors and no call ever measures anything.
//
// Called by the launchers, by tile_rows and score_partials, and by tests that need no GPU.
#pragma once

#include <cstdint>
#include <string>

#include "penstock/experts.h"
#include "penstock/routing.h"

namespace penstock::cuda {

// Columns of the tiles. A gated up-projection covers half as many intermediate columns.
inline constexpr int32_t kWideTileN = 256;
inline constexpr int32_t kDownBackwardTileN = 256;
inline constexpr int32_t kLogitsTileN = 128;
inline constexpr int32_t kFewTokensLogitsTileN = 32;
inline constexpr int32_t kThinTileN = 64;
// Of a gated up-projection whose wide tiles would not fill the chip.
inline constexpr int32_t kNarrowUpTileN = 128;
// Of a weight gradient's tile: the side that is gathered, and the other.
inline constexpr int32_t kGatheredTile = 128;
inline constexpr int32_t kDirectTile = 256;
// The gathered side beside a direct one of at most kThinTileN columns.
inline constexpr int32_t kThinGradientTile = 256;

// Token rows of a tile: 64 or 128. Rows are known on the host only as a capacity, so the expected
// load of an expert decides, with a margin of two standard deviations of a random routing.
int32_t token_tile(int64_t row_capacity, int64_t num_experts);

// What two tiles cover of one half of a row product's columns.
struct TileWidths {
  int32_t wide;
  int32_t narrow;
};

// Whether a row product with few rows runs on narrow tiles: wide ones leave multiprocessors idle,
// and with narrow ones the busiest has fewer columns. What such a launch does is to read weights,
// and a multiprocessor takes in only so much. The order of a sum does not depend on the tile's
// width, so neither do the results.
bool narrow_tiles_pay(int64_t row_capacity, int64_t num_experts, int64_t columns,
                      TileWidths widths);

// An upper bound of the row tiles of a launch: every expert may end in a partial tile.
int64_t row_tiles_bound(int64_t row_capacity, int64_t num_experts, int64_t tile_rows);

// How many slices the token axis is cut into for the router's weight gradient, whose few output
// tiles would otherwise leave most of the chip idle. Fixed by the shape: results never change.
int32_t router_gradient_slices(const RouterProblem& problem);

// Empty if the shape, dtype and weight layout fit the kernels, otherwise the reason by name.
std::string why_not_shape(const ExpertsProblem& problem);
// The same for the ranks of adapters beside the weights.
std::string why_not_adapters(const ExpertsProblem& problem);

int64_t score_partials_of(int64_t intermediate_size);

}  // namespace penstock::cuda
