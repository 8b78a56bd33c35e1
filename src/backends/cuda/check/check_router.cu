// SPDX-License-Identifier: Apache-2.0
//
// The router's products against float64: logits, dX and dWr.
#include "backends/cuda/check/checks.h"

namespace penstock::cuda::check {
namespace {

// out(i, j) = sum_k a(i, k) b(k, j) by strides, in float64.
struct RefDense {
  const float* a;  // fp32 operand, or null to read `a_element`
  const void* a_element;
  int64_t a_row, a_k;
  const void* b;
  int64_t b_k, b_column;
  int64_t rows, columns, k;
};

template <typename E>
__global__ void ref_dense(RefDense p, double* out) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < p.rows * p.columns;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / p.columns, column = i % p.columns;
    double sum = 0.0;
    for (int64_t k = 0; k < p.k; ++k) {
      const int64_t at = row * p.a_row + k * p.a_k;
      const float left =
          p.a != nullptr ? p.a[at] : static_cast<float>(static_cast<const E*>(p.a_element)[at]);
      sum += static_cast<double>(left) *
             static_cast<double>(
                 static_cast<float>(static_cast<const E*>(p.b)[k * p.b_k + column * p.b_column]));
    }
    out[i] = sum;
  }
}

template <typename E>
__global__ void add_elements(const E* addend, int64_t count, double* sum) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    sum[i] += static_cast<double>(static_cast<float>(addend[i]));
  }
}

// dX where x has other uses, whose gradient is of about the same size.
template <typename E>
void run_addend(Report& report, const std::string& where, const RouterProblem& size) {
  const int64_t tokens = size.num_tokens, d = size.hidden_size, experts = size.num_experts;
  const int64_t bytes = router_products_scratch_bytes(size);
  DeviceArray<float> dlogits(tokens * experts);
  DeviceArray<E> w(experts * d), dx(tokens * d), addend(tokens * d);
  DeviceArray<uint8_t> scratch(bytes);
  dlogits.randomise(4, 1.0f, Values::random);
  w.randomise(5, 1.0f / std::sqrt(static_cast<float>(experts)), Values::random);
  addend.randomise(6, 1.0f, Values::random);
  const auto view = [](void* data, DType dtype, int64_t r, int64_t c) {
    return TensorView::contiguous(data, dtype, {r, c}, {DeviceType::cuda, 0});
  };
  const TensorView tokens_of_addend = view(addend.data(), size.dtype, tokens, d);
  launch_router_logits_backward({view(dlogits.data(), DType::float32, tokens, experts),
                                 tokens_of_addend,
                                 view(w.data(), size.dtype, experts, d),
                                 view(dx.data(), size.dtype, tokens, d),
                                 {},
                                 {scratch.data(), bytes},
                                 tokens_of_addend},
                                {});
  DeviceArray<double> want(tokens * d);
  ref_dense<E><<<1024, 128>>>(
      {dlogits.data(), nullptr, experts, 1, w.data(), d, 1, tokens, d, experts}, want.data());
  add_elements<<<1024, 128>>>(addend.data(), tokens * d, want.data());
  report.judge<E>("router dX + addend", where, {dx.data(), want.data(), nullptr, tokens, d, d, 1},
                  size.dtype == DType::bfloat16 ? Tolerance::bf16() : Tolerance::fp16(),
                  Values::random);
}

template <typename E>
void run(Report& report, int64_t tokens, int64_t d, int64_t experts) {
  constexpr DType kDType = Layer<E>::kDType;
  const std::string where = std::string(name_of(kDType)) + " T" + std::to_string(tokens) + " d" +
                            std::to_string(d) + " E" + std::to_string(experts);
  DeviceArray<E> x(tokens * d), w(experts * d), dx(tokens * d), dw(experts * d);
  DeviceArray<float> logits(tokens * experts), dlogits(tokens * experts), dw_f(experts * d);
  x.randomise(1, 1.0f, Values::random);
  w.randomise(2, 1.0f / std::sqrt(static_cast<float>(d)), Values::random);
  dlogits.randomise(3, 1e-5f, Values::random);
  const auto view = [](void* data, DType dtype, int64_t r, int64_t c) {
    return TensorView::contiguous(data, dtype, {r, c}, {DeviceType::cuda, 0});
  };
  const TensorView x_view = view(x.data(), kDType, tokens, d);
  const TensorView w_view = view(w.data(), kDType, experts, d);
  launch_router_logits({x_view, w_view, view(logits.data(), DType::float32, tokens, experts), {}},
                       {});
  DeviceArray<double> want(tokens * experts);
  ref_dense<E>
      <<<1024, 128>>>({nullptr, x.data(), d, 1, w.data(), 1, d, tokens, experts, d}, want.data());
  report.judge<float>("router logits", where,
                      {logits.data(), want.data(), nullptr, tokens, experts, experts, 1},
                      Tolerance::fp32(), Values::random);

  const int64_t bytes = router_products_scratch_bytes({tokens, d, experts, kDType, {}});
  DeviceArray<uint8_t> scratch(bytes);
  RouterLogitsBackwardArgs args = {view(dlogits.data(), DType::float32, tokens, experts),
                                   x_view,
                                   w_view,
                                   view(dx.data(), kDType, tokens, d),
                                   view(dw.data(), kDType, experts, d),
                                   {scratch.data(), bytes}};
  launch_router_logits_backward(args, {});
  args.dx = {};
  args.drouter_weight = view(dw_f.data(), DType::float32, experts, d);
  launch_router_logits_backward(args, {});
  const Tolerance tolerance = kDType == DType::bfloat16 ? Tolerance::bf16() : Tolerance::fp16();
  DeviceArray<double> want_dx(tokens * d), want_dw(experts * d);
  ref_dense<E><<<1024, 128>>>(
      {dlogits.data(), nullptr, experts, 1, w.data(), d, 1, tokens, d, experts}, want_dx.data());
  ref_dense<E><<<1024, 128>>>(
      {dlogits.data(), nullptr, 1, experts, x.data(), d, 1, experts, d, tokens}, want_dw.data());
  report.judge<E>("router dX", where, {dx.data(), want_dx.data(), nullptr, tokens, d, d, 1},
                  tolerance, Values::random);
  report.judge<E>("router dWr", where, {dw.data(), want_dw.data(), nullptr, experts, d, d, 1},
                  tolerance, Values::random);
  report.judge<float>("router dWr fp32", where,
                      {dw_f.data(), want_dw.data(), nullptr, experts, d, d, 1},
                      Tolerance::score_gradient(), Values::random);
  run_addend<E>(report, where, {tokens, d, experts, kDType, {}});
}

}  // namespace

void check_router(Report& report, DType dtype, int64_t tokens, int64_t d, int64_t experts) {
  try {
    if (dtype == DType::bfloat16) {
      run<__nv_bfloat16>(report, tokens, d, experts);
    } else {
      run<__half>(report, tokens, d, experts);
    }
  } catch (const Error& error) {
    report.fail("error", "router", error.what());
  }
}

}  // namespace penstock::cuda::check
