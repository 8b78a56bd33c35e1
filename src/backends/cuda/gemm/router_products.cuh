// SPDX-License-Identifier: Apache-2.0
//
// The router's products as instances of the grouped GEMM: logits = X Wr^T (one group, fp32 out),
// dX = dlogits Wr and dWr = dlogits^T X. See router_scratch.h for how fp32 dlogits become operands.
//
// The scale of the split is a power of two that brings the largest |dlogits| to about 2^14 for fp16
// (whose range would otherwise lose small gradients) and is 1 for bf16; products undo it exactly.
#pragma once

#include <type_traits>

#include "backends/cuda/gemm/epilogue_store.cuh"
#include "backends/cuda/gemm/launch.cuh"
#include "backends/cuda/gemm/router_scratch.h"
#include "backends/cuda/gemm/store_products.h"

namespace penstock::cuda {

// A product whose ring has as many stages as fit: with few tokens a block hardly multiplies, and
// every time the ring is empty it waits for memory.
template <typename G>
struct DeepRing : G {
  static constexpr int kStages = G::kStagesThatFit;
  static constexpr int kSharedBytes =
      G::kSharedBytes + (kStages - G::kStages) * G::Tile::kStageBytes;
  using RingType = Ring<typename G::Tile, kStages>;
  static_assert(kStages * 16 <= G::kBarrierBytes, "two barriers a stage");
};

template <typename Element>
struct LogitsLauncher {
  const RowProblem& problem;
  const TensorView& logits;
  const Context& context;

  template <int kTileM, Major kMajor>
  void run() const {
    const bool vectors = logits.stride(0) % 4 == 0 && logits.size(1) % 4 == 0 &&
                         reinterpret_cast<uintptr_t>(logits.data) % 16 == 0;
    constexpr int kTileN = kTileM == 64 ? kFewTokensLogitsTileN : kLogitsTileN;
    using TileType = Tile<Element, kTileM, kTileN, Major::k, kMajor, 1>;
    if (vectors) {
      start<TileType, RowAlignment::vector>();
    } else {
      start<TileType, RowAlignment::element>();
    }
  }

  template <typename TileType, RowAlignment kAlignment>
  void start() const {
    using Plain = RowGemm<TileType, 1, GatheredRows, StoreWideEpilogue<TileType, kAlignment>>;
    using G = std::conditional_t<TileType::kM == 64, DeepRing<Plain>, Plain>;
    launch_rows<G, TileType::kN>(
        problem, {rows_of(logits), static_cast<int32_t>(problem.b.n_extent)}, context);
  }
};

template <typename Element>
void router_logits(const RouterLogitsArgs& args, const Context& context) {
  const int64_t tokens = args.x.size(0);
  const int64_t d = args.x.size(1);
  const TensorView& w = args.router_weight;
  const RowProblem problem = {"router_logits",
                              {"x", args.x.data, tokens, args.x.stride(0), 1, 0, d},
                              {"router_weight",
                               w.dtype,
                               {w.data, nullptr},
                               1,
                               1,
                               0,
                               w.size(0),
                               w.stride(0),
                               d,
                               w.stride(1)},
                              {nullptr, nullptr, 1, static_cast<int32_t>(tokens)},
                              tokens};
  const LogitsLauncher<Element> launcher{problem, args.logits, context};
  if (token_tile(tokens, 1) == 64) {
    launcher.template run<64, Major::k>();
  } else {
    launcher.template run<128, Major::k>();
  }
}

// For fp16 alone, since bf16 has fp32's range: the largest |dlogits| as the bits of a positive
// float, whose order is that of integers. NaN counts as the largest and only ever meets NaN
// results.
static __global__ void largest_bits(const float* dlogits, int64_t count, int32_t* largest) {
  int32_t best = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    best = max(best, __float_as_int(dlogits[i]) & 0x7fffffff);
  }
  best = __reduce_max_sync(~0u, best);
  if (threadIdx.x % 32 == 0) atomicMax(largest, best);
}

struct SplitParams {
  const float* dlogits;
  int64_t tokens;
  int64_t experts;
  int64_t padded_experts;
  void* terms;
  float* scale;  // fp16 in: largest bits; out: factor and inverse, written by split_scale
  int32_t* counts;
  int32_t* offsets;
  int32_t slices;
};

// One block: the scale, and the slices of the tokens as groups.
template <typename Element>
__global__ void split_scale(SplitParams params) {
  arch::wait_for_earlier_launches();
  if (threadIdx.x == 0) {
    int exponent = 0;
    if constexpr (kDTypeOf<Element> == DType::float16) {
      const int biased = __float_as_int(params.scale[0]) >> 23;
      exponent = biased == 0 || biased == 255 ? 0 : min(120, 14 - (biased - 127));
    }
    params.scale[0] = ldexpf(1.0f, exponent);
    params.scale[1] = ldexpf(1.0f, -exponent);
  }
  for (int32_t slice = threadIdx.x; slice < params.slices; slice += blockDim.x) {
    const int64_t first = params.tokens * slice / params.slices;
    params.offsets[slice] = static_cast<int32_t>(first);
    params.counts[slice] =
        static_cast<int32_t>(params.tokens * (slice + 1) / params.slices - first);
  }
}

template <typename Element>
__global__ void split_dlogits(SplitParams params) {
  arch::wait_for_earlier_launches();
  const int64_t count = params.tokens * params.padded_experts;
  const float scale = params.scale[0];
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t token = i / params.padded_experts;
    const int64_t expert = i - token * params.padded_experts;
    const float value =
        expert < params.experts ? params.dlogits[token * params.experts + expert] * scale : 0.0f;
    const Element first = static_cast<Element>(value);
    Element* high =
        static_cast<Element*>(params.terms) + 2 * token * params.padded_experts + expert;
    *high = first;
    high[params.padded_experts] = static_cast<Element>(value - static_cast<float>(first));
  }
}

struct SlicesParams {
  const float* partials;
  int32_t slices;
  int64_t slice_stride;
  int64_t term_stride;
  int64_t count;
  const float* inverse;
};

// dWr = inverse scale times the slices' sum, in slice order, of both terms' products.
template <typename Out>
__global__ void sum_slices(SlicesParams params, Out* out) {
  arch::wait_for_earlier_launches();
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < params.count;
       i += int64_t{gridDim.x} * blockDim.x) {
    float sum = 0.0f;
    for (int32_t slice = 0; slice < params.slices; ++slice) {
      const float* high = params.partials + slice * params.slice_stride + i;
      sum += *high + high[params.term_stride];
    }
    out[i] = static_cast<Out>(sum * *params.inverse);
  }
}

inline unsigned blocks_for(int64_t count, int threads) {
  return static_cast<unsigned>(std::clamp<int64_t>((count + threads - 1) / threads, 1, 1056));
}

template <typename Element>
void split(const SplitParams& params, const Context& context) {
  constexpr int kThreads = 256;
  if constexpr (kDTypeOf<Element> == DType::float16) {
    const cudaStream_t stream = stream_of(context);
    check("cudaMemsetAsync", cudaMemsetAsync(params.scale, 0, 8, stream));
    const int64_t count = params.tokens * params.experts;
    if (count > 0) {
      largest_bits<<<blocks_for(count, kThreads), kThreads, 0, stream>>>(
          params.dlogits, count, reinterpret_cast<int32_t*>(params.scale));
      check_launch("largest_bits");
    }
  }
  launch_dependent({"split_scale", dim3(1), 32}, context, split_scale<Element>, params);
  if (params.tokens == 0) return;
  const unsigned blocks = blocks_for(params.tokens * params.padded_experts, kThreads);
  launch_dependent({"split_dlogits", dim3(blocks), kThreads}, context, split_dlogits<Element>,
                   params);
}

template <typename Element>
void router_input_gradient(const RouterLogitsBackwardArgs& args, const SplitParams& terms,
                           const Context& context) {
  const TensorView& w = args.router_weight;
  const int64_t padded = terms.padded_experts;
  // Both terms meet the same weights, whose rows past E arrive as zeros.
  const RowProblem problem = {
      "router_logits_backward",
      {"dlogits", terms.terms, terms.tokens, 2 * padded, 2, padded, padded},
      {"router_weight", w.dtype, {w.data, w.data}, 2, 1, 0, w.size(1), 1, w.size(0), w.stride(0)},
      {nullptr, nullptr, 1, static_cast<int32_t>(terms.tokens)},
      terms.tokens};
  store_rows<Element>(problem, {args.dx, {}, terms.scale + 1, args.addend}, context);
}

template <typename Element>
void router_weight_gradient(const RouterLogitsBackwardArgs& args, const SplitParams& terms,
                            float* partials, const Context& context) {
  const Device device = args.x.device;
  const int64_t d = args.x.size(1);
  WeightGradientArgs products = {};
  const auto ints = [&](int32_t* data, int64_t count) {
    return TensorView::contiguous(data, DType::int32, {count}, device);
  };
  products.rows.expert_counts = ints(terms.counts, terms.slices);
  products.rows.expert_offsets = ints(terms.offsets, terms.slices);
  products.rows.row_capacity = terms.tokens;
  products.left = TensorView::contiguous(terms.terms, args.x.dtype,
                                         {terms.tokens, 2 * terms.padded_experts}, device);
  products.left_access = RowAccess::direct;
  products.right = args.x;
  products.right_access = RowAccess::gathered;
  const int64_t term = terms.padded_experts * d;
  products.out[0] = {partials, DType::float32, 2 * term, d, 1};
  products.mode = GradMode::overwrite;
  weight_gradient<Element>(products, context);
  const SlicesParams slices = {partials, terms.slices,      2 * term,
                               term,     terms.experts * d, terms.scale + 1};
  const Launch launch = {"sum_slices", dim3(blocks_for(slices.count, 256)), 256};
  if (args.drouter_weight.dtype == DType::float32) {
    launch_dependent(launch, context, sum_slices<float>, slices,
                     args.drouter_weight.template as<float>());
  } else {
    launch_dependent(launch, context, sum_slices<Element>, slices,
                     args.drouter_weight.template as<Element>());
  }
}

template <typename Element>
void router_logits_backward(const RouterLogitsBackwardArgs& args, const Context& context) {
  const RouterProblem problem = {args.x.size(0), args.x.size(1), args.dlogits.size(1), args.x.dtype,
                                 args.x.device};
  const RouterScratch layout = router_scratch(problem);
  const auto at = [&](int64_t offset) {
    return static_cast<void*>(static_cast<uint8_t*>(args.workspace.data) + offset);
  };
  const SplitParams terms = {args.dlogits.template as<float>(),
                             problem.num_tokens,
                             problem.num_experts,
                             layout.padded_experts,
                             at(layout.terms),
                             static_cast<float*>(at(layout.scale)),
                             static_cast<int32_t*>(at(layout.counts)),
                             static_cast<int32_t*>(at(layout.offsets)),
                             layout.slices};
  split<Element>(terms, context);
  if (args.dx.present()) router_input_gradient<Element>(args, terms, context);
  if (args.drouter_weight.present()) {
    router_weight_gradient<Element>(args, terms, static_cast<float*>(at(layout.partials)), context);
  }
}

}  // namespace penstock::cuda
