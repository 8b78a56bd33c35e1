// SPDX-License-Identifier: Apache-2.0
//
// The router: chosen ids against a full sort, scores against the softmax in long double, gradients
// against central differences, and logits that are NaN, infinite or equal.
#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "support.h"

namespace penstock::cpu::reference_test {
namespace {

constexpr RouterKind kKinds[] = {RouterKind::softmax_topk, RouterKind::topk_softmax,
                                 RouterKind::topk_softmax_normalized};

template <typename T>
struct Routed {
  Routed(RouterKind kind, Array<T>& logits, int64_t top_k)
      : scores(logits.rows(), top_k), ids(logits.rows(), top_k) {
    backend().router_forward({kind, logits.view(), scores.view(), ids.view()}, kContext);
  }

  Array<T> scores;
  Array<int32_t> ids;
};

// All experts, best first: numbers by falling value, then NaN, equal ones by id.
template <typename T>
std::vector<int32_t> ranking(const Array<T>& logits, int64_t token) {
  std::vector<int32_t> order(static_cast<size_t>(logits.cols()));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const double left = logits(token, a);
    const double right = logits(token, b);
    if (std::isnan(left) || std::isnan(right)) return !std::isnan(left) && std::isnan(right);
    return left > right;
  });
  return order;
}

template <typename T>
long double stated_score(RouterKind kind, const Array<T>& logits, int64_t token,
                         const std::vector<int32_t>& chosen, size_t k) {
  long double sum = 0.0L;
  const auto weight = [&](int64_t e) {
    return std::exp(static_cast<long double>(logits(token, e)) - logits(token, chosen[0]));
  };
  if (kind == RouterKind::topk_softmax) {
    for (int64_t e = 0; e < logits.cols(); ++e) sum += weight(e);
  } else {
    for (int32_t e : chosen) sum += weight(e);
  }
  return weight(chosen[k]) / sum;
}

template <typename T>
class RouterTest : public ::testing::Test {};
TYPED_TEST_SUITE(RouterTest, LogitTypes);

struct RouterShape {
  int64_t num_tokens, num_experts, top_k;
};
constexpr RouterShape kShapes[] = {{0, 8, 2},    {1, 1, 1},     {5, 8, 8},    {40, 64, 6},
                                   {9, 128, 64}, {4, 200, 100}, {3, 4097, 8}, {2, 4097, 4097}};

TYPED_TEST(RouterTest, ChoosesTheLargestAndScoresThem) {
  for (RouterKind kind : kKinds) {
    for (const RouterShape& shape : kShapes) {
      auto logits = Array<TypeParam>::random(shape.num_tokens, shape.num_experts, 6.0, 21);
      Routed<TypeParam> routed(kind, logits, shape.top_k);
      for (int64_t token = 0; token < shape.num_tokens; ++token) {
        std::vector<int32_t> chosen = ranking(logits, token);
        chosen.resize(static_cast<size_t>(shape.top_k));
        for (int64_t k = 0; k < shape.top_k; ++k) {
          const size_t index = static_cast<size_t>(k);
          ASSERT_EQ(routed.ids.at(token, k), chosen[index]);
          const double expected =
              static_cast<double>(stated_score(kind, logits, token, chosen, index));
          ASSERT_NEAR(routed.scores(token, k), expected, stage_tolerance<TypeParam>() * expected);
          if (k >= 64) k += 97;  // the long double statement is the slow part
        }
      }
    }
  }
}

TYPED_TEST(RouterTest, TiesGoToTheLowerId) {
  for (RouterKind kind : kKinds) {
    auto logits = Array<TypeParam>::integers(50, 40, 2, 8);  // five values: ties everywhere
    Routed<TypeParam> routed(kind, logits, 11);
    for (int64_t token = 0; token < 50; ++token) {
      const std::vector<int32_t> order = ranking(logits, token);
      for (int64_t k = 0; k < 11; ++k)
        ASSERT_EQ(routed.ids.at(token, k), order[static_cast<size_t>(k)]);
    }
  }
  Array<TypeParam> equal(1, 6);
  std::fill(equal.data().begin(), equal.data().end(), TypeParam(-3));
  Routed<TypeParam> routed(RouterKind::softmax_topk, equal, 4);
  for (int64_t k = 0; k < 4; ++k) {
    EXPECT_EQ(routed.ids.at(0, k), k);
    EXPECT_EQ(routed.scores(0, k), 0.25);
  }
}

TYPED_TEST(RouterTest, NanAndInfinityStillGiveDistinctIds) {
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Random random(4);
  for (RouterKind kind : kKinds) {
    Array<TypeParam> logits(200, 12);
    for (int64_t token = 0; token < 200; ++token)
      for (int64_t e = 0; e < 12; ++e) {
        const double choices[] = {nan, inf, -inf, 0.0, -0.0, random.symmetric(3.0)};
        put(logits.at(token, e), choices[random.below(6)]);
      }
    for (int64_t top_k : {1, 5, 12}) {
      Routed<TypeParam> routed(kind, logits, top_k);
      for (int64_t token = 0; token < 200; ++token) {
        const std::vector<int32_t> order = ranking(logits, token);
        for (int64_t k = 0; k < top_k; ++k)
          ASSERT_EQ(routed.ids.at(token, k), order[static_cast<size_t>(k)]);
      }
    }
  }
}

// Which scores are NaN, for one row of three logits and K = 2.
template <typename T>
void expect_nan_scores(std::array<double, 3> values, RouterKind kind, bool expected) {
  Array<T> logits(1, 3);
  for (int64_t e = 0; e < 3; ++e) put(logits.at(0, e), values[static_cast<size_t>(e)]);
  Routed<T> routed(kind, logits, 2);
  for (int64_t k = 0; k < 2; ++k)
    EXPECT_EQ(std::isnan(routed.scores(0, k)), expected) << static_cast<int>(kind) << " " << k;
}

TYPED_TEST(RouterTest, NanScores) {
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (RouterKind kind : kKinds) {
    expect_nan_scores<TypeParam>({nan, nan, nan}, kind, true);
    expect_nan_scores<TypeParam>({nan, 1, nan}, kind, true);  // a NaN is chosen
    expect_nan_scores<TypeParam>({-inf, -inf, -inf}, kind, true);
    expect_nan_scores<TypeParam>({inf, 0, 0}, kind, true);
    expect_nan_scores<TypeParam>({-inf, 2, 1}, kind, false);
    // Not chosen: spoils what was divided by a sum over all.
    expect_nan_scores<TypeParam>({1, nan, 2}, kind, kind != RouterKind::softmax_topk);
  }
}

TYPED_TEST(RouterTest, LargeLogitsDoNotOverflow) {
  Array<TypeParam> logits(1, 3);
  put(logits.at(0, 0), 3e38);
  put(logits.at(0, 1), 3e38);
  put(logits.at(0, 2), -3e38);
  for (RouterKind kind : kKinds) {
    Routed<TypeParam> routed(kind, logits, 3);
    EXPECT_EQ(routed.scores(0, 0), 0.5);
    EXPECT_EQ(routed.scores(0, 1), 0.5);
    EXPECT_EQ(routed.scores(0, 2), 0.0);
  }
}

template <typename T>
Array<T> backward(RouterKind kind, Array<T>& logits, Routed<T>& routed, Array<T>& dscores) {
  Array<T> dlogits(logits.rows(), logits.cols());
  backend().router_backward({kind, logits.view(), routed.scores.view(), routed.ids.view(),
                             dscores.view(), dlogits.view()},
                            kContext);
  return dlogits;
}

// d sum_k scores_k dscores_k / d logit_e, with the choice held fixed.
double stated_gradient(RouterKind kind, Array<double> logits, const Array<int32_t>& ids,
                       const Array<double>& dscores, int64_t token, int64_t expert) {
  constexpr double kStep = 1e-5;
  std::vector<int32_t> chosen;
  for (int64_t k = 0; k < ids.cols(); ++k) chosen.push_back(ids.at(token, k));
  const auto value = [&](double shift) {
    Array<double> moved = logits;
    moved.at(token, expert) += shift;
    long double sum = 0.0L;
    for (size_t k = 0; k < chosen.size(); ++k)
      sum += stated_score(kind, moved, token, chosen, k) * dscores(token, static_cast<int64_t>(k));
    return sum;
  };
  return static_cast<double>((value(kStep) - value(-kStep)) / (2 * kStep));
}

TEST(RouterBackward, MatchesCentralDifferences) {
  for (RouterKind kind : kKinds) {
    for (const RouterShape& shape : {RouterShape{6, 10, 3}, {3, 7, 7}, {4, 1, 1}, {2, 70, 65}}) {
      auto logits = Array<double>::random(shape.num_tokens, shape.num_experts, 2.0, 31);
      Routed<double> routed(kind, logits, shape.top_k);
      auto dscores = Array<double>::random(shape.num_tokens, shape.top_k, 1.0, 32);
      const Array<double> dlogits = backward(kind, logits, routed, dscores);
      for (int64_t token = 0; token < shape.num_tokens; ++token)
        for (int64_t e = 0; e < shape.num_experts; ++e)
          ASSERT_NEAR(dlogits(token, e),
                      stated_gradient(kind, logits, routed.ids, dscores, token, e), 1e-10);
    }
  }
}

TYPED_TEST(RouterTest, GradientIsExactlyZeroWhereScoresDoNotDepend) {
  for (RouterKind kind : kKinds) {
    auto logits = Array<TypeParam>::random(20, 30, 2.0, 41);
    Routed<TypeParam> routed(kind, logits, 4);
    auto dscores = Array<TypeParam>::random(20, 4, 1.0, 42);
    const Array<TypeParam> dlogits = backward(kind, logits, routed, dscores);
    for (int64_t token = 0; token < 20; ++token) {
      std::vector<bool> chosen(30, false);
      for (int64_t k = 0; k < 4; ++k) chosen[static_cast<size_t>(routed.ids.at(token, k))] = true;
      for (int64_t e = 0; e < 30; ++e) {
        const bool zero = dlogits(token, e) == 0.0;
        EXPECT_EQ(zero, kind != RouterKind::topk_softmax && !chosen[static_cast<size_t>(e)]);
      }
    }
  }
}

TYPED_TEST(RouterTest, OneTokensNanStaysItsOwn) {
  for (RouterKind kind : kKinds) {
    auto logits = Array<TypeParam>::random(9, 16, 2.0, 51);
    Array<TypeParam> spoiled = logits;
    put(spoiled.at(4, 7), std::numeric_limits<double>::quiet_NaN());
    Routed<TypeParam> clean(kind, logits, 3);
    Routed<TypeParam> dirty(kind, spoiled, 3);
    for (int64_t token = 0; token < 9; ++token)
      for (int64_t k = 0; k < 3 && token != 4; ++k) {
        EXPECT_EQ(dirty.ids.at(token, k), clean.ids.at(token, k));
        EXPECT_EQ(dirty.scores(token, k), clean.scores(token, k));
      }
  }
}

}  // namespace
}  // namespace penstock::cpu::reference_test
