// SPDX-License-Identifier: Apache-2.0
//
// One driver for every product of the backend: per expert, C (m, n) = left (m, k) right (n, k)^T,
// cut into tasks of rows x columns that threads take one by one. A task packs blocks of both
// operands, multiplies them into a scratch of float sums, and hands finished rows to an epilogue.
//
// An element's sum runs over k in order, in blocks of k_block elements counted from 0 in each
// segment, each block summed from 0 and added to the ones before: the same whatever the tiling,
// the number of threads, the number of rows, or the element's place.
#pragma once

#include <array>
#include <cstdint>

#include "backend/ops.h"
#include "backends/cpu/fast/isa.h"

namespace penstock::cpu::fast {

// What an operation runs on.
struct Runtime {
  const IsaKernels* kernels;
  int32_t threads;
};

// The rows of each expert: RowGroups, or one group of `count` rows.
class ExpertRows {
 public:
  explicit ExpertRows(const RowGroups& groups);
  static ExpertRows single(int64_t count);

  int64_t num_experts() const { return num_experts_; }
  int64_t begin(int64_t expert) const;
  int64_t count(int64_t expert) const;

 private:
  ExpertRows() = default;

  const int32_t* counts_ = nullptr;  // null: one group
  const int32_t* offsets_ = nullptr;
  int64_t num_experts_ = 1;
  int64_t capacity_ = 0;
};

// (e, o, k) is at base + e * expert_stride + at(outer_index, o) * outer_stride +
// at(k_index, k) * k_stride; an axis that runs over an expert's rows starts at its first row.
struct Operand {
  const void* base = nullptr;
  Element type = Element::f32;
  int64_t expert_stride = 0;
  int64_t outer_stride = 0;
  int64_t k_stride = 0;
  const int32_t* outer_index = nullptr;
  const int32_t* k_index = nullptr;
};

inline constexpr int64_t kMaxPackRows = 128;  // rows that an epilogue gets at a time, at most
inline constexpr int64_t kMaxTouchedRuns = 5 * kMaxPackRows;  // gate and up of H and dH, and A'
inline constexpr int64_t kExpertRows = -1;                    // an extent: the rows of the expert
inline constexpr int64_t kMaxTaskColumns = 256;
// Column blocks start at multiples of this; partial sums for dS cover as many columns.
inline constexpr int64_t kColumnUnit = 64;

// C = sum over segments of left right^T. Bands are products with the same left operand whose
// columns j an epilogue needs together: gate and up.
struct GroupedProduct {
  struct Segment {
    Operand left;
    std::array<Operand, 2> right;  // by band
    int64_t k = 0;                 // or kExpertRows
  };

  ExpertRows rows;
  int64_t m = kExpertRows;
  int64_t n = 0;
  int32_t num_bands = 1;
  int32_t num_segments = 1;
  std::array<Segment, 3> segments = {};  // two halves and a term of low rank at most
};

// Finished sums: rows row_begin .. row_begin + rows of C (absolute rows where m is kExpertRows),
// columns col_begin .. col_begin + cols, which is at most kMaxTaskColumns / num_bands. An epilogue
// may overwrite them.
struct Chunk {
  int64_t expert;
  int64_t row_begin;
  int64_t rows;
  int64_t col_begin;
  int64_t cols;
  float* sums;
  int64_t row_stride;
  int64_t band_stride;

  float* row(int64_t i, int32_t band = 0) const {
    return sums + i * row_stride + band * band_stride;
  }
};

// Contiguous rows to which an epilogue would do no more than round a block of sums.
enum class NextUse : uint8_t { soon, distant };
struct SumRows {
  void* data = nullptr;  // null: there are none
  Element type = Element::f32;
  int64_t row_stride = 0;
  NextUse next_use = NextUse::soon;
};

class Epilogue {
 public:
  virtual void apply(const Chunk& chunk) const = 0;
  // Where the sums of the block may go directly, so that `apply` has nothing left to do. `block`
  // has no sums yet.
  virtual SumRows destination(const Chunk& block) const;
  // What `apply` will read and write besides the sums: contiguous runs of `bytes` each. They are
  // fetched while the sums are computed.
  struct Touched {
    std::array<const void*, kMaxTouchedRuns> at;
    int64_t count = 0;
    int64_t bytes = 0;

    void add(const void* run) { at[static_cast<size_t>(count++)] = run; }
  };
  virtual void list_touched(const Chunk& block, Touched& touched) const;
  // Whether an expert's product is not wanted; k is its number of rows where k is kExpertRows.
  virtual bool skips(int64_t expert, int64_t k) const;

 protected:
  Epilogue() = default;
  ~Epilogue() = default;
  Epilogue(const Epilogue&) = default;
  Epilogue& operator=(const Epilogue&) = default;
};

// What the scratch of a product depends on; kExpertRows extents by their upper bound.
struct ProductExtents {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int32_t num_bands = 1;
  bool all_bf16 = false;
};

// Bytes per thread, growing with every extent.
int64_t scratch_bytes_per_thread(const IsaKernels& kernels, const ProductExtents& extents);

// Rows of one task's block: what a caller who pads groups would pad to.
int64_t pack_rows(const GemmKernels& gemm);

void multiply_groups(const GroupedProduct& product, const Epilogue& epilogue, Workspace scratch,
                     const Runtime& runtime);

}  // namespace penstock::cpu::fast
