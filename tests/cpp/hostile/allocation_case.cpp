// SPDX-License-Identifier: Apache-2.0
//
// Hostile case 21: memory runs out. Replaces the program's operator new by one that can be told to
// fail the n-th allocation, on whichever thread it falls, and walks n through a whole call.
#include <atomic>
#include <cstdlib>
#include <new>

#include "call.h"

namespace {

std::atomic<int64_t> allocations_left{-1};  // negative: never fail

void* allocate(size_t bytes, size_t alignment) {
  if (allocations_left.load(std::memory_order_relaxed) >= 0 &&
      allocations_left.fetch_sub(1, std::memory_order_relaxed) == 0)
    throw std::bad_alloc();
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = alignment <= alignof(std::max_align_t)
                     ? std::malloc(bytes == 0 ? 1 : bytes)
                     : std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
void* operator new[](size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<size_t>(alignment));
}
void* operator new[](size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace penstock::hostile {
namespace {

class HostileAllocation : public Hostile {};

// Runs `action` with its n-th allocation failing, for n = 0, 1, ... until none is left to fail.
// Each has to surface as bad_alloc or out_of_memory, or be done without (a thread fewer); `check`
// then sees whether the next call works. Returns how many failed.
template <typename Action, typename Check>
int fail_each_allocation(Action action, Check check) {
  for (int n = 0; n < 10000; ++n) {
    std::string other;
    allocations_left = n;
    try {
      action();
    } catch (const std::bad_alloc&) {
      other.clear();
    } catch (const Error& error) {
      allocations_left = -1;
      if (error.code() != ErrorCode::out_of_memory) other = error.what();
    } catch (const std::exception& error) {
      allocations_left = -1;
      other = error.what();
    }
    const bool was_reached = allocations_left.exchange(-1) < 0;
    EXPECT_EQ(other, "") << "allocation " << n;
    check(n);
    if (!was_reached) return n;
  }
  ADD_FAILURE() << "still allocating after 10000 allocations";
  return 0;
}

TEST_P(HostileAllocation, Case21_every_allocation_fails_once) {
  const Layer layer = make_layer(cases::case_21::shape, dtype());
  Call expected(layer, context());
  expected.run();
  Call call(layer, context());
  const auto inputs = [&] {
    std::map<std::string, Bytes> bytes;
    for (const char* name : {"x", "w1", "w2", "b1", "b2", "scores", "ids", "d_output"})
      bytes[name] = call.bytes(name);
    return bytes;
  };
  const auto inputs_before = inputs();
  call.run();  // makes the workspaces, so that only the library allocates below
  const Workspace plan_space{call.buffer("plan_workspace").data(),
                             call.buffer("plan_workspace").bytes()};
  bool finished = false;
  const auto run_all = [&] {
    finished = false;
    build_plan(call.routing, call.plan, plan_space, call.context);
    experts_forward(call.forward_args, call.context);
    experts_backward(call.backward_args, call.context);
    finished = true;
  };
  fail_each_allocation(run_all, [&](int n) {
    SCOPED_TRACE(::testing::Message() << "after allocation " << n << " failed");
    expect_same_bits(inputs(), inputs_before);
    EXPECT_TRUE(call.guards_intact());
    if (finished) expect_same_bits(call.all_results(), expected.all_results());
    run_all();  // the next call works
    expect_same_bits(call.all_results(), expected.all_results());
  });
}

PENSTOCK_EVERY_DOOR(HostileAllocation);

}  // namespace
}  // namespace penstock::hostile
