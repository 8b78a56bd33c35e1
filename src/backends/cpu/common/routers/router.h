// SPDX-License-Identifier: Apache-2.0
//
// The routers of the CPU backends, one file each. A router selects (writes ids, and token_offsets
// where tokens differ in their number of experts) and scores what was selected; a replay scores
// only. Both backends run this code, with loops of their own, so that ids and scores do not depend
// on the backend. Adding a router is one file here, its entry in router.cpp, and its cases.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "backend/ops.h"

namespace penstock::cpu {

// A function of an index, by reference.
class IndexFunction {
 public:
  template <typename Function>
  requires(!std::is_same_v<std::remove_cvref_t<Function>, IndexFunction>)
      IndexFunction(const Function& function)  // implicit: callers pass a lambda
      : object_(&function), call_([](const void* object, int64_t index) {
          (*static_cast<const Function*>(object))(index);
        }) {}

  void operator()(int64_t index) const { call_(object_, index); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t);
};

// How a backend runs independent steps: every index in [0, count) once, in any order, on any
// thread. `work` is about the arithmetic operations of one step.
class StepLoop {
 public:
  virtual ~StepLoop() = default;
  virtual void for_each(int64_t count, int64_t work, IndexFunction step) const = 0;
};

class SerialLoop final : public StepLoop {
 public:
  void for_each(int64_t count, int64_t, IndexFunction step) const override {
    for (int64_t index = 0; index < count; ++index) step(index);
  }
};

// One router. Absent scratch_bytes: it needs none.
struct Router {
  int64_t (*scratch_bytes)(const RouteProblem& problem);
  void (*forward)(const RouterForwardArgs& args, const StepLoop& loop);
  void (*backward)(const RouterBackwardArgs& args, const StepLoop& loop);
};

extern const Router kSoftmaxTopK;
extern const Router kSigmoidTopK;
extern const Router kTokenRounding;
extern const Router kExpertChoice;
extern const Router kThreshold;

const Router& router_of(RouterKind kind);

// router_forward: the router of the kind, then the plan of what it chose where one is wanted.
void route_forward(const RouterForwardArgs& args, const StepLoop& loop);

// The tables' entries, the same for both backends: they have every router.
std::string why_not_router(const RouteProblem& problem);
int64_t route_scratch_bytes(const RouteProblem& problem, const Context& context);

// An exponential and a few comparisons, the work of one logit.
inline constexpr int64_t kWorkPerLogit = 16;

}  // namespace penstock::cpu
