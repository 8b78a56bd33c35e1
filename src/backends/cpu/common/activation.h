// SPDX-License-Identifier: Apache-2.0
//
// The nine activations and their gradients, one element at a time: the only place of the CPU
// backends where the formulas are written down. Vectorised code is tested against this.
//
// Gradients follow torch where the function has a kink: relu passes nothing at 0, and what is not
// passed is 0 whatever the incoming value (a select, not a product, so a NaN does not get through).
// A clamp passes the gradient at exactly its limit, as torch 2.9 does (2.15 passes 0 there), and
// none to a NaN. NaN and infinities take torch's course through every formula.
// sigmoid(-x) stands for 1 - sigmoid(x) and erfc for 1 + erf, because the differences cancel.
#pragma once

#include <cmath>

#include "backend/ops.h"

namespace penstock::cpu {

template <typename Acc>
struct HalfGradients {
  Acc gate;  // of the only half, for activations without a gate
  Acc up;    // 0 without a gate
};

template <typename Acc>
Acc sigmoid(Acc x) {
  if (x < Acc(0)) {
    const Acc e = std::exp(x);  // never overflows, and keeps the small results exact
    return e / (Acc(1) + e);
  }
  return Acc(1) / (Acc(1) + std::exp(-x));
}

template <typename Acc>
Acc silu(Acc x) {
  return x * sigmoid(x);
}

template <typename Acc>
Acc silu_derivative(Acc x) {
  return sigmoid(x) * (Acc(1) + x * sigmoid(-x));
}

template <typename Acc>
Acc gelu(Acc x) {
  constexpr Acc kSqrtHalf = Acc(0.70710678118654752440L);
  return x * (Acc(0.5) * std::erfc(-x * kSqrtHalf));
}

template <typename Acc>
Acc gelu_derivative(Acc x) {
  constexpr Acc kSqrtHalf = Acc(0.70710678118654752440L);
  constexpr Acc kInvSqrtTwoPi = Acc(0.39894228040143267794L);
  const Acc density = kInvSqrtTwoPi * std::exp(Acc(-0.5) * x * x);
  return Acc(0.5) * std::erfc(-x * kSqrtHalf) + x * density;
}

// 0.5 (1 + tanh z) is sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3).
template <typename Acc>
Acc gelu_tanh_argument(Acc x) {
  constexpr Acc kTwoSqrtTwoOverPi = Acc(1.59576912160573071176L);
  return kTwoSqrtTwoOverPi * (x + Acc(0.044715) * x * x * x);
}

template <typename Acc>
Acc gelu_tanh(Acc x) {
  return x * sigmoid(gelu_tanh_argument(x));
}

template <typename Acc>
Acc gelu_tanh_derivative(Acc x) {
  constexpr Acc kTwoSqrtTwoOverPi = Acc(1.59576912160573071176L);
  const Acc argument = gelu_tanh_argument(x);
  const Acc value = sigmoid(argument);
  const Acc slope = x * (value * sigmoid(-argument));
  // Far out the slope is 0 and x^2 overflows: their product must not be NaN for a finite x.
  if (slope == Acc(0)) return value + slope;
  return value + slope * (kTwoSqrtTwoOverPi * (Acc(1) + Acc(3 * 0.044715L) * x * x));
}

template <typename Acc>
Acc relu(Acc x) {
  return x <= Acc(0) ? Acc(0) : x;  // NaN stays
}

// The gradient that relu lets through.
template <typename Acc>
Acc pass_relu(Acc x, Acc gradient) {
  return x <= Acc(0) ? Acc(0) : gradient;
}

// A NaN stays NaN.
template <typename Acc>
Acc clamp_above(Acc x, Acc limit) {
  return x > limit ? limit : x;
}

template <typename Acc>
Acc clamp_both(Acc x, Acc limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}

// act(gate, up); `up` is ignored by activations without a gate.
template <typename Acc>
Acc activate(const ActivationSpec& spec, Acc gate, Acc up) {
  switch (spec.kind) {
    case Activation::swiglu:
      return silu(gate) * up;
    case Activation::geglu:
      return gelu(gate) * up;
    case Activation::reglu:
      return relu(gate) * up;
    case Activation::swiglu_clamped: {
      const Acc limit = static_cast<Acc>(spec.clamp_limit);
      const Acc g = clamp_above(gate, limit);
      const Acc u = clamp_both(up, limit);
      return g * sigmoid(static_cast<Acc>(spec.clamp_alpha) * g) * (u + Acc(1));
    }
    case Activation::silu:
      return silu(gate);
    case Activation::gelu:
      return gelu(gate);
    case Activation::gelu_tanh:
      return gelu_tanh(gate);
    case Activation::relu:
      return relu(gate);
    case Activation::relu_squared:
      return relu(gate) * relu(gate);
  }
  return Acc(0);
}

template <typename Acc>
HalfGradients<Acc> clamped_swiglu_gradient(const ActivationSpec& spec, Acc gate, Acc up,
                                           Acc gradient) {
  const Acc limit = static_cast<Acc>(spec.clamp_limit);
  const Acc alpha = static_cast<Acc>(spec.clamp_alpha);
  const Acc g = clamp_above(gate, limit);
  const Acc u = clamp_both(up, limit);
  const Acc s = sigmoid(alpha * g);
  const Acc derivative = s + g * (alpha * s * sigmoid(-alpha * g));
  const bool gate_inside = gate <= limit;
  const bool up_inside = up >= -limit && up <= limit;
  return {gate_inside ? gradient * (u + Acc(1)) * derivative : Acc(0),
          up_inside ? gradient * (g * s) : Acc(0)};
}

// Gradients with respect to gate and up, given that of act(gate, up).
template <typename Acc>
HalfGradients<Acc> activation_gradient(const ActivationSpec& spec, Acc gate, Acc up, Acc gradient) {
  switch (spec.kind) {
    case Activation::swiglu:
      return {gradient * up * silu_derivative(gate), gradient * silu(gate)};
    case Activation::geglu:
      return {gradient * up * gelu_derivative(gate), gradient * gelu(gate)};
    case Activation::reglu:
      return {pass_relu(gate, gradient * up), gradient * relu(gate)};
    case Activation::swiglu_clamped:
      return clamped_swiglu_gradient(spec, gate, up, gradient);
    case Activation::silu:
      return {gradient * silu_derivative(gate), Acc(0)};
    case Activation::gelu:
      return {gradient * gelu_derivative(gate), Acc(0)};
    case Activation::gelu_tanh:
      return {gradient * gelu_tanh_derivative(gate), Acc(0)};
    case Activation::relu:
      return {pass_relu(gate, gradient), Acc(0)};
    case Activation::relu_squared:
      return {pass_relu(gate, gradient * Acc(2) * gate), Acc(0)};
  }
  return {Acc(0), Acc(0)};
}

}  // namespace penstock::cpu
