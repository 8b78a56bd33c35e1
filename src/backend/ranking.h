// SPDX-License-Identifier: Apache-2.0
//
// What routers rank by in fp32, as stated sequences of IEEE operations, each rounded once, so that
// every backend ranks alike to the last bit: a library's exponential may differ in that bit, and
// would then break a tie differently. Scores do not come from here. The CPU's files that include
// this are compiled without contraction; on a GPU the intrinsics say the same.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define PENSTOCK_HOST_DEVICE __host__ __device__
#else
#define PENSTOCK_HOST_DEVICE
#endif

namespace penstock::ranking {

#ifdef __CUDA_ARCH__
inline __device__ float plus(float a, float b) { return __fadd_rn(a, b); }
inline __device__ float minus(float a, float b) { return __fsub_rn(a, b); }
inline __device__ float times(float a, float b) { return __fmul_rn(a, b); }
inline __device__ float over(float a, float b) { return __fdiv_rn(a, b); }
#else
inline PENSTOCK_HOST_DEVICE float plus(float a, float b) { return a + b; }
inline PENSTOCK_HOST_DEVICE float minus(float a, float b) { return a - b; }
inline PENSTOCK_HOST_DEVICE float times(float a, float b) { return a * b; }
inline PENSTOCK_HOST_DEVICE float over(float a, float b) { return a / b; }
#endif

// exp(x) of x up to 88 within 2e-7 of itself: 2^n by exponent bits times the Taylor polynomial of
// degree 7 of the rest, which is at most ln(2) / 2. Below -87 it is 0; a NaN stays one.
inline PENSTOCK_HOST_DEVICE float exponential_below_88(float x) {
  constexpr float kLog2OfE = 0x1.715476p0f;
  constexpr float kLn2High = 0x1.62ep-1f;  // times an integer of 9 bits it is exact
  constexpr float kLn2Low = 0x1.0bfbe8p-15f;
  constexpr float kRounder = 0x1.8p23f;  // adding it leaves the nearest integer in the last bits
  const float rounded = plus(times(x, kLog2OfE), kRounder);
  const float n = minus(rounded, kRounder);
  const float rest = minus(minus(x, times(n, kLn2High)), times(n, kLn2Low));
  constexpr float kInverseFactorials[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6,
                                          1.0f / 2,   1.0f,       1.0f};
  float sum = 1.0f / 5040;
  for (const float coefficient : kInverseFactorials) sum = plus(times(sum, rest), coefficient);
  constexpr uint32_t kExponentBias = 127;
  constexpr int kMantissaBits = 23;  // those of kRounder are shifted out
  const uint32_t exponent =
      (std::bit_cast<uint32_t>(rounded) << kMantissaBits) + (kExponentBias << kMantissaBits);
  return x < -87.0f ? 0.0f : times(sum, std::bit_cast<float>(exponent));
}

// exp(x) of any x; above 88 it is infinity.
inline PENSTOCK_HOST_DEVICE float exponential(float x) {
  if (x != x) return x;
  return x > 88.0f ? std::numeric_limits<float>::infinity() : exponential_below_88(x);
}

// 1 / (1 + exp(-logit)).
inline PENSTOCK_HOST_DEVICE float sigmoid(float logit) {
  return over(1.0f, plus(1.0f, exponential(-logit)));
}

// p in units of 2^-30, cut off: sums of up to 2^22 such weights are exact in any order.
inline PENSTOCK_HOST_DEVICE double weight(float p) {
  return floor(static_cast<double>(p) * 0x1p30);
}
inline double weight(double p) { return p; }

// A softmax's sum is over kPartialSums partial sums, expert e in number e mod kPartialSums by
// rising e, then added in halves: 0 and 16, 1 and 17, ..., until one is left. A warp's sum.
inline constexpr int kPartialSums = 32;

}  // namespace penstock::ranking
