// SPDX-License-Identifier: Apache-2.0
//
// The RowKernels of a vector type V: loops over one contiguous row of any length. A tail shorter
// than a vector goes through a zero-filled buffer and the same arithmetic, so an element's bits do
// not depend on its place. Included by the files that fill an IsaKernels.
#pragma once

#include "backends/cpu/fast/isa/activation.h"
#include "backends/cpu/fast/isa/kernels.h"

namespace penstock::cpu::fast {
namespace {

template <typename V>
struct Rows {
  using F = typename V::F;
  static constexpr int64_t kWidth = V::kWidth;

  static F load_n(const float* from, int64_t count) {
    alignas(64) float buffer[kWidth] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
    return V::load(buffer);
  }
  static void store_n(float* to, F value, int64_t count) {
    alignas(64) float buffer[kWidth];
    V::store(buffer, value);
    for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
  }

  // Elements i .. i + min(kWidth, count - i), as and from floats.
  static F load_at(const float* row, int64_t i, int64_t count) {
    if (i + kWidth <= count) return V::load(row + i);
    return load_n(row + i, count - i);
  }
  static void store_at(float* row, F value, int64_t i, int64_t count) {
    if (i + kWidth <= count) {
      V::store(row + i, value);
    } else {
      store_n(row + i, value, count - i);
    }
  }

  struct Bf16 {
    static F load(const uint16_t* from) { return V::load_bf16(from); }
    static void store(uint16_t* to, F value) { V::store_bf16(to, value); }
  };
  struct F16 {
    static F load(const uint16_t* from) { return V::load_f16(from); }
    static void store(uint16_t* to, F value) { V::store_f16(to, value); }
  };

  template <typename Half>
  static F load_half_at(const uint16_t* row, int64_t i, int64_t count) {
    if (i + kWidth <= count) return Half::load(row + i);
    uint16_t buffer[kWidth] = {};
    for (int64_t j = 0; i + j < count; ++j) buffer[j] = row[i + j];
    return Half::load(buffer);
  }
  template <typename Half>
  static void widen_half(const uint16_t* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth)
      store_at(to, load_half_at<Half>(from, i, count), i, count);
  }
  template <typename Half>
  static void narrow_half(const float* from, uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth) {
      if (i + kWidth <= count) {
        Half::store(to + i, V::load(from + i));
        continue;
      }
      uint16_t buffer[kWidth];
      Half::store(buffer, load_n(from + i, count - i));
      for (int64_t j = 0; i + j < count; ++j) to[i + j] = buffer[j];
    }
  }

  static void widen(Element type, const void* from, float* to, int64_t count) {
    if (type == Element::bf16) return widen_half<Bf16>(static_cast<const uint16_t*>(from), to, count);
    if (type == Element::f16) return widen_half<F16>(static_cast<const uint16_t*>(from), to, count);
    __builtin_memcpy(to, from, static_cast<uint64_t>(count) * sizeof(float));
  }
  static void narrow(Element type, const float* from, void* to, int64_t count) {
    if (type == Element::bf16) return narrow_half<Bf16>(from, static_cast<uint16_t*>(to), count);
    if (type == Element::f16) return narrow_half<F16>(from, static_cast<uint16_t*>(to), count);
    __builtin_memcpy(to, from, static_cast<uint64_t>(count) * sizeof(float));
  }

  static void add(const float* addend, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth)
      store_at(to, load_at(to, i, count) + load_at(addend, i, count), i, count);
  }
  static void scale(float factor, const float* from, float* to, int64_t count) {
    const F f = V::broadcast(factor);
    for (int64_t i = 0; i < count; i += kWidth)
      store_at(to, f * load_at(from, i, count), i, count);
  }

  static void add_scaled(Element type, float factor, const void* from, float* to, int64_t count) {
    const F f = V::broadcast(factor);
    const auto each = [&](const auto& at) {
      for (int64_t i = 0; i < count; i += kWidth)
        store_at(to, V::fma(f, at(i), load_at(to, i, count)), i, count);
    };
    const float* floats = static_cast<const float*>(from);
    const uint16_t* halves = static_cast<const uint16_t*>(from);
    if (type == Element::f32) each([&](int64_t i) { return load_at(floats, i, count); });
    if (type == Element::bf16) each([&](int64_t i) { return load_half_at<Bf16>(halves, i, count); });
    if (type == Element::f16) each([&](int64_t i) { return load_half_at<F16>(halves, i, count); });
  }

  // Lanes are summed by halves: (0 + W/2), ..., until one is left.
  static float dot(const float* left, const float* right, int64_t count) {
    F sum = V::zero();
    for (int64_t i = 0; i < count; i += kWidth)
      sum = V::fma(load_at(left, i, count), load_at(right, i, count), sum);
    alignas(64) float lanes[kWidth];
    V::store(lanes, sum);
    for (int64_t half = kWidth / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
  }

  template <typename Function>
  static void activate(const ActivationParams& params, const ActivationRow& row) {
    const float* up = row.up != nullptr ? row.up : row.gate;  // not used where it is absent
    for (int64_t i = 0; i < row.count; i += kWidth) {
      const F gate = load_at(row.gate, i, row.count);
      const F a = Function::forward(params, gate, load_at(up, i, row.count));
      store_at(row.a, a, i, row.count);
    }
  }

  template <typename Function>
  static void activation_gradient(const ActivationParams& params, const ActivationRow& row) {
    const float* up = row.up != nullptr ? row.up : row.gate;
    const F score = V::broadcast(row.score);
    for (int64_t i = 0; i < row.count; i += kWidth) {
      const F gate = load_at(row.gate, i, row.count);
      const F incoming = score * load_at(row.g, i, row.count);
      const Gradient<V> d = Function::gradient(params, gate, load_at(up, i, row.count), incoming);
      store_at(row.a, d.a, i, row.count);
      store_at(row.d_gate, d.gate, i, row.count);
      if (row.d_up != nullptr) store_at(row.d_up, d.up, i, row.count);
    }
  }

  template <typename Function>
  static constexpr void set_activation(RowKernels& kernels, ActivationKind kind) {
    kernels.activate[static_cast<int>(kind)] = activate<Function>;
    kernels.activation_gradient[static_cast<int>(kind)] = activation_gradient<Function>;
  }

  static constexpr RowKernels kernels() {
    RowKernels result = {};
    result.widen = widen;
    result.narrow = narrow;
    result.add = add;
    result.scale = scale;
    result.add_scaled = add_scaled;
    result.dot = dot;
    set_activation<Gated<V, Silu>>(result, ActivationKind::swiglu);
    set_activation<Gated<V, Gelu>>(result, ActivationKind::geglu);
    set_activation<ReluGated<V>>(result, ActivationKind::reglu);
    set_activation<ClampedSwiglu<V>>(result, ActivationKind::swiglu_clamped);
    set_activation<Single<V, Silu>>(result, ActivationKind::silu);
    set_activation<Single<V, Gelu>>(result, ActivationKind::gelu);
    set_activation<Single<V, GeluTanh>>(result, ActivationKind::gelu_tanh);
    set_activation<ReluSingle<V>>(result, ActivationKind::relu);
    set_activation<ReluSquared<V>>(result, ActivationKind::relu_squared);
    return result;
  }
};

}  // namespace
}  // namespace penstock::cpu::fast
