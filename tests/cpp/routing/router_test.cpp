// SPDX-License-Identifier: Apache-2.0
//
// The router through the public calls on every CPU backend: its products and choices against
// float64, its gradient against differences, and what it refuses.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "penstock/penstock.h"
#include "support/backends.h"
#include "support/compare.h"
#include "support/memory.h"

namespace penstock::test {
namespace {

constexpr RouterKind kKinds[] = {RouterKind::softmax_topk, RouterKind::topk_softmax,
                                 RouterKind::topk_softmax_normalized};

// Experts of one row by falling logit, lower id first among equals.
std::vector<int64_t> ranked(const std::vector<double>& logits) {
  std::vector<int64_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const double x = logits[static_cast<size_t>(a)];
    const double y = logits[static_cast<size_t>(b)];
    if (std::isnan(x) || std::isnan(y)) return !std::isnan(x) && std::isnan(y);
    return x > y;
  });
  return order;
}

// Scores of the given experts, from the definition of each kind.
std::vector<double> scores_by_definition(RouterKind kind, const std::vector<double>& logits,
                                         const std::vector<int64_t>& chosen) {
  double all = 0;
  for (double logit : logits) all += std::exp(logit);
  // Over all experts first, except for softmax_topk, whose other experts do not count.
  const double base = kind == RouterKind::softmax_topk ? 1.0 : all;
  std::vector<double> scores;
  double sum = 0;
  for (int64_t expert : chosen) {
    scores.push_back(std::exp(logits[static_cast<size_t>(expert)]) / base);
    sum += scores.back();
  }
  if (kind != RouterKind::topk_softmax)
    for (double& score : scores) score /= sum;
  return scores;
}

class RouterTest : public testing::TestWithParam<Run> {
 protected:
  DType dtype() const { return GetParam().dtype; }
  Context context() const { return context_of(GetParam().backend); }
};

Tensor random_tensor(DType dtype, std::initializer_list<int64_t> shape, uint64_t seed) {
  Tensor tensor(dtype, shape);
  Random random(seed);
  for (int64_t r = 0; r < tensor.view().size(0); ++r)
    for (int64_t c = 0; c < tensor.view().size(1); ++c) set(tensor.view(), {r, c}, random.value());
  return tensor;
}

std::vector<double> all_of(const TensorView& view) {
  std::vector<double> values;
  for (int64_t r = 0; r < view.size(0); ++r)
    for (int64_t c = 0; c < view.size(1); ++c) values.push_back(get(view, {r, c}));
  return values;
}

// (M, N) = (M, L) (L, N), with operands addressed by functions.
template <typename Left, typename Right>
std::vector<double> product(int64_t m, int64_t l, int64_t n, Left left, Right right) {
  std::vector<double> values;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < l; ++k) sum += left(i, k) * right(k, j);
      values.push_back(sum);
    }
  return values;
}

TEST_P(RouterTest, ProductsMatchFloat64) {
  constexpr int64_t kTokens = 37, kHidden = 29, kExperts = 11;
  const DType wide = accumulator_of(dtype());
  const Tensor x = random_tensor(dtype(), {kTokens, kHidden}, 1);
  const Tensor weight = random_tensor(dtype(), {kExperts, kHidden}, 2);
  const Tensor dlogits = random_tensor(wide, {kTokens, kExperts}, 3);
  Tensor logits(wide, {kTokens, kExperts});
  Tensor dx(dtype(), {kTokens, kHidden});
  Tensor dweight(wide, {kExperts, kHidden});
  const RouterProblem problem{kTokens, kHidden, kExperts, dtype(), Device{}};
  const int64_t bytes = router_workspace_bytes(problem, context());
  Block scratch(bytes);
  const Workspace workspace{scratch.data(), bytes};
  router_logits({x.view(), weight.view(), logits.view(), workspace}, context());
  router_logits_backward(
      {dlogits.view(), x.view(), weight.view(), dx.view(), dweight.view(), workspace}, context());

  const auto at = [](const Tensor& t) {
    return [&t](int64_t i, int64_t j) { return get(t.view(), {i, j}); };
  };
  const auto turned = [](const Tensor& t) {
    return [&t](int64_t i, int64_t j) { return get(t.view(), {j, i}); };
  };
  expect_close(all_of(logits.view()), product(kTokens, kHidden, kExperts, at(x), turned(weight)),
               cases::tolerance::stage(wide), "logits");
  expect_close(all_of(dx.view()), product(kTokens, kExperts, kHidden, at(dlogits), at(weight)),
               cases::tolerance::stage(dtype()), "dx");
  expect_close(all_of(dweight.view()), product(kExperts, kTokens, kHidden, turned(dlogits), at(x)),
               cases::tolerance::stage(wide), "drouter_weight");
  const Tensor addend = random_tensor(dtype(), {kTokens, kHidden}, 4);
  Tensor sum(dtype(), {kTokens, kHidden});
  router_logits_backward(
      {dlogits.view(), x.view(), weight.view(), sum.view(), {}, workspace, addend.view()},
      context());
  std::vector<double> expected_sum = product(kTokens, kExperts, kHidden, at(dlogits), at(weight));
  for (size_t i = 0; i < expected_sum.size(); ++i) expected_sum[i] += all_of(addend.view())[i];
  expect_close(all_of(sum.view()), expected_sum, cases::tolerance::stage(dtype()), "dx + addend");
  expect_invalid(
      [&] {
        router_logits_backward(
            {dlogits.view(), x.view(), weight.view(), {}, dweight.view(), workspace, addend.view()},
            context());
      },
      {"addend", "without dx"});
  expect_invalid(
      [&] {
        router_logits_backward(
            {dlogits.view(), x.view(), weight.view(), sum.view(), {}, workspace, sum.view()},
            context());
      },
      {"dx", "overlaps addend"});
  EXPECT_TRUE(scratch.guards_intact() && logits.block().guards_intact() &&
              dx.block().guards_intact() && dweight.block().guards_intact());
  if (bytes > 0)
    expect_invalid(
        [&] {
          router_logits({x.view(), weight.view(), logits.view(), {scratch.data(), bytes - 1}},
                        context());
        },
        {"workspace", "router_workspace_bytes"});
}

TEST_P(RouterTest, NoTokensGiveAZeroWeightGradient) {
  Tensor weight = random_tensor(dtype(), {3, 4}, 1);
  Tensor empty(dtype(), {0, 4});
  Tensor logits(accumulator_of(dtype()), {0, 3});
  Tensor dweight(dtype(), {3, 4});
  const RouterProblem problem{0, 4, 3, dtype(), Device{}};
  const int64_t bytes = router_workspace_bytes(problem, context());
  Block scratch(bytes);
  const Workspace workspace{scratch.data(), bytes};
  router_logits({empty.view(), weight.view(), logits.view(), workspace}, context());
  Tensor dx(dtype(), {0, 4});
  router_logits_backward(
      {logits.view(), empty.view(), weight.view(), dx.view(), dweight.view(), workspace},
      context());
  EXPECT_EQ(all_of(dweight.view()), std::vector<double>(12, 0.0));
}

// Logits with ties, infinities and NaN in them; finite scores are checked by definition.
TEST_P(RouterTest, ChoosesTheLargestAndTiesGoToTheLowerId) {
  constexpr int64_t kTokens = 60, kExperts = 9, kTopK = 4;
  const DType wide = accumulator_of(dtype());
  const double inf = std::numeric_limits<double>::infinity();
  Tensor logits(wide, {kTokens, kExperts});
  Random random(5);
  for (int64_t t = 0; t < kTokens; ++t)
    for (int64_t e = 0; e < kExperts; ++e) {
      double value = static_cast<double>(random.below(4));  // many ties
      if (t % 4 == 1 && random.below(3) == 0) value = NAN;
      if (t % 4 == 2 && random.below(2) == 0) value = -inf;
      if (t == 3) value = -inf;
      if (t == 5) value = NAN;
      set(logits.view(), {t, e}, value);
    }
  for (RouterKind kind : kKinds) {
    Tensor scores(wide, {kTokens, kTopK});
    Tensor ids(DType::int32, {kTokens, kTopK});
    router_forward({kind, logits.view(), scores.view(), ids.view()}, context());
    for (int64_t t = 0; t < kTokens; ++t) {
      std::vector<double> row;
      for (int64_t e = 0; e < kExperts; ++e) row.push_back(get(logits.view(), {t, e}));
      std::vector<int64_t> chosen = ranked(row);
      chosen.resize(kTopK);
      const std::vector<double> expected = scores_by_definition(kind, row, chosen);
      for (int64_t k = 0; k < kTopK; ++k) {
        const auto i = static_cast<size_t>(k);
        ASSERT_EQ(get(ids.view(), {t, k}), static_cast<double>(chosen[i]))
            << name_of(kind) << " token " << t;
        const double score = get(scores.view(), {t, k});
        if (std::isnan(expected[i]))
          ASSERT_TRUE(std::isnan(score)) << name_of(kind) << " token " << t;
        else
          ASSERT_NEAR(score, expected[i], 4 * cases::tolerance::stage(wide))
              << name_of(kind) << " token " << t;
      }
    }
  }
}

TEST_P(RouterTest, GradientMatchesDifferencesOfTheDefinition) {
  constexpr int64_t kTokens = 13, kExperts = 7, kTopK = 3;
  const DType wide = accumulator_of(dtype());
  const Tensor logits = random_tensor(wide, {kTokens, kExperts}, 8);
  const Tensor dscores = random_tensor(wide, {kTokens, kTopK}, 9);
  for (RouterKind kind : kKinds) {
    Tensor scores(wide, {kTokens, kTopK});
    Tensor ids(DType::int32, {kTokens, kTopK});
    Tensor dlogits(wide, {kTokens, kExperts});
    router_forward({kind, logits.view(), scores.view(), ids.view()}, context());
    router_backward(
        {kind, logits.view(), scores.view(), ids.view(), dscores.view(), dlogits.view()},
        context());
    std::vector<double> expected;
    for (int64_t t = 0; t < kTokens; ++t) {
      std::vector<double> row;
      std::vector<int64_t> chosen;
      for (int64_t e = 0; e < kExperts; ++e) row.push_back(get(logits.view(), {t, e}));
      for (int64_t k = 0; k < kTopK; ++k)
        chosen.push_back(static_cast<int64_t>(get(ids.view(), {t, k})));
      const auto weighted = [&](size_t expert, double step) {
        std::vector<double> moved = row;
        moved[expert] += step;
        const std::vector<double> values = scores_by_definition(kind, moved, chosen);
        double sum = 0;
        for (int64_t k = 0; k < kTopK; ++k)
          sum += get(dscores.view(), {t, k}) * values[static_cast<size_t>(k)];
        return sum;
      };
      constexpr double kStep = 1e-5;
      for (size_t e = 0; e < static_cast<size_t>(kExperts); ++e)
        expected.push_back((weighted(e, kStep) - weighted(e, -kStep)) / (2 * kStep));
    }
    // The differences are good to about 1e-10.
    expect_close(all_of(dlogits.view()), expected, std::max(1e-8, cases::tolerance::stage(wide)),
                 name_of(kind).data());
    EXPECT_TRUE(dlogits.block().guards_intact());
  }
}

TEST_P(RouterTest, RefusesWhatDoesNotFit) {
  const DType wide = accumulator_of(dtype());
  const Tensor logits = random_tensor(wide, {5, 4}, 1);
  Tensor scores(wide, {5, 2});
  Tensor ids(DType::int32, {5, 2});
  const auto refuse = [&](auto bend, std::initializer_list<const char*> words) {
    RouterForwardArgs args{RouterKind::softmax_topk, logits.view(), scores.view(), ids.view()};
    bend(args);
    expect_invalid([&] { router_forward(args, context()); }, words);
    EXPECT_EQ(ids.block().contents(), std::vector<uint8_t>(40, kPoison));
  };
  refuse([](RouterForwardArgs& a) { a.scores.shape[1] = a.ids.shape[1] = 5; }, {"top_k", "1 to 4"});
  refuse([](RouterForwardArgs& a) { a.ids.shape[1] = 1; }, {"ids", "(5, 1)", "(5, 2)"});
  refuse([](RouterForwardArgs& a) { a.ids.dtype = DType::int64; }, {"ids", "int64", "int32"});
  refuse([](RouterForwardArgs& a) { a.logits.dtype = DType::bfloat16; }, {"logits", "bfloat16"});
  refuse([](RouterForwardArgs& a) { a.scores.dtype = DType::float16; }, {"scores", "from logits"});
  refuse([](RouterForwardArgs& a) { a.scores.data = a.logits.data; },
         {"scores", "overlaps logits"});
  refuse([](RouterForwardArgs& a) { a.ids.device = {DeviceType::cuda, 0}; }, {"ids", "cuda:0"});
  refuse([](RouterForwardArgs& a) { a.logits.shape[0] = a.scores.shape[0] = int64_t{1} << 30; },
         {"slots = T * K", "2147483648"});
}

INSTANTIATE_TEST_SUITE_P(Cpu, RouterTest, testing::ValuesIn(cpu_runs()),
                         [](const auto& test) { return text_of(test.param); });

}  // namespace
}  // namespace penstock::test
