// SPDX-License-Identifier: Apache-2.0
//
// What moves rows without a product: combine, scale_rows, and the scores' gradient from its
// partial sums.
#include <algorithm>
#include <array>

#include "backends/cpu/common/rows.h"
#include "backends/cpu/fast/operands.h"
#include "backends/cpu/fast/operations.h"
#include "backends/cpu/fast/thread_team.h"

namespace penstock::cpu::fast {
namespace {

constexpr int64_t kRowsPerTask = 32;

int64_t blocks_of(int64_t count) { return (count + kRowsPerTask - 1) / kRowsPerTask; }

void combine_token(const CombineArgs& args, const RowKernels& kernels, int64_t token) {
  const StorageRows rows(args.rows);
  const StorageRows output(args.output);
  const int32_t* slot_to_row = args.plan.slot_to_row.as<const int32_t>();
  const RowRange slots = slots_of(args.plan.token_offsets, args.plan.top_k, token);
  const int64_t length = args.output.size(1);
  for (int64_t col = 0; col < length; col += kMaxTaskColumns) {
    const int64_t count = std::min(kMaxTaskColumns, length - col);
    alignas(64) float sum[kMaxTaskColumns] = {};
    for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
      if (slot_to_row[slot] < 0) continue;
      const float score = args.scores.present() ? value_at<float>(args.scores, slot) : 1.0f;
      kernels.add_scaled(rows.type(), score, rows.at(slot_to_row[slot], col), sum, count);
    }
    kernels.narrow(output.type(), sum, output.at(token, col), count);
  }
}

// Calls function(row) for every row of every expert, in tasks of a few rows.
template <typename Function>
void for_each_row(const RowGroups& groups, int64_t work_per_row, const Runtime& runtime,
                  const Function& function) {
  const int64_t num_experts = groups.num_experts();
  const int32_t threads = threads_worth(runtime.threads, groups.row_capacity * work_per_row);
  // Over all rows up to the last expert's end; those in gaps belong to none.
  parallel_for(threads, blocks_of(groups.row_capacity), [&](int64_t task, int32_t) {
    const int64_t begin = task * kRowsPerTask;
    const int64_t end = std::min(begin + kRowsPerTask, groups.row_capacity);
    const int32_t* offsets = groups.expert_offsets.as<const int32_t>();
    int64_t expert = std::upper_bound(offsets, offsets + num_experts, begin) - offsets - 1;
    for (expert = std::max<int64_t>(expert, 0); expert < num_experts && offsets[expert] < end;
         ++expert) {
      const RowRange rows = rows_of(groups, expert);
      for (int64_t row = std::max(begin, rows.begin); row < std::min(end, rows.end); ++row)
        function(expert, row);
    }
  });
}

float dot_with_bias(const ScoreGradientArgs& args, const RowKernels& kernels, int64_t expert,
                    int64_t row) {
  const StorageRows d_output(args.d_output);
  const int64_t length = args.d_output.size(1);
  const int64_t token = token_of(args.rows, row);
  float sum = 0.0f;
  for (int64_t col = 0; col < length; col += kMaxTaskColumns) {
    const int64_t count = std::min(kMaxTaskColumns, length - col);
    alignas(64) float bias[kMaxTaskColumns];
    alignas(64) float gradient[kMaxTaskColumns];
    read_vector(args.b2, expert, col, count, bias);
    kernels.widen(d_output.type(), d_output.at(token, col), gradient, count);
    sum += kernels.dot(gradient, bias, count);
  }
  return sum;
}

}  // namespace

void combine(const CombineArgs& args, const Runtime& runtime) {
  const int64_t num_tokens = args.output.size(0);
  const int64_t work = args.plan.slot_to_row.numel() * args.output.size(1);
  parallel_for(threads_worth(runtime.threads, work), blocks_of(num_tokens),
               [&](int64_t task, int32_t) {
                 const int64_t begin = task * kRowsPerTask;
                 const int64_t end = std::min(begin + kRowsPerTask, num_tokens);
                 for (int64_t token = begin; token < end; ++token)
                   combine_token(args, runtime.kernels->rows, token);
               });
}

void scale_rows(const ScaleRowsArgs& args, const Runtime& runtime) {
  const RowKernels& kernels = runtime.kernels->rows;
  const StorageRows input(args.input);
  const StorageRows output(args.output);
  const int64_t length = args.input.size(1);
  for_each_row(args.rows, length, runtime, [&](int64_t, int64_t row) {
    const float score = score_of<float>(args.rows, args.scores, row);
    for (int64_t col = 0; col < length; col += kMaxTaskColumns) {
      const int64_t count = std::min(kMaxTaskColumns, length - col);
      alignas(64) float buffer[kMaxTaskColumns];
      kernels.widen(input.type(), input.at(row, col), buffer, count);
      kernels.scale(score, buffer, buffer, count);
      kernels.narrow(output.type(), buffer, output.at(row, col), count);
    }
  });
}

void score_gradient(const ScoreGradientArgs& args, const Runtime& runtime) {
  for (int64_t slot = 0; slot < args.dscores.numel(); ++slot)
    set_value<float>(args.dscores, slot, 0.0f);
  const int64_t num_partials = args.partials.size(1);
  const int64_t work = num_partials + (args.b2.present() ? args.d_output.size(1) : 0);
  for_each_row(args.rows, work, runtime, [&](int64_t expert, int64_t row) {
    const float* partials = args.partials.as<const float>() + row * args.partials.stride(0);
    float sum = 0.0f;
    for (int64_t i = 0; i < num_partials; ++i) sum += partials[i * args.partials.stride(1)];
    if (args.b2.present()) sum += dot_with_bias(args, runtime.kernels->rows, expert, row);
    set_value<float>(args.dscores, slot_of(args.rows, row), sum);
  });
}

}  // namespace penstock::cpu::fast
