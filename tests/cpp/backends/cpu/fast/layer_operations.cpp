// SPDX-License-Identifier: Apache-2.0
//
// One function per operation of the table: outputs poisoned, scratch exact and guarded, then run.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "layer.h"

namespace penstock::cpu::fast_test {
namespace {

constexpr int64_t kGuard = 256;

// Exactly `bytes`, aligned, poisoned, with guard bytes that must survive.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(bytes), data_(allocate(bytes)) {
    std::fill_n(data_.get(), bytes_ + kGuard, uint8_t{0xff});
  }

  Workspace workspace() { return {data_.get(), bytes_}; }

  void check(const char* operation) const {
    for (int64_t i = 0; i < kGuard; ++i)
      if (data_.get()[bytes_ + i] != 0xff)
        throw std::runtime_error(std::string(operation) + " wrote past its scratch");
  }

 private:
  struct Free {
    void operator()(uint8_t* data) const { std::free(data); }
  };
  static uint8_t* allocate(int64_t bytes) {
    const size_t size = static_cast<size_t>((bytes + kGuard + 63) / 64 * 64);
    return static_cast<uint8_t*>(std::aligned_alloc(64, size));
  }

  int64_t bytes_;
  std::unique_ptr<uint8_t, Free> data_;
};

Context context_of(const Runner& runner) {
  Context context;
  context.threads = runner.threads;
  return context;
}

ExpertsProblem problem_of(const Layer& layer) { return layer.spec.problem(); }

ActivationSpec activation_of(const Layer& layer) {
  ActivationSpec spec;
  spec.kind = layer.spec.activation;
  return spec;
}

void poison(Layer& layer, std::initializer_list<Tensor Layer::*> outputs) {
  for (Tensor Layer::* output : outputs) (layer.*output).poison();
}

Scratch layer_scratch(const Layer& layer, const Runner& runner) {
  return Scratch(runner.backend->scratch_bytes(problem_of(layer), context_of(runner)));
}

RouterProblem router_problem(const Layer& layer) {
  return {layer.spec.tokens, layer.spec.hidden, layer.spec.experts, layer.spec.dtype, {}};
}

void build(Layer& layer, const Runner& runner) {
  Routing routing;
  routing.scores = layer.scores.view();
  routing.ids = layer.ids.view();
  routing.num_tokens = layer.spec.tokens;
  routing.top_k = static_cast<int32_t>(layer.spec.top_k);
  runner.backend->build_plan({routing, layer.plan(), {}}, context_of(runner));
}

void logits(Layer& layer, const Runner& runner) {
  poison(layer, {&Layer::logits});
  Scratch scratch(runner.backend->router_scratch_bytes(router_problem(layer), context_of(runner)));
  runner.backend->router_logits({layer.x.view(), layer.router_weight.view(), layer.logits.view(),
                                 scratch.workspace()},
                                context_of(runner));
  scratch.check("router_logits");
}

void route(Layer& layer, const Runner& runner) {
  poison(layer, {&Layer::router_scores, &Layer::router_ids});
  runner.backend->router_forward({RouterKind::topk_softmax, layer.logits.view(),
                                  layer.router_scores.view(), layer.router_ids.view()},
                                 context_of(runner));
}

void route_backward(Layer& layer, const Runner& runner) {
  poison(layer, {&Layer::d_logits});
  TensorView dscores = layer.scores.view();  // any numbers will do
  dscores = TensorView::contiguous(dscores.data, dscores.dtype,
                                   {layer.spec.tokens, layer.spec.top_k});
  runner.backend->router_backward({RouterKind::topk_softmax, layer.logits.view(),
                                   layer.router_scores.view(), layer.router_ids.view(), dscores,
                                   layer.d_logits.view()},
                                  context_of(runner));
}

void logits_backward(Layer& layer, const Runner& runner) {
  poison(layer, {&Layer::router_dx, &Layer::d_router_weight});
  Scratch scratch(runner.backend->router_scratch_bytes(router_problem(layer), context_of(runner)));
  runner.backend->router_logits_backward(
      {layer.d_logits.view(), layer.x.view(), layer.router_weight.view(), layer.router_dx.view(),
       layer.d_router_weight.view(), scratch.workspace()},
      context_of(runner));
  scratch.check("router_logits_backward");
}

void up(Layer& layer, const Runner& runner) {
  poison(layer, {&Layer::h, &Layer::a});
  Scratch scratch = layer_scratch(layer, runner);
  runner.backend->up_projection(
      {layer.groups(), activation_of(layer), layer.x.view(), layer.up_weights(layer.w1, layer.b1),
       layer.h.view(), layer.a.view(), scratch.workspace()},
      context_of(runner));
  scratch.check("up_projection");
}

void down(Layer& layer, const Runner& runner) {
  poison(layer, {&Layer::y});
  Scratch scratch = layer_scratch(layer, runner);
  runner.backend->down_projection({layer.groups(), layer.a.view(),
                                   layer.down_weights(layer.w2, layer.b2), layer.y.view(),
                                   scratch.workspace()},
                                  context_of(runner));
  scratch.check("down_projection");
}

void combine_output(Layer& layer, const Runner& runner) {
  poison(layer, {&Layer::output});
  runner.backend->combine(
      {layer.plan(), layer.y.view(), layer.scores.view(), layer.output.view()}, context_of(runner));
}

// With the sum of its partials, whose number is the backend's own choice.
void down_backward(Layer& layer, const Runner& runner) {
  poison(layer, {&Layer::dh, &Layer::a_scaled, &Layer::dscores});
  const ExpertsProblem problem = problem_of(layer);
  layer.partials = Tensor(accumulator_of(layer.spec.dtype),
                          {problem.row_capacity, runner.backend->score_partials(problem)});
  Scratch scratch = layer_scratch(layer, runner);
  runner.backend->down_backward(
      {layer.groups(), activation_of(layer), layer.d_output.view(),
       layer.down_weights(layer.w2, layer.b2), layer.scores.view(), layer.h.view(),
       layer.dh.view(), layer.a_scaled.view(), layer.partials.view(), scratch.workspace()},
      context_of(runner));
  scratch.check("down_backward");
  runner.backend->score_gradient({layer.groups(), layer.partials.view(), layer.d_output.view(),
                                  layer.down_weights(layer.w2, layer.b2).b, layer.dscores.view()},
                                 context_of(runner));
}

void up_backward(Layer& layer, const Runner& runner) {
  poison(layer, {&Layer::dx_rows});
  Scratch scratch = layer_scratch(layer, runner);
  runner.backend->up_backward({layer.groups(), layer.dh.view(),
                               layer.up_weights(layer.w1, layer.b1), layer.dx_rows.view(),
                               scratch.workspace()},
                              context_of(runner));
  scratch.check("up_backward");
}

void combine_dx(Layer& layer, const Runner& runner) {
  poison(layer, {&Layer::dx});
  runner.backend->combine({layer.plan(), layer.dx_rows.view(), {}, layer.dx.view()},
                          context_of(runner));
}

void weights(Layer& layer, const Runner& runner) {
  if (layer.spec.grad_mode == GradMode::overwrite) poison(layer, {&Layer::dw1, &Layer::dw2});
  Scratch scratch = layer_scratch(layer, runner);
  WeightGradientArgs args = {};
  args.rows = layer.groups();
  args.mode = layer.spec.grad_mode;
  args.scratch = scratch.workspace();
  args.left = layer.dh.view();
  args.left_access = RowAccess::direct;
  args.right = layer.x.view();
  args.right_access = RowAccess::gathered;
  const UpWeights dw1 = layer.up_weights(layer.dw1, layer.db1);
  args.out = dw1.w;
  args.halves = dw1.halves;
  runner.backend->weight_gradient(args, context_of(runner));
  args.left = layer.d_output.view();
  args.left_access = RowAccess::gathered;
  args.right = layer.a_scaled.view();
  args.right_access = RowAccess::direct;
  args.out = {layer.down_weights(layer.dw2, layer.db2).w, {}};
  args.halves = 1;
  runner.backend->weight_gradient(args, context_of(runner));
  scratch.check("weight_gradient");
}

void biases(Layer& layer, const Runner& runner) {
  if (!layer.db1.present()) return;
  if (layer.spec.grad_mode == GradMode::overwrite) poison(layer, {&Layer::db1, &Layer::db2});
  BiasGradientArgs args = {};
  args.rows = layer.groups();
  args.mode = layer.spec.grad_mode;
  args.values = layer.dh.view();
  args.access = RowAccess::direct;
  const UpWeights up_gradient = layer.up_weights(layer.dw1, layer.db1);
  args.out = up_gradient.b;
  args.halves = up_gradient.halves;
  runner.backend->bias_gradient(args, context_of(runner));
  args.values = layer.d_output.view();
  args.access = RowAccess::gathered;
  args.scores = layer.scores.view();
  args.out = {layer.down_weights(layer.dw2, layer.db2).b, {}};
  args.halves = 1;
  runner.backend->bias_gradient(args, context_of(runner));
}

}  // namespace

const std::vector<Operation>& operations() {
  static const std::vector<Operation> list = {
      {"router_logits", logits, {&Layer::logits}},
      {"router_forward", route, {&Layer::router_scores}},
      {"router_backward", route_backward, {&Layer::d_logits}},
      {"router_logits_backward", logits_backward, {&Layer::router_dx, &Layer::d_router_weight}},
      {"build_plan", build, {}},
      {"up_projection", up, {&Layer::h, &Layer::a}},
      {"down_projection", down, {&Layer::y}},
      {"combine", combine_output, {&Layer::output}},
      {"down_backward", down_backward, {&Layer::dh, &Layer::a_scaled, &Layer::dscores}},
      {"up_backward", up_backward, {&Layer::dx_rows}},
      {"combine_dx", combine_dx, {&Layer::dx}},
      {"weight_gradient", weights, {&Layer::dw1, &Layer::dw2}},
      {"bias_gradient", biases, {&Layer::db1, &Layer::db2}},
  };
  return list;
}

void run_all(Layer& layer, const Runner& runner) {
  for (const Operation& operation : operations()) operation.run(layer, runner);
}

}  // namespace penstock::cpu::fast_test
