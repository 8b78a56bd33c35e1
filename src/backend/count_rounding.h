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
  constexpr CountRounding(const RouterOptions& options, int64_t num_tokens, uint64_t seed)
      : mode_(options.rounding),
        tile_(options.tile),
        most_(num_tokens / options.tile * options.tile),
        seed_(seed) {}

  // The multiple of the tile that `count` becomes; at most the tokens that there are.
  constexpr int32_t target(int64_t expert, int64_t count) {
    const int64_t rest = count % tile_;
    const int64_t below = count - rest;
    const bool fits = rest != 0 && below + tile_ <= most_;
    if (mode_ == RoundingMode::nearest_score && fits) return kByScore;
    const int64_t result = fits && rounds_up(expert, count, rest) ? below + tile_ : below;
    carried_ += count - result;
    return static_cast<int32_t>(result);
  }

 private:
  constexpr bool rounds_up(int64_t expert, int64_t count, int64_t rest) const {
    switch (mode_) {
      case RoundingMode::nearest_count:
        return nearer_above(count, rest);
      case RoundingMode::stochastic_count:
        return uniform(expert) * static_cast<double>(tile_) < static_cast<double>(rest);
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
  constexpr bool nearer_above(int64_t count, int64_t rest) const {
    return 2 * rest > tile_ || (2 * rest == tile_ && count / tile_ % 2 == 1);
  }

  // In [0, 1), by the finaliser of SplitMix64 (Steele, Lea, Flood 2014) over seed and expert.
  constexpr double uniform(int64_t expert) const {
    uint64_t z = seed_ + (static_cast<uint64_t>(expert) + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return static_cast<double>(z >> 11) * 0x1.0p-53;
  }

  RoundingMode mode_;
  int64_t tile_;
  int64_t most_;
  uint64_t seed_;
  int64_t carried_ = 0;  // balanced_count: tokens that the experts before lost, less those they got
};

}  // namespace penstock
