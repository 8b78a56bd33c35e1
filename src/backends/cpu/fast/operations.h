// SPDX-License-Identifier: Apache-2.0
//
// The operations of the fast backend's table, each on a Runtime instead of a Context, and the
// exact scratch that they share. Called by fast_backend.cpp, which chooses the Runtime.
#pragma once

#include "backend/ops.h"
#include "backends/cpu/fast/grouped_product.h"

namespace penstock::cpu::fast {

void router_logits(const RouterLogitsArgs& args, const Runtime& runtime);
void router_logits_backward(const RouterLogitsBackwardArgs& args, const Runtime& runtime);
void router_forward(const RouterForwardArgs& args, const Runtime& runtime);
void router_backward(const RouterBackwardArgs& args, const Runtime& runtime);
void up_projection(const UpProjectionArgs& args, const Runtime& runtime);
void down_projection(const DownProjectionArgs& args, const Runtime& runtime);
void combine(const CombineArgs& args, const Runtime& runtime);
void scale_rows(const ScaleRowsArgs& args, const Runtime& runtime);
void down_backward(const DownBackwardArgs& args, const Runtime& runtime);
void score_gradient(const ScoreGradientArgs& args, const Runtime& runtime);
void up_backward(const UpBackwardArgs& args, const Runtime& runtime);
void weight_gradient(const WeightGradientArgs& args, const Runtime& runtime);
void bias_gradient(const BiasGradientArgs& args, const Runtime& runtime);

int64_t scratch_bytes(const ExpertsProblem& problem, const Runtime& runtime);
int64_t router_scratch_bytes(const RouterProblem& problem, const Runtime& runtime);
int64_t score_partials(const ExpertsProblem& problem);

}  // namespace penstock::cpu::fast
