// SPDX-License-Identifier: Apache-2.0
//
// The nine activations and their gradients on vectors: the formulas of
// backends/cpu/common/activation.h, with the same course at kinks, clamp edges, infinities and
// NaN. Each struct has forward(gate, up) and gradient(gate, up, gradient); the tests compare every
// one with the scalar formulas. Included by isa/rows.h.
#pragma once

#include "backends/cpu/fast/isa/kernels.h"
#include "backends/cpu/fast/isa/math.h"

namespace penstock::cpu::fast {
namespace {

template <typename V>
struct Gradient {
  typename V::F a;     // act(gate, up)
  typename V::F gate;  // gradients
  typename V::F up;
};

// act'(x) of the plain functions, with act(x) itself.
template <typename V>
struct Plain {
  typename V::F value;
  typename V::F derivative;
};

template <typename V>
struct Silu {
  using F = typename V::F;
  static F value(F x) { return x * Math<V>::sigmoid(x).value; }
  static Plain<V> both(F x) {
    const auto s = Math<V>::sigmoid(x);
    return {x * s.value, s.value * V::fma(x, s.complement, V::broadcast(1.0f))};
  }
};

template <typename V>
struct Gelu {
  using F = typename V::F;
  static F value(F x) { return x * Math<V>::normal(x).cumulative; }
  static Plain<V> both(F x) {
    const auto normal = Math<V>::normal(x);
    return {x * normal.cumulative, V::fma(x, normal.density, normal.cumulative)};
  }
};

// 0.5 (1 + tanh z) is sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3).
template <typename V>
struct GeluTanh {
  using F = typename V::F;
  static F scale() { return V::broadcast(1.59576912f); }
  static F argument(F x) {
    return scale() * V::fma(V::broadcast(0.044715f) * x * x, x, x);
  }
  static F value(F x) { return x * Math<V>::sigmoid(argument(x)).value; }
  static Plain<V> both(F x) {
    const auto s = Math<V>::sigmoid(argument(x));
    const F slope = x * (s.value * s.complement);
    const F inner = scale() * V::fma(V::broadcast(0.134145f) * x, x, V::broadcast(1.0f));
    // Far out the slope is 0 and x^2 overflows: their product must not be NaN for a finite x.
    const F added = slope == V::zero() ? slope : slope * inner;
    return {x * s.value, s.value + added};
  }
};

template <typename V>
typename V::F relu_of(typename V::F x) {
  return x <= V::zero() ? V::zero() : x;  // NaN stays
}

// Plain functions of one half, and the same times `up`.
template <typename V, template <typename> typename Function>
struct Single {
  using F = typename V::F;
  static F forward(const ActivationParams&, F gate, F) { return Function<V>::value(gate); }
  static Gradient<V> gradient(const ActivationParams&, F gate, F, F gradient) {
    const Plain<V> f = Function<V>::both(gate);
    return {f.value, gradient * f.derivative, V::zero()};
  }
};

template <typename V, template <typename> typename Function>
struct Gated {
  using F = typename V::F;
  static F forward(const ActivationParams&, F gate, F up) {
    return Function<V>::value(gate) * up;
  }
  static Gradient<V> gradient(const ActivationParams&, F gate, F up, F gradient) {
    const Plain<V> f = Function<V>::both(gate);
    return {f.value * up, gradient * up * f.derivative, gradient * f.value};
  }
};

template <typename V>
struct ReluSingle {
  using F = typename V::F;
  static F forward(const ActivationParams&, F gate, F) { return relu_of<V>(gate); }
  static Gradient<V> gradient(const ActivationParams&, F gate, F, F gradient) {
    return {relu_of<V>(gate), gate <= V::zero() ? V::zero() : gradient, V::zero()};
  }
};

template <typename V>
struct ReluGated {
  using F = typename V::F;
  static F forward(const ActivationParams&, F gate, F up) { return relu_of<V>(gate) * up; }
  static Gradient<V> gradient(const ActivationParams&, F gate, F up, F gradient) {
    const F a = relu_of<V>(gate);
    return {a * up, gate <= V::zero() ? V::zero() : gradient * up, gradient * a};
  }
};

template <typename V>
struct ReluSquared {
  using F = typename V::F;
  static F forward(const ActivationParams&, F gate, F) {
    const F a = relu_of<V>(gate);
    return a * a;
  }
  static Gradient<V> gradient(const ActivationParams&, F gate, F, F gradient) {
    const F a = relu_of<V>(gate);
    const F passed = gradient * (gate + gate);
    return {a * a, gate <= V::zero() ? V::zero() : passed, V::zero()};
  }
};

template <typename V>
struct ClampedSwiglu {
  using F = typename V::F;
  struct Clamped {
    F gate;
    F up;
  };
  static Clamped clamp(const ActivationParams& params, F gate, F up) {
    const F limit = V::broadcast(params.clamp_limit);
    const F below = up > limit ? limit : up;
    return {gate > limit ? limit : gate, below < -limit ? -limit : below};
  }
  static F forward(const ActivationParams& params, F gate, F up) {
    const Clamped c = clamp(params, gate, up);
    const auto s = Math<V>::sigmoid(V::broadcast(params.clamp_alpha) * c.gate);
    return c.gate * s.value * (c.up + V::broadcast(1.0f));
  }
  static Gradient<V> gradient(const ActivationParams& params, F gate, F up, F gradient) {
    const F limit = V::broadcast(params.clamp_limit);
    const F alpha = V::broadcast(params.clamp_alpha);
    const Clamped c = clamp(params, gate, up);
    const auto s = Math<V>::sigmoid(alpha * c.gate);
    const F value = c.gate * s.value;
    const F shifted = c.up + V::broadcast(1.0f);
    const F derivative = V::fma(c.gate, alpha * s.value * s.complement, s.value);
    const F d_gate = gate <= limit ? gradient * shifted * derivative : V::zero();
    const F from_above = up <= limit ? gradient * value : V::zero();
    return {value * shifted, d_gate, up >= -limit ? from_above : V::zero()};
  }
};

}  // namespace
}  // namespace penstock::cpu::fast
