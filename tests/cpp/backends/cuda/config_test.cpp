// SPDX-License-Identifier: Apache-2.0
//
// The CUDA backend's choices, which are pure host functions and need no GPU.
#include "backends/cuda/gemm/config.h"

#include <gtest/gtest.h>

#include "backends/cuda/gemm/gemm_ops.h"
#include "backends/cuda/gemm/router_scratch.h"

namespace penstock::cuda {
namespace {

ExpertsProblem problem_of_size(int64_t hidden, int64_t intermediate) {
  ExpertsProblem problem;
  problem.hidden_size = hidden;
  problem.intermediate_size = intermediate;
  problem.num_tokens = 1024;
  problem.num_experts = 64;
  problem.num_slots = 8192;
  problem.row_capacity = 8192;
  problem.dtype = DType::bfloat16;
  return problem;
}

TEST(TokenTile, IsNarrowOnlyWhereExpertsHardlyFillIt) {
  EXPECT_EQ(token_tile(8, 64), 64);
  EXPECT_EQ(token_tile(32 * 64, 64), 64);
  EXPECT_EQ(token_tile(64 * 64, 64), 128);
  EXPECT_EQ(token_tile(24576 * 8, 128), 128);
  EXPECT_EQ(token_tile(0, 64), 64);
}

TEST(NarrowTilesPay, ForOneTokensExperts) {
  EXPECT_TRUE(narrow_tiles_pay(8, 64, 1024, {128, 64}));    // olmoe, up: 8 x 8 wide tiles
  EXPECT_TRUE(narrow_tiles_pay(8, 64, 2048, {256, 64}));    // and down
  EXPECT_TRUE(narrow_tiles_pay(10, 512, 512, {128, 64}));   // qwen3-next: 10 x 4
  EXPECT_TRUE(narrow_tiles_pay(10, 512, 2048, {256, 64}));  // 10 x 8
  EXPECT_FALSE(narrow_tiles_pay(8 * 8, 64, 1024, {128, 64}));
  EXPECT_FALSE(narrow_tiles_pay(8 * 10, 512, 512, {128, 64}));
}

TEST(NarrowTilesPay, OnlyWhereTheBusiestMultiprocessorHasLess) {
  // 66 tiles of 256 columns or 264 of 64, two for each of 132; past that three, then four.
  EXPECT_TRUE(narrow_tiles_pay(66, 200, 256, {256, 64}));
  EXPECT_TRUE(narrow_tiles_pay(99, 200, 256, {256, 64}));
  EXPECT_FALSE(narrow_tiles_pay(100, 200, 256, {256, 64}));
  EXPECT_FALSE(narrow_tiles_pay(200, 100, 256, {256, 64}));  // no more experts than there are
  // Every expert's last tile is a partial one: 70 x 2 fill the chip.
  EXPECT_FALSE(narrow_tiles_pay(70, 200, 264, {256, 64}));
  EXPECT_FALSE(narrow_tiles_pay(0, 64, 256, {256, 64}));
}

TEST(NarrowTilesPay, NotWhereRowsAreManyThoughColumnsAreFew) {
  EXPECT_FALSE(narrow_tiles_pay(24576, 1, 256, {256, 64}));
  EXPECT_FALSE(narrow_tiles_pay(64, 1, 256, {256, 64}));
  EXPECT_TRUE(narrow_tiles_pay(40, 1, 256, {256, 64}));
}

TEST(RowTilesBound, CoversEverySplitOfTheRows) {
  for (int64_t experts : {1, 3, 64}) {
    for (int64_t rows : {0, 1, 63, 64, 65, 1000}) {
      // The worst split gives each expert but one a single row.
      const int64_t alone = std::min(experts, rows) - (rows > 0 ? 1 : 0);
      const int64_t worst = rows == 0 ? 0 : alone + (rows - alone + 127) / 128;
      EXPECT_GE(row_tiles_bound(rows, experts, 128), worst) << rows << " rows, " << experts;
    }
  }
  EXPECT_EQ(row_tiles_bound(0, 64, 128), 0);
}

TEST(RouterGradientSlices, FillTheChipWithoutTinySlices) {
  const RouterProblem fine = {24576, 1536, 128, DType::bfloat16, {}};
  EXPECT_EQ(router_gradient_slices(fine), 11);  // of 12 tiles of 256 x 128: one wave of 132
  const RouterProblem few_tokens = {100, 1536, 128, DType::bfloat16, {}};
  EXPECT_EQ(router_gradient_slices(few_tokens), 1);
  const RouterProblem many_tiles = {24576, 8192, 4096, DType::bfloat16, {}};
  EXPECT_EQ(router_gradient_slices(many_tiles), 1);
  const RouterProblem none = {0, 64, 8, DType::bfloat16, {}};
  EXPECT_EQ(router_gradient_slices(none), 1);
}

TEST(WhyNotShape, NamesWhatItRefuses) {
  EXPECT_EQ(why_not_shape(problem_of_size(1536, 256)), "");
  EXPECT_NE(why_not_shape(problem_of_size(1540, 256)).find("hidden_size 1540"), std::string::npos);
  EXPECT_NE(why_not_shape(problem_of_size(1536, 250)).find("intermediate_size 250"),
            std::string::npos);
  ExpertsProblem wide = problem_of_size(64, 64);
  wide.dtype = DType::float32;
  EXPECT_NE(why_not_shape(wide).find("float32"), std::string::npos);
}

TEST(WhyNotShape, RefusesOnlyTheLayoutWithoutAContiguousAxis) {
  ExpertsProblem problem = problem_of_size(64, 64);
  problem.config.weight_order = WeightOrder::input_major;
  EXPECT_EQ(why_not_shape(problem), "");
  problem.config.gate_layout = GateLayout::interleaved;
  EXPECT_NE(why_not_shape(problem).find("interleaved"), std::string::npos);
  problem.config.activation = Activation::silu;
  EXPECT_EQ(why_not_shape(problem), "");
}

TEST(WhyNotAdapters, NamesWhatItRefuses) {
  ExpertsProblem problem = problem_of_size(64, 64);
  problem.config.weight_order = WeightOrder::input_major;
  EXPECT_EQ(why_not_adapters(problem), "");  // there are none
  problem.adapter_ranks = {16, 0};
  EXPECT_NE(why_not_adapters(problem).find("input_major"), std::string::npos);
  problem.config.weight_order = WeightOrder::output_major;
  EXPECT_EQ(why_not_adapters(problem), "");
  problem.adapter_ranks = {16, 12};
  EXPECT_NE(why_not_adapters(problem).find("rank 12"), std::string::npos);
  problem.adapter_ranks = {4, 16};
  EXPECT_NE(why_not_adapters(problem).find("rank 4"), std::string::npos);
}

TEST(ScorePartials, AreOneATile) {
  EXPECT_EQ(score_partials_of(8), 1);
  EXPECT_EQ(score_partials_of(256), 1);
  EXPECT_EQ(score_partials_of(264), 2);
}

TEST(RouterScratch, HoldsEveryPieceApart) {
  const RouterScratch scratch = router_scratch({1000, 264, 61, DType::bfloat16, {}});
  EXPECT_EQ(scratch.padded_experts, 64);
  EXPECT_GE(scratch.offsets - scratch.counts, 4 * scratch.slices);
  EXPECT_GE(scratch.terms - scratch.offsets, 4 * scratch.slices);
  EXPECT_GE(scratch.partials - scratch.terms, 4 * 1000 * 64);
  EXPECT_GE(scratch.bytes - scratch.partials, 8 * scratch.slices * 64 * 264);
}

}  // namespace
}  // namespace penstock::cuda
