// SPDX-License-Identifier: Apache-2.0
//
// Which code runs an operation. A backend is a table of functions for one kind of device; the
// context of a call names one, or leaves the choice to the device's order (printed by info). The
// choice is made once per call, before anything is launched; a backend that cannot run a problem
// says why, and a backend chosen by name is never replaced by another.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "penstock/device.h"
#include "penstock/experts.h"
#include "penstock/export.h"

namespace penstock {

struct Context {
  std::string_view backend = {};  // "" : the first of the device's backends that can run it
  int32_t threads = 0;            // CPU threads, 0: all cores this process may use
  void* stream = nullptr;         // cudaStream_t of every launch; unused on the CPU
  int32_t sm_budget = 0;          // GPU multiprocessors to use, 0: all
  IdChecks id_checks = IdChecks::trusted;
};

struct BackendInfo {
  std::string name;         // "reference", "fast", "cuda"
  DeviceType device;        //
  bool available;           // usable on this machine
  std::string reason;       // why not; empty when available
  std::string description;  // what it runs on: instruction set, GPU and driver
  std::vector<std::string> operations;
};

// Every backend this build knows, in the order in which they are tried for their device.
PENSTOCK_API std::vector<BackendInfo> list_backends();

// Empty if the named backend runs the problem on this machine, otherwise the reason why not.
PENSTOCK_API std::string why_not(std::string_view backend, const ExpertsProblem& problem);

// The name of the backend that a call with this context and problem runs on. Throws
// ErrorCode::unsupported with every candidate's reason if there is none.
PENSTOCK_API std::string_view chosen_backend(const ExpertsProblem& problem, const Context& context);

// Rows of one tile of the grouped products of the backend that runs this problem: what
// token_rounding rounds to, unless it is told otherwise.
PENSTOCK_API int64_t tile_rows(const ExpertsProblem& problem, const Context& context);

}  // namespace penstock
