// SPDX-License-Identifier: Apache-2.0
//
// Which rows an expert owns, and where each row's operand and score are. Rows at or past the row
// capacity do not exist, whatever the counts of a dispatched plan say, and gaps are never visited.
// Used by every CPU operation that walks over RowGroups.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/ops.h"
#include "backends/cpu/common/elements.h"

namespace penstock::cpu {

struct RowRange {
  int64_t begin = 0;
  int64_t end = 0;

  bool empty() const { return end <= begin; }
};

inline RowRange rows_of(const RowGroups& groups, int64_t expert) {
  const int64_t begin = groups.expert_offsets.as<const int32_t>()[expert];
  const int64_t count = groups.expert_counts.as<const int32_t>()[expert];
  return {begin, std::min(begin + count, groups.row_capacity)};
}

// Calls function(expert, row) for every row, experts and their rows in rising order.
template <typename Function>
void for_each_row(const RowGroups& groups, Function&& function) {
  for (int64_t expert = 0; expert < groups.num_experts(); ++expert) {
    const RowRange rows = rows_of(groups, expert);
    for (int64_t row = rows.begin; row < rows.end; ++row) function(expert, row);
  }
}

// The row of X or dO that belongs to `row`.
inline int64_t token_of(const RowGroups& groups, int64_t row) {
  return groups.row_to_token.present() ? groups.row_to_token.as<const int32_t>()[row] : row;
}

// The index of `row` in scores and dscores.
inline int64_t slot_of(const RowGroups& groups, int64_t row) {
  return groups.row_to_slot.present() ? groups.row_to_slot.as<const int32_t>()[row] : row;
}

// S of a row; 1 where the call has no scores.
template <typename Acc>
Acc score_of(const RowGroups& groups, const TensorView& scores, int64_t row) {
  return scores.present() ? value_at<Acc>(scores, slot_of(groups, row)) : Acc(1);
}

// `trainable` absent: every expert is.
inline bool is_trainable(const TensorView& trainable, int64_t expert) {
  return !trainable.present() || trainable.as<const uint8_t>()[expert * trainable.stride(0)] != 0;
}

// The slots of a token, in slot order.
inline RowRange slots_of(const TensorView& token_offsets, int32_t top_k, int64_t token) {
  if (!token_offsets.present()) return {token * top_k, (token + 1) * top_k};
  const int32_t* offsets = token_offsets.as<const int32_t>();
  return {offsets[token], offsets[token + 1]};
}

}  // namespace penstock::cpu
