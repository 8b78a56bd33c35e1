// SPDX-License-Identifier: Apache-2.0
//
// How many tokens an expert gets under token rounding, from counts alone. Called for the experts in
// order; the numbers depend on nothing but the arguments, so every backend gets the same.
// constexpr, so that device code may call it.
#pragma once

#include <cstdint>

#include "penstock/routing.h"

namespace penstock {

// A target that the scores of the undecided tile have to decide.
inline constexpr int32_t kByScore = -1;

class CountRounding {
 public:
  // Tokens, counts and tiles fit in 32 bits, as slots do; and on a GPU 64 take twice the registers.
  constexpr CountRounding(const RouterOptions& options, int64_t num_tokens, uint64_t seed)
      : mode_(options.rounding),
        tile_(static_cast<int32_t>(options.tile)),
        most_(static_cast<int32_t>(num_tokens) / tile_ * tile_),
        seed_(seed) {}

  // The multiple of the tile that `count` becomes; at most the tokens that there are.
  constexpr int32_t target(int32_t expert, int32_t count) {
    const int32_t rest = count % tile_;
    const int32_t below = count - rest;
    const bool fits = rest != 0 && tile_ <= most_ - below;
    if (mode_ == RoundingMode::nearest_score && fits) return kByScore;
    const int32_t result = fits && rounds_up(expert, count, rest) ? below + tile_ : below;
    carried_ += count - result;
    return result;
  }

 private:
  constexpr bool rounds_up(int32_t expert, int32_t count, int32_t rest) const {
    switch (mode_) {
      case RoundingMode::nearest_count:
        return nearer_above(count, rest);
      case RoundingMode::stochastic_count:
        return uniform(expert) * tile_ < rest;
      case RoundingMode::balanced_count:
        return 2 * (rest + carried_) > tile_;
      case RoundingMode::up:
        return true;
      case RoundingMode::nearest_score:
      case RoundingMode::down:
        break;
    }
    return false;
  }

  // Halfway, the even multiple, so that halves drift neither way.
  constexpr bool nearer_above(int32_t count, int32_t rest) const {
    const int32_t missing = tile_ - rest;
    return rest > missing || (rest == missing && count / tile_ % 2 == 1);
  }

  // In [0, 1), by the finaliser of SplitMix64 (Steele, Lea, Flood 2014) over seed and expert.
  constexpr double uniform(int32_t expert) const {
    uint64_t z = seed_ + (static_cast<uint64_t>(expert) + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return static_cast<double>(z >> 11) * 0x1.0p-53;
  }

  RoundingMode mode_;
  int32_t tile_;
  int32_t most_;
  uint64_t seed_;
  int64_t carried_ = 0;  // balanced_count: tokens that the experts before lost, less those they got
};

}  // namespace penstock
