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

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ __forceinline__ float normal_cdf(float x) {
  return 0.5f * (1.0f + erff(x * 0.70710678118654752f));
}

__device__ __forceinline__ float normal_pdf(float x) {
  return 0.39894228040143268f * __expf(-0.5f * x * x);
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

struct GeluTanh {
  static __device__ PlainGradient at(float x) {
    constexpr float kScale = 0.79788456080286536f;
    constexpr float kCubic = 0.044715f;
    const float t = tanhf(kScale * (x + kCubic * x * x * x));
    const float slope = kScale * (1.0f + 3.0f * kCubic * x * x);
    return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * slope};
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
