// SPDX-License-Identifier: Apache-2.0
//
// The router's logits and their backward in every storage dtype, against sums in double.
#include <gtest/gtest.h>

#include "support.h"

namespace penstock::cpu::reference_test {
namespace {

struct Sizes {
  int64_t num_tokens, hidden_size, num_experts;
};
constexpr Sizes kSizes[] = {{7, 33, 5}, {1, 200, 1}, {3, 300, 270}, {0, 8, 4}};

template <typename T>
class RouterProductsTest : public ::testing::Test {};
TYPED_TEST_SUITE(RouterProductsTest, StorageTypes);

TYPED_TEST(RouterProductsTest, Logits) {
  using T = TypeParam;
  using Acc = Accumulator<T>;
  for (const Sizes& sizes : kSizes) {
    auto x = Array<T>::random(sizes.num_tokens, sizes.hidden_size, 1.0, 1, 5);
    auto w = Array<T>::random(sizes.num_experts, sizes.hidden_size, 0.3, 2);
    Array<Acc> logits(sizes.num_tokens, sizes.num_experts);
    backend().router_logits({x.view(), w.view(), logits.view(), {}}, kContext);
    auto expected = zeros(sizes.num_tokens, sizes.num_experts);
    for (int64_t t = 0; t < sizes.num_tokens; ++t)
      for (int64_t e = 0; e < sizes.num_experts; ++e)
        for (int64_t k = 0; k < sizes.hidden_size; ++k)
          expected[static_cast<size_t>(t)][static_cast<size_t>(e)] += x(t, k) * w(e, k);
    expect_stage(logits, expected, stage_tolerance<Acc>());
  }
}

TYPED_TEST(RouterProductsTest, ARowDoesNotDependOnTheOthers) {
  using T = TypeParam;
  using Acc = Accumulator<T>;
  auto x = Array<T>::random(6, 40, 1.0, 3);
  auto w = Array<T>::random(9, 40, 0.3, 4);
  Array<Acc> together(6, 9);
  backend().router_logits({x.view(), w.view(), together.view(), {}}, kContext);
  for (int64_t t = 0; t < 6; ++t) {
    Array<Acc> alone(1, 9);
    TensorView row = x.view();
    row.data = &x.at(t, 0);
    row.shape[0] = 1;
    backend().router_logits({row, w.view(), alone.view(), {}}, kContext);
    for (int64_t e = 0; e < 9; ++e) EXPECT_EQ(alone(0, e), together(t, e));
  }
}

template <typename T, typename Out>
void check_backward(const Sizes& sizes) {
  using Acc = Accumulator<T>;
  auto x = Array<T>::random(sizes.num_tokens, sizes.hidden_size, 1.0, 5, 2);
  auto w = Array<T>::random(sizes.num_experts, sizes.hidden_size, 0.3, 6);
  auto dlogits = Array<Acc>::random(sizes.num_tokens, sizes.num_experts, 1.0, 7);
  Array<T> dx(sizes.num_tokens, sizes.hidden_size);
  Array<Out> dw(sizes.num_experts, sizes.hidden_size);
  backend().router_logits_backward({dlogits.view(), x.view(), w.view(), dx.view(), dw.view(), {}},
                                   kContext);
  auto expected_dx = zeros(sizes.num_tokens, sizes.hidden_size);
  auto expected_dw = zeros(sizes.num_experts, sizes.hidden_size);
  for (size_t t = 0; t < expected_dx.size(); ++t)
    for (size_t e = 0; e < expected_dw.size(); ++e)
      for (int64_t k = 0; k < sizes.hidden_size; ++k) {
        const int64_t token = static_cast<int64_t>(t);
        const int64_t expert = static_cast<int64_t>(e);
        const double factor = dlogits(token, expert);
        expected_dx[t][static_cast<size_t>(k)] += factor * w(expert, k);
        expected_dw[e][static_cast<size_t>(k)] += factor * x(token, k);
      }
  expect_stage(dx, expected_dx, stage_tolerance<T>());
  expect_stage(dw, expected_dw, stage_tolerance<Out>());
}

TYPED_TEST(RouterProductsTest, Backward) {
  for (const Sizes& sizes : kSizes) {
    check_backward<TypeParam, TypeParam>(sizes);
    check_backward<TypeParam, float>(sizes);
  }
}

TYPED_TEST(RouterProductsTest, BackwardWritesOnlyWhatIsWanted) {
  using T = TypeParam;
  using Acc = Accumulator<T>;
  auto x = Array<T>::random(4, 6, 1.0, 5);
  auto w = Array<T>::random(3, 6, 0.3, 6);
  auto dlogits = Array<Acc>::random(4, 3, 1.0, 7);
  Array<T> dx(4, 6), dx_alone(4, 6), dw(3, 6), dw_alone(3, 6);
  const auto run = [&](TensorView dx_view, TensorView dw_view) {
    backend().router_logits_backward({dlogits.view(), x.view(), w.view(), dx_view, dw_view, {}},
                                     kContext);
  };
  run(dx.view(), dw.view());
  run(dx_alone.view(), {});
  run({}, dw_alone.view());
  EXPECT_TRUE(dx.same_bits(dx_alone));
  EXPECT_TRUE(dw.same_bits(dw_alone));
}

}  // namespace
}  // namespace penstock::cpu::reference_test
