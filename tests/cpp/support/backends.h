// SPDX-License-Identifier: Apache-2.0
//
// The CPU backends of this build and machine, by name: what the tests are parametrised by.
#pragma once

#include <string>
#include <vector>

#include "penstock/backend.h"

namespace penstock::test {

inline std::vector<std::string> cpu_backends() {
  std::vector<std::string> names;
  for (const BackendInfo& info : list_backends())
    if (info.device == DeviceType::cpu && info.available) names.push_back(info.name);
  return names;
}

// Whether the backend takes a layer in this dtype.
inline bool runs(const std::string& backend, DType dtype) {
  ExpertsProblem problem;
  problem.hidden_size = problem.intermediate_size = problem.num_experts = 1;
  problem.dtype = dtype;
  return why_not(backend, problem).empty();
}

inline Context context_of(const std::string& backend, int32_t threads = 2) {
  Context context;
  context.backend = backend;
  context.threads = threads;
  return context;
}

}  // namespace penstock::test
