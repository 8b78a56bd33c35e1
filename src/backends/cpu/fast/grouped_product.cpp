// SPDX-License-Identifier: Apache-2.0
//
// See grouped_product.h and multiplication.h.
#include "backends/cpu/fast/grouped_product.h"

#include <algorithm>

#include "backends/cpu/fast/multiplication.h"
#include "backends/cpu/fast/thread_team.h"

namespace penstock::cpu::fast {

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
SumRows Epilogue::destination(const Chunk&) const { return {}; }
void Epilogue::list_touched(const Chunk&, Touched&) const {}

int64_t pack_rows(const GemmKernels& gemm) { return round_up(kPackRows, gemm.mr); }

int64_t scratch_bytes_per_thread(const IsaKernels& kernels, const ProductExtents& extents) {
  const bool pairs = extents.all_bf16 && kernels.bf16.mr != 0;
  const GemmKernels& gemm = pairs ? kernels.bf16 : kernels.f32;
  return 4 * layout_of(kernels, gemm, largest_tiling(gemm, extents.num_bands), extents).words;
}

void multiply_groups(const GroupedProduct& product, const Epilogue& epilogue, Workspace scratch,
                     const Runtime& runtime) {
  const Multiplication multiplication(product, epilogue, runtime);
  const int64_t words = multiplication.words_per_thread();
  const int64_t room = std::max<int64_t>(1, scratch.bytes / 4 / std::max<int64_t>(1, words));
  const int32_t threads = static_cast<int32_t>(std::min<int64_t>(room, runtime.threads));
  auto* const base = static_cast<uint32_t*>(scratch.data);
  parallel_for(
      threads_worth(threads, multiplication.work()), multiplication.num_tasks(),
      [&](int64_t task, int32_t worker) { multiplication.run_task(task, base + worker * words); });
}

}  // namespace penstock::cpu::fast
