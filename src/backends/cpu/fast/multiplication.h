// SPDX-License-Identifier: Apache-2.0
//
// One GroupedProduct cut into tasks: which, how large (multiplication.cpp), and how one runs
// (multiplication_tasks.cpp). Used by grouped_product.cpp alone.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "backends/cpu/fast/grouped_product.h"

namespace penstock::cpu::fast {

inline constexpr int64_t kLine = 16;      // words of a cache line
inline constexpr int64_t kPackRows = 96;  // rows packed at a time, rounded up to whole panels
inline constexpr int64_t kFewRows = 128;  // of a task whose operands change sides

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
constexpr int64_t blocks_of(int64_t value, int64_t size) { return (value + size - 1) / size; }

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
  // Of tasks with few rows, whose packed rows begin at 0.
  int64_t by_column_begin;
  int64_t by_row_begin;
  int64_t by_row_panel_stride;
  int64_t words;
};

// Whether tasks with few rows may read the right operand in place. Their sums are turned by packing
// floats, and an epilogue wants the columns of a panel in whole units.
bool can_change_sides(const IsaKernels& kernels, const GemmKernels& gemm);

Tiling largest_tiling(const GemmKernels& gemm, int32_t num_bands);
Layout layout_of(const IsaKernels& kernels, const GemmKernels& gemm, const Tiling& tiling,
                 const ProductExtents& extents);

class Multiplication {
 public:
  Multiplication(const GroupedProduct& product, const Epilogue& epilogue, const Runtime& runtime);

  int64_t num_tasks() const { return static_cast<int64_t>(row_blocks_.size()) * column_blocks_; }
  int64_t words_per_thread() const { return layout_.words; }
  int64_t work() const { return work_; }

  void run_task(int64_t index, uint32_t* scratch) const;

 private:
  // One block of rows of one expert; its tasks are the blocks of columns.
  struct RowBlock {
    int64_t expert;
    int64_t begin;  // within the expert
    int64_t rows;
  };
  // Where a task's sums go: to scratch and then to the epilogue, or directly to the output.
  enum class Sums : uint8_t { in_scratch, in_output, past_caches, rounded, rounded_past_caches };
  struct Task {
    Chunk whole = {};
    Sums sums = Sums::in_scratch;
    uint32_t* scratch = nullptr;
    void* c = nullptr;  // row 0 of the sums
    int64_t bytes_of_sum = sizeof(float);
  };
  struct Step {  // one block of k
    const GroupedProduct::Segment* segment;
    int64_t k_begin;
    int64_t k;
    bool first;
    bool last;
  };

  int64_t k_of(const GroupedProduct::Segment& segment, int64_t expert) const {
    return segment.k == kExpertRows ? product_.rows.count(expert) : segment.k;
  }
  int64_t m_of(int64_t expert) const {
    return product_.m == kExpertRows ? product_.rows.count(expert) : product_.m;
  }
  int64_t total_k(int64_t expert) const;
  Tiling choose_tiling(int32_t threads) const;
  int64_t count_row_blocks(int64_t rows) const;
  void list_row_blocks(int64_t rows);
  ProductExtents largest_extents() const;
  bool right_stays_in_place() const;
  bool words_lie_along_k(const PackArgs& block) const;
  bool words_lie_across_k(const PackArgs& block) const;

  PackArgs block_of(const Operand& operand, int64_t expert, int64_t outer_begin,
                    const Step& step) const;
  std::optional<Step> step_from(const GroupedProduct::Segment* segment, int64_t k_begin,
                                int64_t expert) const;
  // Calls function(step, the one after it if there is one).
  template <typename Function>
  void for_each_step(int64_t expert, const Function& function) const;
  TileMode tile_mode(const Task& task, const Step& step) const;
  void place_sums(Task& task) const;
  PackArgs right_panel(const Task& task, const Step& step, int64_t index) const;
  void take_left(const Task& task, const PackArgs& left, const void** table,
                 BlockArgs& multiply) const;
  void multiply_first_rows(const Task& task, const Step& step, const BlockArgs& multiply) const;
  void run_step(const Task& task, const Step& step, const std::optional<Step>& next) const;
  void run_few_rows(const Task& task) const;
  void run_few_rows_step(const Task& task, const Step& step) const;
  void finish_few_rows(const Task& task) const;

  const GroupedProduct& product_;
  const Epilogue& epilogue_;
  const IsaKernels& kernels_;
  const GemmKernels& gemm_;
  bool right_in_place_ = false;
  Tiling tiling_;
  Layout layout_;
  std::vector<RowBlock> row_blocks_;
  int64_t column_blocks_ = 0;
  int64_t total_rows_ = 0;
  int64_t work_ = 0;
};

}  // namespace penstock::cpu::fast
