// SPDX-License-Identifier: Apache-2.0
//
// One task: a block of rows times a block of columns, in steps of one block of k.
//
// With many rows, the right operand's block (k_block x task columns) is packed, a panel of columns
// at a time as the first rows need it, and stays in the second cache while the rows pass by; the
// left operand is read where it is if the kernel can. With few
// rows, packing the right operand, weights that are read once, would cost as much as the product:
// then the rows are packed, the weights are read where they are, and the sums, which come out by
// column, are turned. An element's chain of multiply-adds is the same either way.
#include <algorithm>

#include "backends/cpu/fast/multiplication.h"

namespace penstock::cpu::fast {
namespace {

int64_t size_of(Element type) { return type == Element::f32 ? 4 : 2; }

const void* at(const PackArgs& block, int64_t element) {
  return static_cast<const char*>(block.base) + element * size_of(block.type);
}

// Where each outer element's words of k begin.
void point_at_rows(const PackArgs& block, const void** table) {
  for (int64_t o = 0; o < block.outer_count; ++o) {
    const int64_t row = block.outer_index != nullptr ? block.outer_index[o] : o;
    table[o] = at(block, row * block.outer_stride);
  }
}

// Where each k's words of the outer elements begin.
void point_at_columns(const PackArgs& block, const void** table) {
  for (int64_t k = 0; k < block.k_count; ++k) {
    const int64_t column = block.k_index != nullptr ? block.k_index[k] : k;
    table[k] = at(block, column * block.k_stride);
  }
}

// The block as runs of memory; `table` is where they begin.
ReadNext lines_of(const PackArgs& block, const void** table) {
  const bool along_k = block.outer_index != nullptr ||
                       (block.k_index == nullptr && block.k_stride <= block.outer_stride);
  if (along_k) {
    point_at_rows(block, table);
    return {table, block.outer_count, block.k_count * block.k_stride * size_of(block.type)};
  }
  point_at_columns(block, table);
  return {table, block.k_count, block.outer_count * block.outer_stride * size_of(block.type)};
}

}  // namespace

PackArgs Multiplication::block_of(const Operand& operand, int64_t expert, int64_t outer_begin,
                                  const Step& step) const {
  PackArgs args = {};
  int64_t offset = expert * operand.expert_stride;
  if (operand.outer_index != nullptr) {
    args.outer_index = operand.outer_index + outer_begin;
  } else {
    offset += outer_begin * operand.outer_stride;
  }
  int64_t k_begin = step.k_begin;
  if (step.segment->k == kExpertRows) k_begin += product_.rows.begin(expert);
  if (operand.k_index != nullptr) {
    args.k_index = operand.k_index + k_begin;
  } else {
    offset += k_begin * operand.k_stride;
  }
  args.base = static_cast<const char*>(operand.base) + offset * size_of(operand.type);
  args.type = operand.type;
  args.outer_stride = operand.outer_stride;
  args.k_stride = operand.k_stride;
  args.k_count = step.k;
  return args;
}

// The first step at or after k_begin of a segment.
std::optional<Multiplication::Step> Multiplication::step_from(
    const GroupedProduct::Segment* segment, int64_t k_begin, int64_t expert) const {
  const auto* const end = product_.segments.data() + product_.num_segments;
  for (; segment != end; ++segment, k_begin = 0) {
    const int64_t left = k_of(*segment, expert) - k_begin;
    if (left > 0) return Step{segment, k_begin, std::min(gemm_.k_block, left), false, false};
  }
  return std::nullopt;
}

template <typename Function>
void Multiplication::for_each_step(int64_t expert, const Function& function) const {
  std::optional<Step> step = step_from(product_.segments.data(), 0, expert);
  if (step) step->first = true;
  while (step) {
    const std::optional<Step> next = step_from(step->segment, step->k_begin + step->k, expert);
    step->last = !next;
    function(*step, next);
    step = next;
  }
}

// Whether the kernel can read every outer element's words of k where they are.
bool Multiplication::words_lie_along_k(const PackArgs& block) const {
  if (gemm_.left_rows == Taken::packed) return false;
  if (block.k_index != nullptr || block.k_stride != 1) return false;
  if (block.k_count % gemm_.k_per_word != 0) return false;
  return block.type == (gemm_.k_per_word == 2 ? Element::bf16 : Element::f32);
}

// Whether it can read every k's words of consecutive outer elements where they are.
bool Multiplication::words_lie_across_k(const PackArgs& block) const {
  if (gemm_.columns == Taken::packed || block.type != Element::f32) return false;
  return block.outer_index == nullptr && block.outer_stride == 1;
}

// Along k, of all of the right operand, where it is multiplied by an expert's rows.
bool Multiplication::right_stays_in_place() const {
  if (product_.m != kExpertRows || !can_change_sides(kernels_, gemm_)) return false;
  for (int32_t s = 0; s < product_.num_segments; ++s) {
    const auto& segment = product_.segments[static_cast<size_t>(s)];
    if (segment.k == kExpertRows) return false;
    for (int32_t band = 0; band < product_.num_bands; ++band) {
      const Step whole = {&segment, 0, segment.k, true, true};
      const Operand& right = segment.right[static_cast<size_t>(band)];
      if (!words_lie_along_k(block_of(right, 0, 0, whole))) return false;
    }
  }
  return true;
}

// Panel `index` of the right operand, counted through the bands.
PackArgs Multiplication::right_panel(const Task& task, const Step& step, int64_t index) const {
  const int64_t panels_a_band = task.whole.band_stride / gemm_.nr;
  const Operand& right = step.segment->right[static_cast<size_t>(index / panels_a_band)];
  const int64_t col = index % panels_a_band * gemm_.nr;
  PackArgs panel = block_of(right, task.whole.expert, task.whole.col_begin + col, step);
  panel.outer_count = std::min(gemm_.nr, task.whole.cols - col);
  panel.panels = task.scratch + layout_.b_begin + index * layout_.b_panel_stride;
  panel.panel_stride = layout_.b_panel_stride;
  return panel;
}

TileMode Multiplication::tile_mode(const Task& task, const Step& step) const {
  if (!step.first) return TileMode::add;
  if (!step.last) return TileMode::store;
  switch (task.sums) {
    case Sums::in_scratch:
    case Sums::in_output:
      return TileMode::store;
    case Sums::past_caches:
      return TileMode::store_past_caches;
    case Sums::rounded:
      return TileMode::round_to_bf16;
    case Sums::rounded_past_caches:
      return TileMode::round_to_bf16_past_caches;
  }
  return TileMode::store;
}

// The left operand from `begin` on: where it lies if the kernel can read it there, or packed.
void Multiplication::take_left(const Task& task, const PackArgs& left, const void** table,
                               BlockArgs& multiply) const {
  multiply.a_rows = multiply.a_columns = nullptr;
  if (words_lie_along_k(left)) {
    point_at_rows(left, table);
    multiply.a_rows = table;
  } else if (words_lie_across_k(left)) {
    point_at_columns(left, table);
    multiply.a_columns = table;
  } else {
    PackArgs packed = left;
    packed.panels = task.scratch;
    packed.panel_stride = layout_.a_panel_stride;
    gemm_.pack_a(packed);
  }
}

// The step's first rows, a panel of columns at a time: each is packed here, while or before it is
// used for the first time, and the next one is fetched meanwhile; with the last one, what
// `multiply` says.
void Multiplication::multiply_first_rows(const Task& task, const Step& step,
                                         const BlockArgs& multiply) const {
  std::array<const void*, kMaxBlockK> columns;
  std::array<const void*, kMaxBlockK> next_lines;
  const int64_t panels = product_.num_bands * (task.whole.band_stride / gemm_.nr);
  for (int64_t index = 0; index < panels; ++index) {
    const PackArgs right = right_panel(task, step, index);
    BlockArgs block = multiply;
    block.b = right.panels;
    block.cols = gemm_.nr;
    block.c = static_cast<char*>(multiply.c) + index * gemm_.nr * task.bytes_of_sum;
    if (words_lie_across_k(right) && right.outer_count == gemm_.nr) {
      point_at_columns(right, columns.data());
      block.b_columns = columns.data();
    } else {
      gemm_.pack_b(right);
    }
    block.next = index + 1 < panels ? ReadNext{} : multiply.next;
    if (index + 1 < panels)
      block.next = lines_of(right_panel(task, step, index + 1), next_lines.data());
    gemm_.multiply(block);
  }
}

void Multiplication::run_step(const Task& task, const Step& step,
                              const std::optional<Step>& next) const {
  const Chunk& whole = task.whole;
  const bool finishes = step.last && task.sums == Sums::in_scratch;
  std::array<const void*, kMaxBlockK> table;
  std::array<const void*, kMaxBlockK> next_lines;
  BlockArgs multiply = {};
  multiply.a = task.scratch;
  multiply.a_panel_stride = layout_.a_panel_stride;
  multiply.b = task.scratch + layout_.b_begin;
  multiply.b_panel_stride = layout_.b_panel_stride;
  multiply.words = round_up(blocks_of(step.k, gemm_.k_per_word), gemm_.word_unit);
  multiply.cols = product_.num_bands * whole.band_stride;
  multiply.ldc = whole.row_stride;
  multiply.mode = tile_mode(task, step);
  for (int64_t i = 0; i < whole.rows; i += pack_rows(gemm_)) {
    Chunk chunk = whole;
    chunk.row_begin += i;
    chunk.rows = std::min(pack_rows(gemm_), whole.rows - i);
    PackArgs left = block_of(step.segment->left, whole.expert, chunk.row_begin, step);
    left.outer_count = chunk.rows;
    take_left(task, left, table.data(), multiply);
    multiply.rows = chunk.rows;
    multiply.c = static_cast<char*>(task.c) + i * whole.row_stride * task.bytes_of_sum;
    Epilogue::Touched touched;
    if (finishes) epilogue_.list_touched(chunk, touched);
    multiply.next = {touched.at.data(), touched.count, touched.bytes};
    if (next && i + chunk.rows == whole.rows)
      multiply.next = lines_of(right_panel(task, *next, 0), next_lines.data());
    if (i == 0) {
      multiply_first_rows(task, step, multiply);
    } else {
      gemm_.multiply(multiply);
    }
    if (!finishes) continue;
    chunk.sums = whole.row(i);
    epilogue_.apply(chunk);
  }
}

void Multiplication::run_few_rows_step(const Task& task, const Step& step) const {
  const Chunk& whole = task.whole;
  PackArgs rows = block_of(step.segment->left, whole.expert, whole.row_begin, step);
  rows.outer_count = whole.rows;
  rows.panels = task.scratch;
  rows.panel_stride = layout_.b_panel_stride;
  gemm_.pack_b(rows);
  std::array<const void*, kMaxTaskColumns> table;
  for (int32_t band = 0; band < product_.num_bands; ++band) {
    const Operand& right = step.segment->right[static_cast<size_t>(band)];
    PackArgs columns = block_of(right, whole.expert, whole.col_begin, step);
    columns.outer_count = whole.cols;
    point_at_rows(columns, table.data() + band * whole.cols);
  }
  BlockArgs multiply = {};
  multiply.a_rows = table.data();
  multiply.b = task.scratch;
  multiply.b_panel_stride = layout_.b_panel_stride;
  multiply.words = blocks_of(step.k, gemm_.k_per_word);
  multiply.rows = product_.num_bands * whole.cols;
  multiply.cols = whole.rows;
  multiply.c = reinterpret_cast<float*>(task.scratch + layout_.by_column_begin);
  multiply.ldc = round_up(whole.rows, gemm_.nr);
  multiply.mode = step.first ? TileMode::store : TileMode::add;
  Epilogue::Touched touched;
  if (step.last) epilogue_.list_touched(whole, touched);
  multiply.next = {touched.at.data(), touched.count, touched.bytes};
  gemm_.multiply(multiply);
}

// Turns the sums, panel by panel of columns, and hands each panel to the epilogue.
void Multiplication::finish_few_rows(const Task& task) const {
  const Chunk& whole = task.whole;
  const GemmKernels& panels = kernels_.f32;
  const int64_t panels_per_band = blocks_of(whole.cols, panels.nr);
  const int64_t ldc = round_up(whole.rows, gemm_.nr);
  for (int32_t band = 0; band < product_.num_bands; ++band) {
    PackArgs turn = {};
    turn.base = task.scratch + layout_.by_column_begin + band * whole.cols * ldc;
    turn.type = Element::f32;
    turn.outer_stride = ldc;
    turn.k_stride = 1;
    turn.outer_count = whole.cols;
    turn.k_count = whole.rows;
    turn.panel_stride = layout_.by_row_panel_stride;
    turn.panels = task.scratch + layout_.by_row_begin + band * panels_per_band * turn.panel_stride;
    panels.pack_b(turn);
  }
  Chunk chunk = whole;
  chunk.row_stride = panels.nr;
  chunk.band_stride = panels_per_band * layout_.by_row_panel_stride;
  chunk.sums = reinterpret_cast<float*>(task.scratch + layout_.by_row_begin);
  for (int64_t col = 0; col < whole.cols; col += panels.nr) {
    chunk.col_begin = whole.col_begin + col;
    chunk.cols = std::min(panels.nr, whole.cols - col);
    epilogue_.apply(chunk);
    chunk.sums += layout_.by_row_panel_stride;
  }
}

// In the output itself where nothing else is to be done to them and whole panels fit. What is
// rounded must be finished in one step.
void Multiplication::place_sums(Task& task) const {
  Chunk& whole = task.whole;
  whole.band_stride = round_up(whole.cols, gemm_.nr);
  whole.row_stride = product_.num_bands * whole.band_stride;
  whole.sums = reinterpret_cast<float*>(task.scratch + layout_.c_begin);
  task.c = whole.sums;
  const SumRows output = epilogue_.destination(whole);
  const int64_t k = total_k(whole.expert);
  const bool one_step = product_.num_segments == 1 && k > 0 && k <= gemm_.k_block;
  const bool fits = output.type == Element::f32 || (output.type == Element::bf16 && one_step);
  if (output.data == nullptr || !fits || whole.band_stride != whole.cols) return;
  task.c = output.data;
  task.bytes_of_sum = size_of(output.type);
  whole.row_stride = output.row_stride;
  const bool on_lines = reinterpret_cast<uintptr_t>(output.data) % 64 == 0 &&
                        output.row_stride * task.bytes_of_sum % 64 == 0;
  const bool past_caches = output.next_use == NextUse::distant && on_lines;
  if (output.type == Element::f32) {
    whole.sums = static_cast<float*>(output.data);
    task.sums = past_caches ? Sums::past_caches : Sums::in_output;
  } else {
    whole.sums = nullptr;
    task.sums = past_caches ? Sums::rounded_past_caches : Sums::rounded;
  }
}

void Multiplication::run_task(int64_t index, uint32_t* scratch) const {
  const RowBlock& block = row_blocks_[static_cast<size_t>(index / column_blocks_)];
  Task task = {.scratch = scratch};
  Chunk& whole = task.whole;
  whole.expert = block.expert;
  whole.row_begin = block.begin;
  if (product_.m == kExpertRows) whole.row_begin += product_.rows.begin(block.expert);
  whole.rows = block.rows;
  whole.col_begin = index % column_blocks_ * tiling_.cols;
  whole.cols = std::min(tiling_.cols, product_.n - whole.col_begin);
  if (right_in_place_ && whole.rows <= kFewRows) {
    for_each_step(block.expert,
                  [&](const Step& step, const auto&) { run_few_rows_step(task, step); });
    finish_few_rows(task);
    return;
  }
  place_sums(task);
  for_each_step(block.expert,
                [&](const Step& step, const auto& next) { run_step(task, step, next); });
  if (total_k(block.expert) > 0) return;
  // An expert without rows: its sums are 0.
  for (int64_t i = 0; i < whole.rows; ++i)
    std::fill_n(whole.row(i), product_.num_bands * whole.band_stride, 0.0f);
  if (task.sums == Sums::in_scratch) epilogue_.apply(whole);
}

}  // namespace penstock::cpu::fast
