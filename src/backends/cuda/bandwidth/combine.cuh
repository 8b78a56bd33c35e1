// SPDX-License-Identifier: Apache-2.0
//
// What both kernels that combine are told, and how it follows from the operation's arguments.
#pragma once

#include "backend/ops.h"
#include "backends/cuda/bandwidth/elements.cuh"

namespace penstock::cuda {

struct CombineParams {
  const void* rows;
  int64_t row_stride;
  const int32_t* slot_to_row;
  const int32_t* token_offsets;  // null: top_k slots each
  const float* scores;           // null: plain sum
  void* output;
  int64_t output_stride;
  int64_t num_tokens;
  int32_t vectors;  // of eight columns, in a row
  int32_t top_k;
};

inline CombineParams combine_params(const CombineArgs& args) {
  CombineParams params;
  params.rows = args.rows.data;
  params.row_stride = args.rows.stride(0);
  params.slot_to_row = args.plan.slot_to_row.as<int32_t>();
  params.token_offsets = args.plan.token_offsets.as<int32_t>();
  params.scores = args.scores.as<float>();
  params.output = args.output.data;
  params.output_stride = args.output.stride(0);
  params.num_tokens = args.output.size(0);
  params.vectors = static_cast<int32_t>(args.output.size(1) / kVector);
  params.top_k = args.plan.top_k;
  return params;
}

}  // namespace penstock::cuda
