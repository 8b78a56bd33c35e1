// SPDX-License-Identifier: Apache-2.0
//
// DeepSeek-V3's router on the GPU; routers.cpp says for which problems.
#pragma once

#include "backend/ops.h"

namespace penstock::cuda {

inline constexpr int64_t kMaxSigmoidExperts = 1024;
inline constexpr int64_t kMaxSigmoidGroups = 32;  // one lane each

void sigmoid_topk_forward(const RouterForwardArgs& args, const Context& context);
void sigmoid_topk_backward(const RouterBackwardArgs& args, const Context& context);

}  // namespace penstock::cuda
