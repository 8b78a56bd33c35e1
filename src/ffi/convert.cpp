// SPDX-License-Identifier: Apache-2.0
//
// Conversions of convert.h. A value that has no counterpart in the core is refused here, with the
// same four parts that the core's own errors have.
#include "ffi/convert.h"

#include <array>
#include <limits>
#include <string>

namespace penstock::binding {
namespace {

std::string text(const ffi::String& value) { return {value.data(), value.size()}; }

[[noreturn]] void refuse(std::string what, std::string got, std::string expected,
                         std::string remedy) {
  throw Error(ErrorCode::invalid_argument,
              {std::move(what), std::move(got), std::move(expected), std::move(remedy)});
}

// Built by append: g++ 12 warns falsely about "literal" + string where it inlines it.
std::string in_quotes(std::string_view name) {
  return std::string(1, '\'').append(name).append(1, '\'');
}

template <typename Enum, size_t N>
Enum by_name(std::string_view what, std::string_view name, const std::array<Enum, N>& values) {
  std::string expected = "one of";
  for (Enum value : values) {
    if (name_of(value) == name) return value;
    expected.append(" ").append(name_of(value));
  }
  refuse(std::string(what), in_quotes(name), expected, "Check the spelling");
}

int32_t int32_of(std::string_view what, int64_t value) {
  if (value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max())
    return static_cast<int32_t>(value);
  refuse(std::string(what), std::to_string(value), "a 32-bit integer", "Pass a smaller number");
}

DType storage_of(const DLDataType& dtype, std::string_view name, DType uint16_as) {
  const int bits = dtype.lanes == 1 ? dtype.bits : 0;
  switch (dtype.code) {
    case kDLFloat:
      if (bits == 64) return DType::float64;
      if (bits == 32) return DType::float32;
      if (bits == 16) return DType::float16;
      break;
    case kDLBfloat:
      if (bits == 16) return DType::bfloat16;
      break;
    case kDLInt:
      if (bits == 32) return DType::int32;
      if (bits == 64) return DType::int64;
      break;
    case kDLBool:
      if (bits == 8) return DType::uint8;
      break;
    case kDLUInt:
      if (bits == 8) return DType::uint8;
      if (bits == 16 && uint16_as != DType::uint8) return uint16_as;
      break;
    default:
      break;
  }
  refuse(std::string(name), "dtype " + std::string(ffi::DLDataTypeToString(dtype)),
         "float64, float32, float16, bfloat16, int32, int64 or uint8",
         "Convert the tensor to one of these");
}

Device location_of(const DLDevice& device, std::string_view name) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
      return {DeviceType::cpu, 0};
    case kDLCUDA:
    case kDLCUDAManaged:
      return {DeviceType::cuda, device.device_id};
    default:
      refuse(std::string(name), "device type " + std::to_string(device.device_type), "cpu or cuda",
             "Move the tensor there");
  }
}

constexpr std::array kActivations = {
    Activation::swiglu,         Activation::geglu, Activation::reglu,
    Activation::swiglu_clamped, Activation::silu,  Activation::gelu,
    Activation::gelu_tanh,      Activation::relu,  Activation::relu_squared};
constexpr std::array kGateLayouts = {GateLayout::concatenated, GateLayout::interleaved};
constexpr std::array kWeightOrders = {WeightOrder::output_major, WeightOrder::input_major};
constexpr std::array kSavePolicies = {SavePolicy::preactivation, SavePolicy::input,
                                      SavePolicy::nothing};
constexpr std::array kLaunchOrders = {LaunchOrder::fast, LaunchOrder::low_memory};
constexpr std::array kKeptH = {KeptH::preserved, KeptH::overwritten};
constexpr std::array kRouters = {
    RouterKind::softmax_topk, RouterKind::topk_softmax,   RouterKind::topk_softmax_normalized,
    RouterKind::sigmoid_topk, RouterKind::token_rounding, RouterKind::expert_choice,
    RouterKind::threshold};
constexpr std::array kSelections = {Selection::chosen, Selection::given};
constexpr std::array kScalings = {ScoreScaling::normalized, ScoreScaling::plain};
constexpr std::array kRoundingModes = {RoundingMode::nearest_count,
                                       RoundingMode::stochastic_count,
                                       RoundingMode::nearest_score,
                                       RoundingMode::balanced_count,
                                       RoundingMode::up,
                                       RoundingMode::down};
constexpr std::array kDTypes = {DType::float64, DType::float32, DType::float16, DType::bfloat16,
                                DType::int32,   DType::int64,   DType::uint8};
constexpr std::array<std::string_view, 6> kWeightNames = {"w1", "w1_up", "w2", "b1", "b1_up", "b2"};
constexpr std::array<std::string_view, 5> kForwardNames = {"x", "scores", "h", "output",
                                                           "workspace"};
constexpr std::array<std::string_view, 9> kBackwardNames = {
    "d_output", "x", "scores", "h", "dx", "dscores", "dh", "a_scaled", "workspace"};
constexpr std::array<std::string_view, 7> kPlanNames = {
    "expert_counts", "expert_offsets", "row_to_token", "row_to_slot",
    "slot_to_row",   "token_offsets",  "dropped_slots"};

}  // namespace

TensorView view_of(const ffi::Optional<ffi::Tensor>& tensor, std::string_view name,
                   DType uint16_as) {
  if (!tensor.has_value()) return {};
  const ffi::Tensor present = tensor.value();
  const DLTensor& source = *present.GetDLTensorPtr();
  if (source.ndim > kMaxRank) {
    refuse(std::string(name), std::to_string(source.ndim) + " dimensions",
           "at most " + std::to_string(kMaxRank), "Flatten the leading dimensions");
  }
  TensorView view;
  view.data = static_cast<char*>(source.data) + source.byte_offset;
  view.dtype = storage_of(source.dtype, name, uint16_as);
  view.device = location_of(source.device, name);
  view.rank = source.ndim;
  int64_t packed = 1;
  for (int32_t axis = source.ndim - 1; axis >= 0; --axis) {
    const auto i = static_cast<size_t>(axis);
    view.shape[i] = source.shape[axis];
    view.strides[i] = source.strides != nullptr ? source.strides[axis] : packed;
    packed *= source.shape[axis];
  }
  return view;
}

Group::Group(Tensors tensors, std::span<const std::string_view> names, DType uint16_as)
    : tensors_(std::move(tensors)), names_(names), uint16_as_(uint16_as) {
  if (tensors_.size() != names_.size()) {
    refuse("argument group of " + std::string(names_.front()),
           std::to_string(tensors_.size()) + " tensors", std::to_string(names_.size()),
           "The Python package and libpenstock_ffi.so are of different versions: reinstall");
  }
}

TensorView Group::operator[](size_t index) const {
  return view_of(tensors_[static_cast<int64_t>(index)], names_[index], uint16_as_);
}

Workspace Group::workspace(size_t index) const {
  const TensorView view = (*this)[index];
  if (!view.present()) return {};
  return {view.data, view.bytes()};
}

Scope::Scope(const CallContext& call) : backend_(text(call.get<0>())) {
  context_.backend = backend_;
  context_.threads = static_cast<int32_t>(call.get<1>());
  context_.stream = reinterpret_cast<void*>(call.get<2>());
  context_.sm_budget = static_cast<int32_t>(call.get<3>());
  const std::string checks = text(call.get<4>());
  if (checks == "checked") {
    context_.id_checks = IdChecks::checked;
  } else if (checks != "trusted") {
    refuse("id_checks", in_quotes(checks), "trusted or checked", "Check the spelling");
  }
  const ffi::String uint16_as = call.get<5>();
  if (uint16_as.size() > 0) uint16_as_ = dtype_of(uint16_as);
}

ExpertsConfig config_of(const Config& config) {
  ExpertsConfig result;
  result.activation = by_name("activation", text(config.get<0>()), kActivations);
  result.gate_layout = by_name("gate_layout", text(config.get<1>()), kGateLayouts);
  result.weight_order = by_name("weight_order", text(config.get<2>()), kWeightOrders);
  result.save = by_name("save", text(config.get<3>()), kSavePolicies);
  result.clamp_alpha = static_cast<float>(config.get<4>());
  result.clamp_limit = static_cast<float>(config.get<5>());
  result.order = by_name("order", text(config.get<6>()), kLaunchOrders);
  result.kept_h = by_name("kept_h", text(config.get<7>()), kKeptH);
  return result;
}

ExpertsProblem problem_of(const Config& config, const Problem& problem) {
  ExpertsProblem result;
  result.config = config_of(config);
  result.num_tokens = problem.get<0>();
  result.hidden_size = problem.get<1>();
  result.intermediate_size = problem.get<2>();
  result.num_experts = problem.get<3>();
  result.num_slots = problem.get<4>();
  result.row_capacity = problem.get<5>();
  result.dtype = dtype_of(problem.get<6>());
  result.device = device_of(problem.get<7>(), problem.get<8>());
  const std::string rows = text(problem.get<9>());
  if (rows != "routed" && rows != "dispatched") {
    refuse("rows", in_quotes(rows), "routed or dispatched", "Check the spelling");
  }
  result.rows = rows == "routed" ? RowSource::routed : RowSource::dispatched;
  return result;
}

RoutingPlan plan_of(const Plan& plan) {
  const Group tensors(plan.get<0>(), kPlanNames, DType::uint8);
  RoutingPlan result;
  result.expert_counts = tensors[0];
  result.expert_offsets = tensors[1];
  result.row_to_token = tensors[2];
  result.row_to_slot = tensors[3];
  result.slot_to_row = tensors[4];
  result.token_offsets = tensors[5];
  result.dropped_slots = tensors[6];
  result.top_k = static_cast<int32_t>(plan.get<1>());
  return result;
}

ExpertWeights weights_of(const Tensors& tensors, const Scope& scope) {
  const Group group(tensors, kWeightNames, scope.uint16_as());
  return {.w1 = group[0],
          .w1_up = group[1],
          .w2 = group[2],
          .b1 = group[3],
          .b1_up = group[4],
          .b2 = group[5]};
}

ExpertsForwardArgs forward_args_of(const Config& config, const Tensors& tensors,
                                   const Tensors& weights, const Plan& plan, const Scope& scope) {
  const Group group(tensors, kForwardNames, scope.uint16_as());
  return {.config = config_of(config),
          .x = group[0],
          .weights = weights_of(weights, scope),
          .scores = group[1],
          .plan = plan_of(plan),
          .h = group[2],
          .output = group[3],
          .workspace = group.workspace(4)};
}

ExpertsBackwardArgs backward_args_of(const Config& config, const Tensors& tensors,
                                     const Tensors& weights, const Plan& plan, const Scope& scope) {
  const Group group(tensors, kBackwardNames, scope.uint16_as());
  return {.config = config_of(config),
          .d_output = group[0],
          .x = group[1],
          .weights = weights_of(weights, scope),
          .scores = group[2],
          .plan = plan_of(plan),
          .h = group[3],
          .dx = group[4],
          .dscores = group[5],
          .weight_grads = {},
          .delayed = {.dh = group[6], .a_scaled = group[7]},
          .workspace = group.workspace(8)};
}

RouteProblem router_of(const Router& router) {
  RouteProblem result;
  result.kind = by_name("router", text(router.get<0>()), kRouters);
  result.selection = by_name("selection", text(router.get<1>()), kSelections);
  result.options.scaling = by_name("scaling", text(router.get<2>()), kScalings);
  result.options.rounding = by_name("mode", text(router.get<3>()), kRoundingModes);
  result.top_k = int32_of("top_k", router.get<4>());
  result.options.num_groups = int32_of("num_groups", router.get<5>());
  result.options.top_groups = int32_of("top_groups", router.get<6>());
  result.options.tile = router.get<7>();
  result.options.scale = router.get<8>();
  result.options.threshold = router.get<9>();
  return result;
}

RouteProblem route_problem_of(const Router& router, const Problem& problem) {
  RouteProblem result = router_of(router);
  result.num_tokens = problem.get<0>();
  result.num_experts = problem.get<3>();
  result.num_slots = problem.get<4>();
  result.dtype = dtype_of(problem.get<6>());
  result.device = device_of(problem.get<7>(), problem.get<8>());
  return result;
}

DType dtype_of(const ffi::String& name) { return by_name("dtype", text(name), kDTypes); }

Device device_of(const ffi::String& type, int64_t index) {
  const std::string name = text(type);
  if (name != "cpu" && name != "cuda") {
    refuse("device", in_quotes(name), "cpu or cuda", "Move the tensors there");
  }
  return {name == "cpu" ? DeviceType::cpu : DeviceType::cuda, static_cast<int32_t>(index)};
}

void raise(const Error& error) {
  const char* kind = "penstock.DeviceError";
  switch (error.code()) {
    case ErrorCode::invalid_argument:
      kind = "ValueError";
      break;
    case ErrorCode::unsupported:
      kind = "penstock.UnsupportedError";
      break;
    case ErrorCode::out_of_memory:
      kind = "penstock.OutOfMemoryError";
      break;
    case ErrorCode::device_error:
      break;
  }
  throw ffi::Error(kind, error.what(), "");
}

void raise_out_of_memory() {
  throw ffi::Error("penstock.OutOfMemoryError",
                   "host memory: got a failed allocation, expected a few bytes for bookkeeping. "
                   "Free memory and call again; nothing was changed",
                   "");
}

}  // namespace penstock::binding
