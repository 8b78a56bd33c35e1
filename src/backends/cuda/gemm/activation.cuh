// SPDX-License-Identifier: Apache-2.0
//
// The nine activations on fp32 values, with derivatives that are torch's at kinks and clamp edges
// (relu: 0 at 0; clamp: 1 on the edge). The kind is a run-time value: visit_* turns it into a type
// once per tile, outside the loops over accumulators.
#pragma once

#include "penstock/experts.h"

namespace penstock::cuda {

// The run-time part of an activation.
struct ActivationParams {
  Activation kind;
  float alpha;
  float limit;
};

struct GatedGradient {
  float value;
  float gate;  // d value / d gate
  float up;    // d value / d up
};

struct PlainGradient {
  float value;
  float input;
};

// exp2 and 1 / x of the special function unit. Without flushing of subnormals the compiler wraps
// each in a comparison and two multiplications; exp(x) below 2^-126 may as well be 0 here.
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * 1.4426950408889634f); }

__device__ __forceinline__ float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp(-x)); }

// 0.5 erfc(|x| / sqrt 2) by our own Chebyshev fit, of degree 9 in t = 1 / (1 + z / 2), of
// log(erfc(z) / t) + z^2 for z up to 10. The fit is good to 5e-8; in fp32 the result is off by at
// most 1.2e-7 absolutely, and by 6e-6 relatively in the tail (z^2 is rounded). erff has branches,
// which keep the epilogues' elements from overlapping and make ptxas spill.
__device__ __forceinline__ float normal_cdf(float x) {
  constexpr float kFit[] = {-0.6808272f,    1.15673375f,    -0.696251869f,
                            -0.0802804306f, 0.00126758672f, 0.0346027985f,
                            0.3866404f,     0.998632789f,   -1.26544797f};
  const float z = fabsf(x) * 0.70710678118654752f;
  const float t = fast_reciprocal(1.0f + 0.5f * z);
  float fit = 0.144930214f;
#pragma unroll
  for (const float coefficient : kFit) fit = fit * t + coefficient;
  const float tail = 0.5f * t * fast_exp(fit - z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}

__device__ __forceinline__ float normal_pdf(float x) {
  return 0.39894228040143268f * fast_exp(-0.5f * x * x);
}

// The one-input functions; a gated activation is one of them times `up`.
struct Silu {
  static __device__ PlainGradient at(float x) {
    const float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  }
};

struct Gelu {
  static __device__ PlainGradient at(float x) {
    const float cdf = normal_cdf(x);
    return {x * cdf, cdf + x * normal_pdf(x)};
  }
};

// 0.5 (1 + tanh y) = sigmoid(2 y): no branch, and no cancellation where tanh nears -1.
struct GeluTanh {
  static __device__ PlainGradient at(float x) {
    constexpr float kScale = 2.0f * 0.79788456080286536f;
    constexpr float kCubic = 0.044715f;
    const float s = sigmoid(kScale * (x + kCubic * x * x * x));
    const float slope = kScale * (1.0f + 3.0f * kCubic * x * x);
    return {x * s, s + x * s * (1.0f - s) * slope};
  }
};

struct Relu {
  static __device__ PlainGradient at(float x) {
    return {x < 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
  }
};

struct ReluSquared {
  static __device__ PlainGradient at(float x) {
    const float positive = x < 0.0f ? 0.0f : x;
    return {positive * positive, 2.0f * positive};
  }
};

template <typename Function>
struct GatedBy {
  static __device__ GatedGradient at(float gate, float up, const ActivationParams&) {
    const PlainGradient f = Function::at(gate);
    return {f.value * up, f.input * up, f.value};
  }
};

struct ClampedSwiglu {
  static __device__ GatedGradient at(float gate, float up, const ActivationParams& params) {
    const float g = gate > params.limit ? params.limit : gate;
    const float u = up > params.limit ? params.limit : up < -params.limit ? -params.limit : up;
    const float s = sigmoid(params.alpha * g);
    const float slope = s * (1.0f + params.alpha * g * (1.0f - s));
    return {g * s * (u + 1.0f), gate <= params.limit ? slope * (u + 1.0f) : 0.0f,
            fabsf(up) <= params.limit ? g * s : 0.0f};
  }
};

template <typename Visitor>
__device__ __forceinline__ void visit_gated(Activation kind, Visitor visit) {
  switch (kind) {
    case Activation::swiglu:
      return visit(GatedBy<Silu>{});
    case Activation::geglu:
      return visit(GatedBy<Gelu>{});
    case Activation::reglu:
      return visit(GatedBy<Relu>{});
    default:
      return visit(ClampedSwiglu{});
  }
}

template <typename Visitor>
__device__ __forceinline__ void visit_plain(Activation kind, Visitor visit) {
  switch (kind) {
    case Activation::silu:
      return visit(Silu{});
    case Activation::gelu:
      return visit(Gelu{});
    case Activation::gelu_tanh:
      return visit(GeluTanh{});
    case Activation::relu:
      return visit(Relu{});
    default:
      return visit(ReluSquared{});
  }
}

}  // namespace penstock::cuda
