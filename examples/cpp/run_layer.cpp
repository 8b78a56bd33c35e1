// SPDX-License-Identifier: Apache-2.0
//
// One SwiGLU layer of 4 experts over 8 tokens, forward only: choose 2 experts a token, make the
// plan, run the experts. Uses the public headers alone; link penstock::penstock.
#include <penstock/penstock.h>

#include <algorithm>
#include <cstdio>
#include <vector>

using namespace penstock;

constexpr int64_t T = 8, d = 16, n = 32, E = 4, K = 2, slots = T * K;

TensorView floats(std::vector<float>& v, std::initializer_list<int64_t> shape) {
  return TensorView::contiguous(v.data(), DType::float32, shape);
}
TensorView ints(std::vector<int32_t>& v, std::initializer_list<int64_t> shape) {
  return TensorView::contiguous(v.data(), DType::int32, shape);
}

int main() try {
  std::vector<float> x(T * d, 0.5f), w1(E * 2 * n * d, 0.1f), w2(E * d * n, 0.1f), out(T * d);
  std::vector<float> logits(T * E), scores(slots);
  std::vector<int32_t> ids(slots), counts(E), offsets(E + 1), tokens(slots), maps[2] = {ids, ids};
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i * 7 % 5);

  const Context context;  // the default backend, on every core
  router_forward(
      {RouterKind::softmax_topk, floats(logits, {T, E}), floats(scores, {T, K}), ints(ids, {T, K})},
      context);
  ExpertsForwardArgs args;
  args.config.save = SavePolicy::nothing;  // inference
  args.x = floats(x, {T, d});
  args.weights.w1 = floats(w1, {E, 2 * n, d});
  args.weights.w2 = floats(w2, {E, d, n});
  args.scores = floats(scores, {slots});
  args.plan = {ints(counts, {E}),
               ints(offsets, {E + 1}),
               ints(tokens, {slots}),
               ints(maps[0], {slots}),
               ints(maps[1], {slots}),
               {},
               {},
               K};
  args.output = floats(out, {T, d});

  const int64_t bytes = std::max(forward_workspace_bytes(problem_of(args), context),
                                 plan_workspace_bytes(slots, E, Device{}, context));
  std::vector<char> memory(static_cast<size_t>(bytes) + 64);  // and room to align
  void* start = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  args.workspace = {start, bytes};
  build_plan({args.scores, ints(ids, {slots}), {}, T, K}, args.plan, args.workspace, context);
  experts_forward(args, context);
  std::printf("expert 0 got %d rows; output[0][0] = %.5f on %s\n", counts[0], double{out[0]},
              chosen_backend(problem_of(args), context).data());
} catch (const Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
