// SPDX-License-Identifier: Apache-2.0
//
// Runs the five expert products of one layer and judges each against float64 on its own stored
// inputs; gap rows and their inputs are poison throughout.
#include "backends/cuda/check/checks.h"
#include "backends/cuda/check/layer.cuh"

namespace penstock::cuda::check {
namespace {

template <typename E>
class LayerCheck {
 public:
  LayerCheck(Report& report, const LayerShape& shape, const Variant& variant, std::string where)
      : report_(report), layer_(shape, variant, 17), where_(std::move(where)) {}

  void run() {
    forward();
    backward();
    weight_gradients();
    repeat();
  }

 private:
  Tolerance tolerance() const {
    return std::is_same_v<E, __nv_bfloat16> ? Tolerance::bf16() : Tolerance::fp16();
  }
  // Activations other than relu leave the integers.
  Values values_after_activation() const {
    return layer_.variant.activation == Activation::relu ? layer_.variant.values : Values::random;
  }
  bool integers() const { return layer_.variant.values == Values::integers; }

  void judge_rows(const char* stage, const DeviceArray<E>& got, const DeviceArray<double>& want,
                  int64_t columns, Values values) {
    report_.template judge<E>(stage, where_,
                              {got.data(), want.data(), layer_.expert_of_row.data(), layer_.rows,
                               columns, columns, 1},
                              tolerance(), values);
  }

  RefProduct product(RefRows a, int64_t n, int64_t n_halves, int64_t k, int64_t k_halves) const {
    RefProduct p = {};
    p.a = a;
    p.expert_of_row = layer_.expert_of_row.data();
    p.rows = layer_.rows;
    p.n = n;
    p.n_halves = n_halves;
    p.k = k;
    p.k_halves = k_halves;
    return p;
  }

  static void launch_reference(const RefProduct& p, DeviceArray<double>& out) {
    ref_rows<E><<<2048, 128>>>(p, out.data());
    require(cudaGetLastError(), "reference");
  }

  RefBackward activation_reference() const {
    RefBackward p = {};
    p.kind = layer_.variant.activation;
    p.h = layer_.h.data();
    p.expert_of_row = layer_.expert_of_row.data();
    p.rows = layer_.rows;
    p.n = layer_.shape.n;
    p.halves = layer_.halves;
    return p;
  }

  void forward() {
    const auto& s = layer_.shape;
    const UpWeights w = layer_.up_weights();
    launch_up_projection(layer_.up_args(), {});
    DeviceArray<double> want_h(layer_.rows * layer_.h_size);
    RefProduct up = product({layer_.x.data(), s.d, layer_.row_to_token.data()}, s.n,
                            layer_.halves, s.d, 1);
    up.b = {{w.w[0].data, w.w[1].data}, w.w[0].expert_stride, w.w[0].row_stride,
            w.w[0].col_stride};
    up.bias[0] = w.b[0].data;
    up.bias[1] = w.b[1].data;
    up.bias_expert_stride = w.b[0].expert_stride;
    up.bias_stride = w.b[0].stride;
    launch_reference(up, want_h);
    judge_rows("up_projection H", layer_.h, want_h, layer_.h_size, layer_.variant.values);

    DeviceArray<double> want_a(layer_.rows * s.n);
    RefBackward activation = activation_reference();
    activation.a = want_a.data();
    ref_activate<E><<<512, 64>>>(activation);
    judge_rows("up_projection A", layer_.a, want_a, s.n, values_after_activation());

    launch_down_projection(layer_.down_args(), {});
    const DownWeights v = layer_.down_weights();
    DeviceArray<double> want_y(layer_.rows * s.d);
    RefProduct down = product({layer_.a.data(), s.n, nullptr}, s.d, 1, s.n, 1);
    down.b = {{v.w.data, nullptr}, v.w.expert_stride, v.w.row_stride, v.w.col_stride};
    down.bias[0] = v.b.data;
    down.bias_expert_stride = v.b.expert_stride;
    down.bias_stride = v.b.stride;
    launch_reference(down, want_y);
    judge_rows("down_projection Y", layer_.y, want_y, s.d, values_after_activation());
  }

  void backward() {
    const auto& s = layer_.shape;
    launch_down_backward(layer_.down_backward_args(), {});
    const GroupedMatrix w2 = layer_.down_weights().w;
    DeviceArray<double> g(layer_.rows * s.n);
    RefProduct down = product({layer_.d_output.data(), s.d, layer_.row_to_token.data()}, s.n, 1,
                              s.d, 1);
    down.b = {{w2.data, nullptr}, w2.expert_stride, w2.col_stride, w2.row_stride};
    launch_reference(down, g);
    DeviceArray<double> want_dh(layer_.rows * layer_.h_size), want_a(layer_.rows * s.n),
        want_ds(layer_.rows);
    RefBackward p = activation_reference();
    p.g = g.data();
    p.scores = layer_.scores.data();
    p.row_to_slot = layer_.row_to_slot.data();
    p.dh = want_dh.data();
    p.a_scaled = want_a.data();
    p.ds = want_ds.data();
    ref_activate<E><<<512, 64>>>(p);
    judge_rows("down_backward dH", layer_.dh, want_dh, layer_.h_size, values_after_activation());
    judge_rows("down_backward A'", layer_.a_scaled, want_a, s.n, values_after_activation());
    judge_score_gradient(want_ds);

    launch_up_backward(layer_.up_backward_args(), {});
    const UpWeights w = layer_.up_weights();
    DeviceArray<double> want_dx(layer_.rows * s.d);
    RefProduct up = product({layer_.dh.data(), layer_.h_size, nullptr}, s.d, 1, s.n,
                            layer_.halves);
    up.b = {{w.w[0].data, w.w[1].data}, w.w[0].expert_stride, w.w[0].col_stride,
            w.w[0].row_stride};
    launch_reference(up, want_dx);
    judge_rows("up_backward dX~", layer_.dx_rows, want_dx, s.d, values_after_activation());
  }

  // dS has rows that nearly cancel, so it is judged as one vector.
  void judge_score_gradient(const DeviceArray<double>& want) {
    const std::vector<float> parts = layer_.partials.host();
    const std::vector<double> sums = want.host();
    double error = 0.0, norm = 0.0;
    for (int64_t row = 0; row < layer_.rows; ++row) {
      if (layer_.host.expert_of_row[row] < 0) continue;
      float got = 0.0f;
      for (int64_t i = 0; i < layer_.num_partials; ++i) got += parts[row * layer_.num_partials + i];
      error += (got - sums[row]) * (got - sums[row]);
      norm += sums[row] * sums[row];
    }
    report_.record("down_backward dS", where_, std::sqrt(error / std::max(norm, 1e-300)),
                   Tolerance::score_gradient());
  }

  void weight_gradients() {
    const auto& s = layer_.shape;
    const RefRows dh = {layer_.dh.data(), layer_.h_size, nullptr};
    const RefRows x = {layer_.x.data(), s.d, layer_.row_to_token.data()};
    const RefRows d_output = {layer_.d_output.data(), s.d, layer_.row_to_token.data()};
    const RefRows a_scaled = {layer_.a_scaled.data(), s.n, nullptr};
    gradient("weight_gradient 1", layer_.dw1_args(), {dh, x, nullptr, nullptr, 0, layer_.h_size, s.d});
    gradient("weight_gradient 2", layer_.dw2_args(),
             {d_output, a_scaled, nullptr, nullptr, 0, s.d, s.n});
  }

  // Accumulation starts from ones, which the reference then carries too.
  void gradient(const char* stage, const WeightGradientArgs& args, RefGradient p) {
    const bool fp32 = layer_.variant.fp32_gradients;
    p.counts = layer_.counts.data();
    p.offsets = layer_.offsets.data();
    p.experts = layer_.shape.experts;
    DeviceArray<double> want(p.experts * p.rows * p.columns);
    ref_columns<E, E><<<2048, 128>>>(p, want.data());
    if (layer_.variant.mode == GradMode::accumulate) {
      set_ones(layer_.dw1, layer_.dw1_up, layer_.dw2);
      set_ones(layer_.dw1_f, layer_.dw1_up_f, layer_.dw2_f);
      add_one<<<1024, 256>>>(want.data(), want.count());
    }
    launch_weight_gradient(args, {});
    const int64_t rows = p.rows / args.halves;
    for (int64_t expert = 0; expert < p.experts; ++expert) {
      for (int64_t half = 0; half < args.halves; ++half) {
        const GroupedMatrix& out = args.out[half];
        const int64_t at = expert * out.expert_stride;
        Compared c = {nullptr, want.data() + (expert * p.rows + half * rows) * p.columns, nullptr,
                      rows, p.columns, out.row_stride, out.col_stride};
        if (fp32) {
          c.got = static_cast<float*>(out.data) + at;
          // Sums in fp32 of products that are exact: the tensor core's own rounding only.
          report_.template judge<float>(stage, where_, c, Tolerance::score_gradient(),
                                        values_after_activation());
        } else {
          c.got = static_cast<E*>(out.data) + at;
          report_.template judge<E>(stage, where_, c, tolerance(), values_after_activation());
        }
      }
    }
  }

  template <typename... Arrays>
  void set_ones(Arrays&... arrays) {
    (fill_ones(arrays), ...);
  }
  template <typename T>
  void fill_ones(DeviceArray<T>& array) {
    if (array.count() > 0) ones<<<1024, 256>>>(array.data(), array.count());
  }

  // The same launches again must give the same bits.
  void repeat() {
    const auto h = bits(layer_.h), dh = bits(layer_.dh), dx = bits(layer_.dx_rows);
    const auto partials = bits(layer_.partials), dw1 = bits(layer_.dw1);
    for (auto* array : {&layer_.h, &layer_.a, &layer_.y, &layer_.dh, &layer_.a_scaled,
                        &layer_.dx_rows}) {
      array->poison();
    }
    if (layer_.variant.mode == GradMode::accumulate) fill_ones(layer_.dw1);
    launch_up_projection(layer_.up_args(), {});
    launch_down_projection(layer_.down_args(), {});
    launch_down_backward(layer_.down_backward_args(), {});
    launch_up_backward(layer_.up_backward_args(), {});
    launch_weight_gradient(layer_.dw1_args(), {});
    require(cudaDeviceSynchronize(), "second run");
    if (h != bits(layer_.h) || dh != bits(layer_.dh) || dx != bits(layer_.dx_rows) ||
        partials != bits(layer_.partials) || dw1 != bits(layer_.dw1)) {
      report_.fail("second run", where_, "different bits");
    }
  }

  template <typename T>
  static std::vector<uint8_t> bits(const DeviceArray<T>& array) {
    std::vector<uint8_t> copy(static_cast<size_t>(array.count()) * sizeof(T));
    if (!copy.empty())
      require(cudaMemcpy(copy.data(), array.data(), copy.size(), cudaMemcpyDeviceToHost), "copy");
    return copy;
  }

  Report& report_;
  Layer<E> layer_;
  std::string where_;
};

}  // namespace

void check_layer(Report& report, const CheckCase& test) {
  try {
    if (test.dtype == DType::bfloat16) {
      LayerCheck<__nv_bfloat16>(report, test.shape, test.variant, test.name).run();
    } else {
      LayerCheck<__half>(report, test.shape, test.variant, test.name).run();
    }
  } catch (const Error& error) {
    report.fail("error", test.name, error.what());
  }
}

}  // namespace penstock::cuda::check
