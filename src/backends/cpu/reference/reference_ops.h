// SPDX-License-Identifier: Apache-2.0
//
// The reference backend's operations, one per entry of the table in backend/ops.h. Single-threaded
// loops without scratch; every sum runs in order of its index, in accumulator_of(dtype), and is
// rounded once when stored. reference_backend.cpp puts them into the table.
#pragma once

#include "backend/ops.h"

namespace penstock::cpu::reference {

void router_logits(const RouterLogitsArgs& args, const Context& context);
void router_logits_backward(const RouterLogitsBackwardArgs& args, const Context& context);
void router_forward(const RouterForwardArgs& args, const Context& context);
void router_backward(const RouterBackwardArgs& args, const Context& context);
void up_projection(const UpProjectionArgs& args, const Context& context);
void down_projection(const DownProjectionArgs& args, const Context& context);
void combine(const CombineArgs& args, const Context& context);
void scale_rows(const ScaleRowsArgs& args, const Context& context);
void down_backward(const DownBackwardArgs& args, const Context& context);
void score_gradient(const ScoreGradientArgs& args, const Context& context);
void up_backward(const UpBackwardArgs& args, const Context& context);
void weight_gradient(const WeightGradientArgs& args, const Context& context);
void bias_gradient(const BiasGradientArgs& args, const Context& context);

}  // namespace penstock::cpu::reference
