// SPDX-License-Identifier: Apache-2.0
//
// See call.h.
#include "call.h"

#include <cstring>

namespace penstock::hostile {
namespace {

constexpr const char* kResults[] = {"output", "h", "dx", "dscores", "dw1", "dw2", "db1", "db2"};

// A stage's bound is the root mean square of one rounding; over fewer elements than this, chance
// can double it, so a small tensor is held to what the contract allows one row or block.
constexpr size_t kManyElements = 2048;

int64_t bytes_of(DType dtype, std::initializer_list<int64_t> shape) {
  int64_t bytes = size_of(dtype);
  for (int64_t extent : shape) bytes *= extent;
  return bytes;
}

}  // namespace

Call::Call(const Layer& layer, const Context& call_context, uint8_t poison)
    : context(call_context), poison_(poison), dtype_(layer.dtype), layer_(&layer) {
  const int64_t T = layer.shape.num_tokens, d = layer.shape.hidden_size;
  make_routing(layer);
  forward_args.config = layer.config;
  forward_args.x = input("x", layer.x, dtype_, {T, d});
  forward_args.weights = weights(layer);
  forward_args.scores = routing.scores;
  forward_args.plan = plan;
  if (layer.config.save == SavePolicy::preactivation)
    forward_args.h = output("h", dtype_, {layer.num_slots(), layer.preactivation_size()});
  forward_args.output = output("output", dtype_, {T, d});

  backward_args.config = layer.config;
  backward_args.d_output = input("d_output", layer.d_output, dtype_, {T, d});
  backward_args.x = forward_args.x;
  backward_args.weights = forward_args.weights;
  backward_args.scores = forward_args.scores;
  backward_args.plan = plan;
  backward_args.h = forward_args.h;
  backward_args.dx = output("dx", dtype_, {T, d});
  backward_args.dscores = output("dscores", accumulator_of(dtype_), {layer.num_slots()});
  backward_args.weight_grads.into = gradients(layer);
}

void Call::make_routing(const Layer& layer) {
  const int64_t slots = layer.num_slots(), E = layer.shape.num_experts;
  routing.scores = input("scores", layer.scores, accumulator_of(dtype_), {slots});
  routing.ids = output("ids", DType::int32, {slots});
  if (slots > 0) std::memcpy(routing.ids.data, layer.ids.data(), layer.ids.size() * 4);
  routing.num_tokens = layer.shape.num_tokens;
  routing.top_k = layer.shape.top_k;
  plan.expert_counts = output("expert_counts", DType::int32, {E});
  plan.expert_offsets = output("expert_offsets", DType::int32, {E + 1});
  plan.row_to_token = output("row_to_token", DType::int32, {slots});
  plan.row_to_slot = output("row_to_slot", DType::int32, {slots});
  plan.slot_to_row = output("slot_to_row", DType::int32, {slots});
  plan.dropped_slots = output("dropped_slots", DType::int32, {1});
  plan.top_k = layer.shape.top_k;
}

ExpertWeights Call::weights(const Layer& layer) {
  const int64_t E = layer.shape.num_experts, d = layer.shape.hidden_size;
  const int64_t n = layer.shape.intermediate_size, h = layer.preactivation_size();
  ExpertWeights result;
  result.w1 = input("w1", layer.w1, dtype_, {E, h, d});
  result.w2 = input("w2", layer.w2, dtype_, {E, d, n});
  if (!layer.b1.empty()) result.b1 = input("b1", layer.b1, dtype_, {E, h});
  if (!layer.b2.empty()) result.b2 = input("b2", layer.b2, dtype_, {E, d});
  return result;
}

ExpertWeights Call::gradients(const Layer& layer) {
  const int64_t E = layer.shape.num_experts, d = layer.shape.hidden_size;
  const int64_t n = layer.shape.intermediate_size, h = layer.preactivation_size();
  ExpertWeights result;
  result.w1 = output("dw1", dtype_, {E, h, d});
  result.w2 = output("dw2", dtype_, {E, d, n});
  if (!layer.b1.empty()) result.b1 = output("db1", dtype_, {E, h});
  if (!layer.b2.empty()) result.b2 = output("db2", dtype_, {E, d});
  return result;
}

TensorView Call::input(const std::string& name, const std::vector<double>& values, DType dtype,
                       std::initializer_list<int64_t> shape) {
  const TensorView view = output(name, dtype, shape);
  store(values, dtype, view.data);
  return view;
}

TensorView Call::output(const std::string& name, DType dtype,
                        std::initializer_list<int64_t> shape) {
  Buffer& buffer = buffers_[name] = Buffer(bytes_of(dtype, shape), poison_);
  return TensorView::contiguous(buffer.data(), dtype, shape);
}

TensorView Call::moved(const std::string& name, const TensorView& view, int64_t offset) {
  const Bytes old = bytes(name);
  Buffer& buffer = buffers_[name] = Buffer(static_cast<int64_t>(old.size()), 0, offset);
  if (!old.empty()) std::memcpy(buffer.data(), old.data(), old.size());
  TensorView result = view;
  result.data = buffer.data();
  return result;
}

Workspace Call::workspace(const std::string& name, int64_t bytes) {
  Buffer& buffer = buffers_[name] = Buffer(bytes, poison_);
  return {buffer.data(), bytes};
}

void Call::build_plan() {
  const int64_t bytes =
      plan_workspace_bytes(routing.num_slots(), plan.num_experts(), Device{}, context);
  penstock::build_plan(routing, plan, workspace("plan_workspace", bytes), context);
}

void Call::forward() {
  const int64_t bytes = forward_workspace_bytes(problem_of(forward_args), context);
  forward_args.workspace = workspace("forward_workspace", bytes);
  experts_forward(forward_args, context);
}

void Call::backward() {
  const int64_t bytes = backward_workspace_bytes(problem_of(backward_args), context);
  backward_args.workspace = workspace("backward_workspace", bytes);
  experts_backward(backward_args, context);
}

std::map<std::string, Bytes> Call::all_results() const {
  std::map<std::string, Bytes> results;
  for (const char* name : kResults)
    if (buffers_.count(name) != 0) results[name] = bytes(name);
  return results;
}

std::vector<double> Call::values(const std::string& name) const {
  const bool is_score = name == "dscores";
  return loaded(bytes(name), is_score ? accumulator_of(dtype_) : dtype_);
}

bool Call::guards_intact() const {
  for (const auto& [name, buffer] : buffers_) {
    if (!buffer.guards_intact()) return false;
  }
  return true;
}

double bound_for(size_t elements, DType dtype) {
  const double bound = cases::tolerance::stage(dtype);
  return elements < kManyElements ? cases::tolerance::block_factor * bound : bound;
}

void expect_near_statement(const Call& call, const Layer& layer) {
  const Results expected = statement(layer);
  const auto near = [&](const char* name, const std::vector<double>& values) {
    EXPECT_LE(relative_l2(call.values(name), values), bound_for(values.size(), layer.dtype))
        << name;
  };
  near("output", expected.output);
  near("dx", expected.dx);
  near("dscores", expected.dscores);
  near("dw1", expected.dw1);
  near("dw2", expected.dw2);
  if (!layer.b1.empty()) near("db1", expected.db1);
  if (!layer.b2.empty()) near("db2", expected.db2);
  EXPECT_TRUE(call.guards_intact());
}

void expect_same_bits(const std::map<std::string, Bytes>& got,
                      const std::map<std::string, Bytes>& expected) {
  for (const auto& [name, bytes] : expected) {
    const auto found = got.find(name);
    if (found == got.end()) continue;  // H under another save policy
    EXPECT_TRUE(found->second == bytes) << name << " differs";
  }
}

std::vector<std::string> cpu_backends(DType dtype) {
  ExpertsProblem problem;
  problem.num_tokens = 4;
  problem.hidden_size = problem.intermediate_size = 8;
  problem.num_experts = 2;
  problem.num_slots = problem.row_capacity = 4;
  problem.dtype = dtype;
  std::vector<std::string> names;
  for (const BackendInfo& info : list_backends()) {
    if (info.device == DeviceType::cpu && info.available && why_not(info.name, problem).empty())
      names.push_back(info.name);
  }
  return names;
}

std::vector<Door> doors() {
  std::vector<Door> result;
  for (DType dtype : {DType::float64, DType::float32, DType::bfloat16, DType::float16}) {
    for (const std::string& backend : cpu_backends(dtype)) result.push_back({backend, dtype});
  }
  return result;
}

std::string name_of_door(const ::testing::TestParamInfo<Door>& info) {
  return info.param.backend + "_" + std::string(name_of(info.param.dtype));
}

}  // namespace penstock::hostile
