// SPDX-License-Identifier: Apache-2.0
//
// Loop order inside a task, outermost first: blocks of k, blocks of rows, panels of columns,
// panels of rows. One block of the right operand (k_block x task columns) stays in the second
// cache while the rows pass by, one of its panels in the first.
#include "backends/cpu/fast/grouped_product.h"

#include <algorithm>
#include <vector>

#include "backends/cpu/fast/thread_team.h"

namespace penstock::cpu::fast {
namespace {

constexpr int64_t kPackRows = 96;  // rounded up to whole panels
constexpr int64_t kTaskPacks = 3;  // row blocks of the largest task

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
constexpr int64_t blocks_of(int64_t value, int64_t size) { return (value + size - 1) / size; }

int64_t size_of(Element type) { return type == Element::f32 ? 4 : 2; }

struct Tiling {
  int64_t rows;  // of a task
  int64_t cols;  // of a task, in each band
};

// One thread's scratch: offsets in 32-bit words, every part on a cache line.
struct Layout {
  int64_t a_panel_stride;
  int64_t b_panel_stride;
  int64_t b_begin;
  int64_t c_begin;
  int64_t words;
};

Layout layout_of(const GemmKernels& gemm, const Tiling& tiling, const ProductExtents& extents) {
  constexpr int64_t kLine = 16;
  const int64_t k = std::min(extents.k, gemm.k_block);
  const int64_t words = blocks_of(k, gemm.k_per_word);
  const int64_t rows = std::min(tiling.rows, extents.m);
  const int64_t packed_rows = std::min(pack_rows(gemm), rows);
  const int64_t cols = std::min(tiling.cols, extents.n);
  Layout layout;
  layout.a_panel_stride = round_up(words * gemm.mr + gemm.a_panel_spill, kLine);
  layout.b_panel_stride = round_up(words * gemm.nr + gemm.b_panel_spill, kLine);
  layout.b_begin = blocks_of(packed_rows, gemm.mr) * layout.a_panel_stride;
  layout.c_begin =
      layout.b_begin + extents.num_bands * blocks_of(cols, gemm.nr) * layout.b_panel_stride;
  const int64_t sums = rows * extents.num_bands * round_up(cols, gemm.nr);
  layout.words = round_up(layout.c_begin + sums, kLine);
  return layout;
}

Tiling largest_tiling(const GemmKernels& gemm, int32_t num_bands) {
  return {kTaskPacks * pack_rows(gemm), kMaxTaskColumns / num_bands};
}

// One block of rows of one expert; its tasks are the blocks of columns.
struct RowBlock {
  int64_t expert;
  int64_t begin;  // within the expert
  int64_t rows;
};

class Multiplication {
 public:
  Multiplication(const GroupedProduct& product, const Epilogue& epilogue, const Runtime& runtime)
      : product_(product), epilogue_(epilogue), gemm_(gemm_for(product, *runtime.kernels)) {
    tiling_ = choose_tiling(runtime.threads);
    list_row_blocks(tiling_.rows);
    column_blocks_ = blocks_of(product_.n, tiling_.cols);
    const ProductExtents extents = largest_extents();
    layout_ = layout_of(gemm_, tiling_, extents);
    work_ = total_rows_ * product_.n * product_.num_bands * std::max<int64_t>(extents.k, 1);
  }

  int64_t num_tasks() const { return static_cast<int64_t>(row_blocks_.size()) * column_blocks_; }
  int64_t words_per_thread() const { return layout_.words; }
  int64_t work() const { return work_; }

  void run_task(int64_t task, uint32_t* scratch) const;

 private:
  struct Step {  // one block of k
    const GroupedProduct::Segment* segment;
    int64_t k_begin;
    int64_t k;
    bool first;
    bool last;
  };

  static const GemmKernels& gemm_for(const GroupedProduct& product, const IsaKernels& kernels);
  int64_t k_of(const GroupedProduct::Segment& segment, int64_t expert) const {
    return segment.k == kExpertRows ? product_.rows.count(expert) : segment.k;
  }
  int64_t m_of(int64_t expert) const {
    return product_.m == kExpertRows ? product_.rows.count(expert) : product_.m;
  }
  Tiling choose_tiling(int32_t threads) const;
  int64_t count_row_blocks(int64_t rows) const;
  void list_row_blocks(int64_t rows);
  ProductExtents largest_extents() const;
  PackArgs block_of(const Operand& operand, int64_t expert, int64_t outer_begin,
                    const Step& step) const;
  void run_step(const RowBlock& block, const Chunk& whole, const Step& step,
                uint32_t* scratch) const;

  const GroupedProduct& product_;
  const Epilogue& epilogue_;
  const GemmKernels& gemm_;
  Tiling tiling_;
  Layout layout_;
  std::vector<RowBlock> row_blocks_;
  int64_t column_blocks_ = 0;
  int64_t total_rows_ = 0;
  int64_t work_ = 0;
};

// Pairs where every operand is bf16; anything else is widened to floats while it is packed.
const GemmKernels& Multiplication::gemm_for(const GroupedProduct& product,
                                            const IsaKernels& kernels) {
  if (kernels.bf16.mr == 0) return kernels.f32;
  for (int32_t s = 0; s < product.num_segments; ++s) {
    const auto& segment = product.segments[static_cast<size_t>(s)];
    if (segment.left.type != Element::bf16 || segment.right[0].type != Element::bf16)
      return kernels.f32;
  }
  return kernels.bf16;
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
  const int64_t unit = kColumnUnit / product_.num_bands;
  const Tiling candidates[] = {largest,
                               {largest.rows, 2 * unit},
                               {pack_rows(gemm_), 2 * unit},
                               {pack_rows(gemm_), unit}};
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
      extents.k = std::max(extents.k, k_of(product_.segments[static_cast<size_t>(s)], block.expert));
  }
  return extents;
}

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

void Multiplication::run_step(const RowBlock& block, const Chunk& whole, const Step& step,
                              uint32_t* scratch) const {
  uint32_t* const b = scratch + layout_.b_begin;
  const int64_t panels = whole.band_stride / gemm_.nr;
  for (int32_t band = 0; band < product_.num_bands; ++band) {
    const Operand& right = step.segment->right[static_cast<size_t>(band)];
    PackArgs pack = block_of(right, block.expert, whole.col_begin, step);
    pack.outer_count = whole.cols;
    pack.panels = b + band * panels * layout_.b_panel_stride;
    pack.panel_stride = layout_.b_panel_stride;
    gemm_.pack_b(pack);
  }
  BlockArgs multiply = {};
  multiply.a = scratch;
  multiply.a_panel_stride = layout_.a_panel_stride;
  multiply.b = b;
  multiply.b_panel_stride = layout_.b_panel_stride;
  multiply.words = blocks_of(step.k, gemm_.k_per_word);
  multiply.cols = whole.row_stride;
  multiply.ldc = whole.row_stride;
  multiply.mode = step.first ? TileMode::store : TileMode::add;
  for (int64_t i = 0; i < whole.rows; i += pack_rows(gemm_)) {
    PackArgs pack = block_of(step.segment->left, block.expert, whole.row_begin + i, step);
    pack.outer_count = std::min(pack_rows(gemm_), whole.rows - i);
    pack.panels = scratch;
    pack.panel_stride = layout_.a_panel_stride;
    gemm_.pack_a(pack);
    multiply.rows = pack.outer_count;
    multiply.c = whole.row(i);
    gemm_.multiply(multiply);
    if (!step.last) continue;
    Chunk chunk = whole;
    chunk.row_begin += i;
    chunk.rows = pack.outer_count;
    chunk.sums = whole.row(i);
    epilogue_.apply(chunk);
  }
}

void Multiplication::run_task(int64_t task, uint32_t* scratch) const {
  const RowBlock& block = row_blocks_[static_cast<size_t>(task / column_blocks_)];
  Chunk whole = {};
  whole.expert = block.expert;
  whole.row_begin = block.begin;
  if (product_.m == kExpertRows) whole.row_begin += product_.rows.begin(block.expert);
  whole.rows = block.rows;
  whole.col_begin = task % column_blocks_ * tiling_.cols;
  whole.cols = std::min(tiling_.cols, product_.n - whole.col_begin);
  whole.sums = reinterpret_cast<float*>(scratch + layout_.c_begin);
  whole.band_stride = round_up(whole.cols, gemm_.nr);
  whole.row_stride = product_.num_bands * whole.band_stride;

  int64_t left = 0;  // of k, over all segments
  for (int32_t s = 0; s < product_.num_segments; ++s)
    left += k_of(product_.segments[static_cast<size_t>(s)], block.expert);
  if (left == 0) {  // an expert without rows: its sums are 0
    std::fill_n(whole.sums, whole.rows * whole.row_stride, 0.0f);
    epilogue_.apply(whole);
    return;
  }
  bool first = true;
  for (int32_t s = 0; s < product_.num_segments; ++s) {
    const auto& segment = product_.segments[static_cast<size_t>(s)];
    const int64_t k = k_of(segment, block.expert);
    for (int64_t k_begin = 0; k_begin < k; k_begin += gemm_.k_block) {
      const int64_t size = std::min(gemm_.k_block, k - k_begin);
      left -= size;
      run_step(block, whole, {&segment, k_begin, size, first, left == 0}, scratch);
      first = false;
    }
  }
}

}  // namespace

ExpertRows::ExpertRows(const RowGroups& groups)
    : counts_(groups.expert_counts.as<const int32_t>()),
      offsets_(groups.expert_offsets.as<const int32_t>()),
      num_experts_(groups.num_experts()),
      capacity_(groups.row_capacity) {}

ExpertRows ExpertRows::single(int64_t count) {
  ExpertRows rows;
  rows.capacity_ = count;
  return rows;
}

int64_t ExpertRows::begin(int64_t expert) const {
  return offsets_ != nullptr ? offsets_[expert] : 0;
}

int64_t ExpertRows::count(int64_t expert) const {
  if (counts_ == nullptr) return capacity_;
  const int64_t room = std::max<int64_t>(0, capacity_ - offsets_[expert]);
  return std::min<int64_t>(counts_[expert], room);
}

bool Epilogue::skips(int64_t, int64_t) const { return false; }

int64_t pack_rows(const GemmKernels& gemm) { return round_up(kPackRows, gemm.mr); }

int64_t scratch_bytes_per_thread(const IsaKernels& kernels, const ProductExtents& extents) {
  const bool pairs = extents.all_bf16 && kernels.bf16.mr != 0;
  const GemmKernels& gemm = pairs ? kernels.bf16 : kernels.f32;
  return 4 * layout_of(gemm, largest_tiling(gemm, extents.num_bands), extents).words;
}

void multiply_groups(const GroupedProduct& product, const Epilogue& epilogue, Workspace scratch,
                     const Runtime& runtime) {
  const Multiplication multiplication(product, epilogue, runtime);
  const int64_t words = multiplication.words_per_thread();
  const int64_t room = std::max<int64_t>(1, scratch.bytes / 4 / std::max<int64_t>(1, words));
  const int32_t threads = static_cast<int32_t>(std::min<int64_t>(room, runtime.threads));
  auto* const base = static_cast<uint32_t*>(scratch.data);
  parallel_for(threads_worth(threads, multiplication.work()), multiplication.num_tasks(),
               [&](int64_t task, int32_t worker) {
                 multiplication.run_task(task, base + worker * words);
               });
}

}  // namespace penstock::cpu::fast
