// SPDX-License-Identifier: Apache-2.0
//
// The list of backends and the choice among them. The list is built once, at the first use, and
// never changes; everything else is a pure function of the context and the problem.
#include "backend/registry.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda_library.h"
#include "backends/cpu/fast/fast_backend.h"
#include "backends/cpu/reference/reference_backend.h"
#include "penstock/error.h"

namespace penstock {
namespace {

// Every backend, in the order in which those of one device are tried.
const std::vector<const Backend*>& known_backends() {
  static const std::vector<const Backend*> backends = [] {
    std::vector<const Backend*> list = {&cpu::fast_backend(), &cpu::reference_backend(),
                                        &cuda_backend()};
    std::stable_sort(list.begin(), list.end(), [](const Backend* a, const Backend* b) {
      return std::pair(a->device, -a->priority) < std::pair(b->device, -b->priority);
    });
    return list;
  }();
  return backends;
}

struct Operation {
  const char* name;
  bool present;
};

std::vector<Operation> router_operations(const Backend& backend) {
  return {{"router_logits", backend.router_logits != nullptr},
          {"router_logits_backward", backend.router_logits_backward != nullptr},
          {"router_forward", backend.router_forward != nullptr},
          {"router_backward", backend.router_backward != nullptr},
          {"build_plan", backend.build_plan != nullptr}};
}

std::vector<Operation> experts_operations(const Backend& backend) {
  return {{"up_projection", backend.up_projection != nullptr},
          {"down_projection", backend.down_projection != nullptr},
          {"combine", backend.combine != nullptr},
          {"scale_rows", backend.scale_rows != nullptr},
          {"down_backward", backend.down_backward != nullptr},
          {"score_gradient", backend.score_gradient != nullptr},
          {"up_backward", backend.up_backward != nullptr},
          {"weight_gradient", backend.weight_gradient != nullptr},
          {"bias_gradient", backend.bias_gradient != nullptr}};
}

std::string missing_of(const std::vector<Operation>& operations) {
  for (const Operation& operation : operations)
    if (!operation.present) return std::string("it has no operation ") + operation.name;
  return "";
}

// What a call asks of a backend.
class Request {
 public:
  explicit Request(const ExpertsProblem& problem)
      : device_(problem.device), dtype_(problem.dtype), problem_(&problem) {}
  Request(Device device, DType dtype) : device_(device), dtype_(dtype) {}
  explicit Request(const RouteProblem& problem)
      : device_(problem.device), dtype_(problem.dtype), route_(&problem) {}

  const Device& device() const { return device_; }

  std::string text() const {
    std::string what = problem_ != nullptr ? "experts" : "routing";
    if (route_ != nullptr) what = "router " + std::string(name_of(route_->kind));
    return what + " in " + std::string(name_of(dtype_)) + " on " + name_of(device_);
  }

  std::string why_not(const Backend& backend) const {
    if (std::string reason = backend.why_unavailable(); !reason.empty()) return reason;
    if (backend.device != device_.type)
      return "it runs on " + std::string(backend.device == DeviceType::cpu ? "cpu" : "cuda") +
             ", the tensors are on " + name_of(device_);
    if (problem_ == nullptr) {
      std::string missing = missing_of(router_operations(backend));
      if (missing.empty()) missing = backend.why_not_dtype(dtype_);
      return missing.empty() && route_ != nullptr ? backend.why_not_router(*route_) : missing;
    }
    std::string missing = missing_of(experts_operations(backend));
    return missing.empty() ? backend.why_not(*problem_) : missing;
  }

 private:
  Device device_;
  DType dtype_;
  const ExpertsProblem* problem_ = nullptr;
  const RouteProblem* route_ = nullptr;
};

const Backend& backend_named(std::string_view name) {
  std::string names;
  for (const Backend* backend : known_backends()) {
    if (backend->name == name) return *backend;
    names += (names.empty() ? "" : ", ") + std::string(backend->name);
  }
  throw Error(ErrorCode::invalid_argument,
              {"backend", "'" + std::string(name) + "'", "one of " + names,
               "Use one of these names, or leave the name empty to choose by device."});
}

void check_context(const Context& context) {
  if (context.threads < 0)
    throw Error(ErrorCode::invalid_argument,
                {"threads", std::to_string(context.threads), "0 or more",
                 "Pass 0 for every core that this process may use."});
  if (context.sm_budget < 0)
    throw Error(ErrorCode::invalid_argument, {"sm_budget", std::to_string(context.sm_budget),
                                              "0 or more", "Pass 0 for the whole GPU."});
}

const Backend& select(const Request& request, const Context& context) {
  check_context(context);
  if (!context.backend.empty()) {
    const Backend& backend = backend_named(context.backend);
    if (std::string reason = request.why_not(backend); !reason.empty())
      throw Error(ErrorCode::unsupported, {"backend '" + std::string(context.backend) + "'",
                                           request.text(), "what this backend can run: " + reason,
                                           "Name another backend, or none to choose by device."});
    return backend;
  }
  std::string reasons;
  for (const Backend* backend : known_backends()) {
    if (backend->device != request.device().type) continue;
    std::string reason = request.why_not(*backend);
    if (reason.empty()) return *backend;
    reasons += (reasons.empty() ? "" : "; ") + std::string(backend->name) + ": " + reason;
  }
  if (reasons.empty()) reasons = "this build has no backend for this device";
  throw Error(ErrorCode::unsupported, {"backend", request.text(), "what a backend can run",
                                       "None of the backends can (" + reasons + ")."});
}

}  // namespace

const Backend& select_backend(const ExpertsProblem& problem, const Context& context) {
  return select(Request(problem), context);
}

const Backend& select_backend(Device device, DType dtype, const Context& context) {
  return select(Request(device, dtype), context);
}

const Backend& select_backend(const RouteProblem& problem, const Context& context) {
  return select(Request(problem), context);
}

int64_t tile_rows(const ExpertsProblem& problem, const Context& context) {
  return select_backend(problem, context).tile_rows(problem);
}

std::vector<BackendInfo> list_backends() {
  std::vector<BackendInfo> infos;
  for (const Backend* backend : known_backends()) {
    BackendInfo info;
    info.name = backend->name;
    info.device = backend->device;
    info.reason = backend->why_unavailable();
    info.available = info.reason.empty();
    info.description = backend->description();
    for (const auto& operations : {router_operations(*backend), experts_operations(*backend)})
      for (const Operation& operation : operations)
        if (operation.present) info.operations.emplace_back(operation.name);
    infos.push_back(std::move(info));
  }
  return infos;
}

std::string why_not(std::string_view backend, const ExpertsProblem& problem) {
  return Request(problem).why_not(backend_named(backend));
}

std::string_view chosen_backend(const ExpertsProblem& problem, const Context& context) {
  return select_backend(problem, context).name;
}

}  // namespace penstock
