// SPDX-License-Identifier: Apache-2.0
//
// Which arguments share memory. Exact for strided views, so slices of one buffer that interleave
// without touching (gate and up of one tensor, experts packed record by record) are accepted.
// AliasCheck collects a call's arguments by name: an output may overlap nothing else.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "penstock/tensor.h"

namespace penstock {

// Whether a byte belongs to an element of both views. Views with strides that do not nest can make
// the search long; it then stops and answers true.
bool share_memory(const TensorView& a, const TensorView& b);

// Whether two different indices of the view may name the same memory: true unless every axis
// steps over all that the axes of smaller stride cover.
bool overlaps_itself(const TensorView& view);

class AliasCheck {
 public:
  AliasCheck() { arguments_.reserve(kUsualArguments); }

  void input(const TensorView& view, std::string_view name) { add(view, name, Role::read); }
  void output(const TensorView& view, std::string_view name) { add(view, name, Role::written); }
  void workspace(const Workspace& workspace, int64_t needed);

  // Throws Error(invalid_argument) naming the two arguments that share memory.
  void run() const;

 private:
  static constexpr size_t kUsualArguments = 32;
  enum class Role : uint8_t { read, written };
  struct Argument {
    TensorView view;
    std::string_view name;
    Role role;
    uintptr_t begin;  // the bytes from the first to the last element
    uintptr_t end;
  };

  void add(const TensorView& view, std::string_view name, Role role);

  std::vector<Argument> arguments_;
};

}  // namespace penstock
