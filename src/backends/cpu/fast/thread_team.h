// SPDX-License-Identifier: Apache-2.0
//
// Threads for one call. parallel_for hands the numbers 0 .. tasks - 1 to up to `threads` threads,
// the calling one among them, each number to one thread; which thread gets which depends on time,
// so nothing that is computed may. Calls from several host threads use separate teams. Idle teams
// are kept and sleep; after a fork the child starts with none.
#pragma once

#include <cstdint>
#include <type_traits>

namespace penstock::cpu::fast {

// A function (task, worker) by reference; worker < threads, no two running at once are equal.
class TaskFunction {
 public:
  template <typename Function>
    requires(!std::is_same_v<std::remove_cvref_t<Function>, TaskFunction>)
  TaskFunction(const Function& function)  // implicit: callers pass a lambda
      : object_(&function), call_([](const void* object, int64_t task, int32_t worker) {
          (*static_cast<const Function*>(object))(task, worker);
        }) {}

  void operator()(int64_t task, int32_t worker) const { call_(object_, task, worker); }

 private:
  const void* object_;
  void (*call_)(const void*, int64_t, int32_t);
};

// `function` must not throw.
void parallel_for(int32_t threads, int64_t tasks, TaskFunction function);

// What `requested` = Context::threads means: itself, or the cores this process may use.
int32_t thread_count(int32_t requested);

// `threads` if they are worth waking for `work` multiply-adds or the like, otherwise 1.
int32_t threads_worth(int32_t threads, int64_t work);

}  // namespace penstock::cpu::fast
