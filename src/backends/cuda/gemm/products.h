// SPDX-License-Identifier: Apache-2.0
//
// The products by storage type (__nv_bfloat16 or __half): defined in one .cuh each, instantiated in
// one small .cu per type so that they compile side by side. Called by gemm_ops.cpp.
#pragma once

#include "backend/ops.h"

namespace penstock::cuda {

template <typename Element>
void up_projection(const UpProjectionArgs& args, const Context& context);
template <typename Element>
void down_projection(const DownProjectionArgs& args, const Context& context);
template <typename Element>
void down_backward(const DownBackwardArgs& args, const Context& context);
template <typename Element>
void up_backward(const UpBackwardArgs& args, const Context& context);
template <typename Element>
void weight_gradient(const WeightGradientArgs& args, const Context& context);
template <typename Element>
void router_logits(const RouterLogitsArgs& args, const Context& context);
template <typename Element>
void router_logits_backward(const RouterLogitsBackwardArgs& args, const Context& context);
// The router runs in fp32 too.
template <>
void router_logits<float>(const RouterLogitsArgs& args, const Context& context);
template <>
void router_logits_backward<float>(const RouterLogitsBackwardArgs& args, const Context& context);

}  // namespace penstock::cuda
