// SPDX-License-Identifier: Apache-2.0
//
// Which temporary lives where in a call's workspace. Every buffer has a size and a lifetime in
// launches; buffers whose lifetimes do not meet may share memory. The plan is a pure function of
// the problem and the backend, so the query and the call agree to the byte.
//
//   launch          forward: U1, up_projection, U2, down_projection, combine
//                   backward: recompute H, V2, down_backward, score_gradient, dW2 and db2 (of
//                             adapters: dA2, S U2 and dB2), V1, dA1 and dB1, up_backward, combine,
//                             dW1 and db1
//   H and dH        one buffer: down_backward writes dH over H, element by element; that of the
//                   kept H, where the pass may overwrite it
//   dX~             over A' and the partial sums, which are dead by then
//   Y and dX~       whole, or one block of columns where the order is low_memory
//   U and V         thin rows of adapters of rank r1 and r2 (experts/adapter_views.h), else empty;
//                   U only in inference, else they are the caller's
//   scratch         the backend's own, counted once as the largest of its operations
#pragma once

#include <vector>

#include "backend/ops.h"

namespace penstock {

struct Buffer {
  int64_t offset = 0;
  int64_t bytes = 0;
};

struct ForwardWorkspace {
  Buffer a;        // (R_cap, n)
  Buffer y;        // (R_cap, d or fewer)  empty when dispatched: Y is written to the output
  Buffer u1;       // (R_cap, r1)
  Buffer u2;       // (R_cap, r2)
  Buffer scratch;  //
  int64_t bytes = 0;
};

struct BackwardWorkspace {
  Buffer dh;        // (R_cap, h)   empty where the caller brings it, or its place is H's
  Buffer a_scaled;  // (R_cap, n)   likewise
  Buffer partials;  // (R_cap, P)   accumulator type
  Buffer dx_rows;   // (R_cap, d or fewer)  empty when dispatched: dX~ is dX
  Buffer u2;        // (R_cap, r2)  S_r U2_r
  Buffer v1;        // (R_cap, r1)
  Buffer v2;        // (R_cap, r2)
  Buffer scratch;   //
  int64_t bytes = 0;
};

// The three passes that run backward launches.
enum class BackwardPass : uint8_t { whole, data, weights };

// Columns of Y and of dX~ that exist at a time.
int64_t columns_at_a_time(const ExpertsProblem& problem);

// Whether dH is written over the H that forward kept.
inline bool overwrites_h(const ExpertsConfig& config) {
  return config.save == SavePolicy::preactivation && config.kept_h == KeptH::overwritten;
}

ForwardWorkspace plan_forward(const ExpertsProblem& problem, const Backend& backend,
                              const Context& context);
BackwardWorkspace plan_backward(const ExpertsProblem& problem, BackwardPass pass,
                                const Backend& backend, const Context& context);

// A buffer and the launches from `first` to `last`, both included, in which it is alive.
struct Lifetime {
  Buffer* buffer;
  int first;
  int last;
};

// Sets every offset so that buffers alive together do not meet; returns the bytes of the whole.
int64_t place(std::vector<Lifetime> lifetimes);

// The part of a workspace that a buffer is.
inline void* address_of(const Workspace& workspace, const Buffer& buffer) {
  return buffer.bytes == 0 ? nullptr : static_cast<char*>(workspace.data) + buffer.offset;
}
inline Workspace part_of(const Workspace& workspace, const Buffer& buffer) {
  return {address_of(workspace, buffer), buffer.bytes};
}

}  // namespace penstock
