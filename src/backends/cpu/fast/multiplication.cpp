// SPDX-License-Identifier: Apache-2.0
//
// Sizes: tasks, and one thread's scratch.
#include "backends/cpu/fast/multiplication.h"

#include <algorithm>

namespace penstock::cpu::fast {
namespace {

constexpr int64_t kTaskPacks = 3;  // row blocks of the largest task

int64_t words_of(const GemmKernels& gemm, int64_t k) {
  return round_up(blocks_of(k, gemm.k_per_word), gemm.word_unit);
}

// Pairs where every operand is bf16; anything else is widened to floats while it is packed.
const GemmKernels& gemm_for(const GroupedProduct& product, const IsaKernels& kernels) {
  if (kernels.bf16.mr == 0) return kernels.f32;
  for (int32_t s = 0; s < product.num_segments; ++s) {
    const auto& segment = product.segments[static_cast<size_t>(s)];
    if (segment.left.type != Element::bf16 || segment.right[0].type != Element::bf16)
      return kernels.f32;
  }
  return kernels.bf16;
}

}  // namespace

bool can_change_sides(const IsaKernels& kernels, const GemmKernels& gemm) {
  return gemm.left_rows == Taken::packed_or_in_place && kernels.f32.nr % kColumnUnit == 0;
}

Tiling largest_tiling(const GemmKernels& gemm, int32_t num_bands) {
  return {kTaskPacks * pack_rows(gemm), kMaxTaskColumns / num_bands};
}

Layout layout_of(const IsaKernels& kernels, const GemmKernels& gemm, const Tiling& tiling,
                 const ProductExtents& extents) {
  const int64_t words = words_of(gemm, std::min(extents.k, gemm.k_block));
  const int64_t rows = std::min(tiling.rows, extents.m);
  const int64_t packed_rows = std::min(pack_rows(gemm), rows);
  const int64_t cols = std::min(tiling.cols, extents.n);
  Layout layout = {};
  // One line more than needed: panels a power of two apart would fight for the same cache sets.
  layout.a_panel_stride = round_up(words * gemm.mr + gemm.a_panel_spill, kLine) + kLine;
  layout.b_panel_stride = round_up(words * gemm.nr + gemm.b_panel_spill, kLine) + kLine;
  layout.b_begin = blocks_of(packed_rows, gemm.mr) * layout.a_panel_stride;
  layout.c_begin =
      layout.b_begin + extents.num_bands * blocks_of(cols, gemm.nr) * layout.b_panel_stride;
  const int64_t sums = rows * extents.num_bands * round_up(cols, gemm.nr);
  layout.words = round_up(layout.c_begin + sums, kLine);
  if (!can_change_sides(kernels, gemm)) return layout;

  const GemmKernels& panels = kernels.f32;
  const int64_t few_rows = std::min(kFewRows, rows);
  layout.by_column_begin = blocks_of(few_rows, gemm.nr) * layout.b_panel_stride;
  layout.by_row_begin =
      layout.by_column_begin + extents.num_bands * cols * round_up(few_rows, gemm.nr);
  layout.by_row_begin = round_up(layout.by_row_begin, kLine);
  layout.by_row_panel_stride = round_up(few_rows * panels.nr + panels.b_panel_spill, kLine) + kLine;
  const int64_t few_rows_words = layout.by_row_begin + extents.num_bands *
                                                           blocks_of(cols, panels.nr) *
                                                           layout.by_row_panel_stride;
  layout.words = std::max(layout.words, few_rows_words);
  return layout;
}

Multiplication::Multiplication(const GroupedProduct& product, const Epilogue& epilogue,
                               const Runtime& runtime)
    : product_(product),
      epilogue_(epilogue),
      kernels_(*runtime.kernels),
      gemm_(gemm_for(product, kernels_)),
      right_in_place_(right_stays_in_place()) {
  tiling_ = choose_tiling(runtime.threads);
  list_row_blocks(tiling_.rows);
  column_blocks_ = blocks_of(product_.n, tiling_.cols);
  const ProductExtents extents = largest_extents();
  layout_ = layout_of(kernels_, gemm_, tiling_, extents);
  work_ = total_rows_ * product_.n * product_.num_bands * std::max<int64_t>(extents.k, 1);
}

int64_t Multiplication::total_k(int64_t expert) const {
  int64_t total = 0;
  for (int32_t s = 0; s < product_.num_segments; ++s)
    total += k_of(product_.segments[static_cast<size_t>(s)], expert);
  return total;
}

int64_t Multiplication::count_row_blocks(int64_t rows) const {
  int64_t count = 0;
  for (int64_t expert = 0; expert < product_.rows.num_experts(); ++expert)
    if (!epilogue_.skips(expert, product_.rows.count(expert)))
      count += blocks_of(m_of(expert), rows);
  return count;
}

// The largest tasks that still give every thread several, so that they finish together.
Tiling Multiplication::choose_tiling(int32_t threads) const {
  const Tiling largest = largest_tiling(gemm_, product_.num_bands);
  if (threads == 1) return largest;
  const int64_t unit = round_up(kColumnUnit / product_.num_bands, gemm_.nr);
  const Tiling candidates[] = {
      largest, {largest.rows, 2 * unit}, {pack_rows(gemm_), 2 * unit}, {pack_rows(gemm_), unit}};
  for (const Tiling& tiling : candidates) {
    constexpr int64_t kTasksPerThread = 4;
    const int64_t tasks = count_row_blocks(tiling.rows) * blocks_of(product_.n, tiling.cols);
    if (tasks >= kTasksPerThread * threads) return tiling;
  }
  return candidates[3];
}

void Multiplication::list_row_blocks(int64_t rows) {
  row_blocks_.reserve(static_cast<size_t>(count_row_blocks(rows)));
  for (int64_t expert = 0; expert < product_.rows.num_experts(); ++expert) {
    if (epilogue_.skips(expert, product_.rows.count(expert))) continue;
    const int64_t m = m_of(expert);
    total_rows_ += m;
    for (int64_t begin = 0; begin < m; begin += rows)
      row_blocks_.push_back({expert, begin, std::min(rows, m - begin)});
  }
}

ProductExtents Multiplication::largest_extents() const {
  ProductExtents extents;
  extents.n = product_.n;
  extents.num_bands = product_.num_bands;
  for (const RowBlock& block : row_blocks_) {
    extents.m = std::max(extents.m, m_of(block.expert));
    for (int32_t s = 0; s < product_.num_segments; ++s)
      extents.k =
          std::max(extents.k, k_of(product_.segments[static_cast<size_t>(s)], block.expert));
  }
  return extents;
}

}  // namespace penstock::cpu::fast
