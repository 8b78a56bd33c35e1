// SPDX-License-Identifier: Apache-2.0
//
// exp, sigmoid and the normal distribution's tail on vectors V::F, within a few units in the last
// place for every argument; infinities and NaN come out as in the scalar functions. Coefficients
// are our own minimax fits (Remez, relative error below 4e-9 for exp and 3e-8 for the tail).
// Included by isa/activation.h.
#pragma once

#include <cstdint>

namespace penstock::cpu::fast {
namespace {

template <typename V>
struct Math {
  using F = typename V::F;
  using I = typename V::I;
  using U = typename V::U;

  static F constant(float value) { return V::broadcast(value); }

  // 2^n, n in [-126, 127].
  static F power_of_two(U n) { return reinterpret_cast<F>((n + 127u) << 23); }

  static F exp(F x) {
    // Outside [-110, 90] the result is 0 or infinity whatever x is; a NaN passes both selects.
    const F low = constant(-110.0f), high = constant(90.0f);
    F clamped = x < low ? low : x;
    clamped = clamped > high ? high : clamped;
    const I n = V::round_to_int(clamped * constant(1.44269504f));
    const F whole = V::to_float(n);
    F r = V::fma(whole, constant(-0x1.62e4p-1f), clamped);  // ln 2 in two parts, the first exact
    r = V::fma(whole, constant(-0x1.7f7d1cp-20f), r);       // times any n that occurs
    F p = constant(0.00138144562f);
    p = V::fma(p, r, constant(0.00836878024f));
    p = V::fma(p, r, constant(0.0416683944f));
    p = V::fma(p, r, constant(0.166665201f));
    p = V::fma(p, r, constant(0.499999934f));
    p = V::fma(p * r, r, r) + constant(1.0f);
    // In two steps, so that overflow and subnormal results need no case of their own.
    const I half = n >> 1;
    const U rest = reinterpret_cast<U>(n) - reinterpret_cast<U>(half);
    return p * power_of_two(reinterpret_cast<U>(half)) * power_of_two(rest);  // a NaN is still in p
  }

  // sigmoid(x) and sigmoid(-x) = 1 - sigmoid(x), neither by a difference.
  struct Sigmoid {
    F value;
    F complement;
  };
  static F absolute(F x) {
    return reinterpret_cast<F>(reinterpret_cast<I>(x) & 0x7fffffff);
  }
  static Sigmoid sigmoid(F x) {
    const F e = exp(-absolute(x));
    const F larger = constant(1.0f) / (constant(1.0f) + e);
    const F smaller = e * larger;
    const auto negative = x < V::zero();
    return {negative ? smaller : larger, negative ? larger : smaller};
  }

  // Standard normal: P(X <= x), and the density at x.
  struct Normal {
    F cumulative;
    F density;
  };
  static Normal normal(F x) {
    const F a = absolute(x);
    const F gauss = exp(constant(-0.5f) * x * x);
    const F t = constant(1.0f) / V::fma(a, constant(0.35f), constant(1.0f));
    // P(X > a) exp(a^2 / 2) as a polynomial in t.
    F p = constant(-0.0284563739f);
    p = V::fma(p, t, constant(0.140404248f));
    p = V::fma(p, t, constant(-0.247775968f));
    p = V::fma(p, t, constant(0.149233738f));
    p = V::fma(p, t, constant(-0.0154163276f));
    p = V::fma(p, t, constant(0.101704724f));
    p = V::fma(p, t, constant(0.121029604f));
    p = V::fma(p, t, constant(0.139631480f));
    p = V::fma(p, t, constant(0.139645965f));
    p = V::fma(p, t, constant(-1.1029140609e-6f));
    const F tail = p * gauss;
    return {x < V::zero() ? tail : constant(1.0f) - tail, constant(0.398942280f) * gauss};
  }
};

}  // namespace
}  // namespace penstock::cpu::fast
