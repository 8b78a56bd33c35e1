// SPDX-License-Identifier: Apache-2.0
//
// The matrix products of the CUDA backend: one launcher per operation of the backend table, plus
// the host functions that answer for them. Every launcher is asynchronous on context.stream,
// allocates nothing and reads nothing from the device, so all of them can be captured in a graph.
//
// Called by cuda_backend.cpp (the table) and by the check program.
#pragma once

#include <cstdint>
#include <string>

#include "backend/ops.h"

namespace penstock::cuda {

// Empty if every product of the problem can run here, otherwise the reason by name.
std::string why_not_products(const ExpertsProblem& problem);
std::string why_not_products_dtype(DType dtype);
// The same for the router's operations: x and its weight, or fp32 logits.
std::string why_not_router_dtype(DType dtype);

// Scratch that one of the expert products needs, and that the router's products need.
int64_t products_scratch_bytes(const ExpertsProblem& problem);
int64_t router_products_scratch_bytes(const RouterProblem& problem);

// Columns of DownBackwardArgs::partials, and rows of a tile of the grouped products.
int64_t score_partials(const ExpertsProblem& problem);
int64_t tile_rows(const ExpertsProblem& problem);

void launch_up_projection(const UpProjectionArgs& args, const Context& context);
void launch_down_projection(const DownProjectionArgs& args, const Context& context);
void launch_down_backward(const DownBackwardArgs& args, const Context& context);
void launch_up_backward(const UpBackwardArgs& args, const Context& context);
void launch_weight_gradient(const WeightGradientArgs& args, const Context& context);
void launch_router_logits(const RouterLogitsArgs& args, const Context& context);
void launch_router_logits_backward(const RouterLogitsBackwardArgs& args, const Context& context);

}  // namespace penstock::cuda
