// SPDX-License-Identifier: Apache-2.0
//
// See checks.h.
#include "tensor/checks.h"

#include <cstdint>
#include <limits>

#include "tensor/overlap.h"

namespace penstock {
namespace {

std::string tuple_text(const std::array<int64_t, kMaxRank>& values, int32_t rank) {
  std::string text = "(";
  for (int32_t axis = 0; axis < rank; ++axis) {
    if (axis > 0) text += ", ";
    text += std::to_string(values[static_cast<size_t>(axis)]);
  }
  return text + (rank == 1 ? ",)" : ")");
}

std::string quoted(std::string_view owner) { return owner.empty() ? "" : std::string(owner); }

bool unit_stride(const TensorView& view, int32_t axis) {
  return view.size(axis) <= 1 || view.stride(axis) == 1;
}

std::string_view layout_text(Layout layout) {
  switch (layout) {
    case Layout::contiguous:
      return "a contiguous tensor";
    case Layout::readable_rows:
      return "stride 1 in the last axis and no negative stride";
    case Layout::distinct_rows:
      return "stride 1 in the last axis and no two elements in the same place";
    case Layout::matrices:
      return "stride 1 in the last axis or the one before it, and no two elements in the same "
             "place (expert stride at least the span of one expert)";
  }
  return "";
}

bool has_layout(const TensorView& view, Layout layout) {
  const int32_t last = view.rank - 1;
  switch (layout) {
    case Layout::contiguous:
      return view.is_contiguous();
    case Layout::readable_rows:
      for (int32_t axis = 0; axis < last; ++axis)
        if (view.size(axis) > 1 && view.stride(axis) < 0) return false;
      return unit_stride(view, last);
    case Layout::distinct_rows:
      return unit_stride(view, last) && !overlaps_itself(view);
    case Layout::matrices:
      return (unit_stride(view, last) || unit_stride(view, last - 1)) && !overlaps_itself(view);
  }
  return false;
}

}  // namespace

std::string shape_text(const TensorView& view) {
  return view.present() ? tuple_text(view.shape, view.rank) : "an absent tensor";
}

std::string describe(const TensorView& view) {
  if (!view.present()) return "an absent tensor";
  return std::string(name_of(view.dtype)) + " " + shape_text(view) + " with strides " +
         tuple_text(view.strides, view.rank) + " on " + name_of(view.device);
}

void fail(Error::Details details) { throw Error(ErrorCode::invalid_argument, std::move(details)); }

void check_present(const TensorView& view, std::string_view name) {
  if (view.present()) return;
  fail({std::string(name), "an absent tensor", "a tensor", "Pass it; it is not optional here."});
}

void check_absent(const TensorView& view, std::string_view name, std::string_view because) {
  if (!view.present()) return;
  fail({std::string(name), describe(view), "an absent tensor, because " + std::string(because),
        "Leave it out."});
}

void check_rank(const TensorView& view, std::string_view name, std::string_view axes,
                int32_t rank) {
  check_present(view, name);
  bool negative = false;
  for (int32_t axis = 0; axis < view.rank; ++axis) negative = negative || view.size(axis) < 0;
  if (view.rank == rank && !negative) return;
  fail({std::string(name), "shape " + shape_text(view),
        std::to_string(rank) + " axes " + std::string(axes), "Reshape it."});
}

void check_shape(const TensorView& view, const TensorSpec& spec) {
  const Extents& extents = spec.extents;
  bool same = view.rank == extents.rank;
  for (int32_t axis = 0; same && axis < view.rank; ++axis)
    same = view.size(axis) == extents.sizes[static_cast<size_t>(axis)];
  if (same) return;
  fail({std::string(spec.name), "shape " + shape_text(view),
        "shape " + tuple_text(extents.sizes, extents.rank) + " = " + std::string(spec.axes),
        "Make its shape agree with the other arguments."});
}

void check_dtype(const TensorView& view, std::string_view name, const DTypeRule& rule) {
  if (view.dtype == rule.dtype) return;
  const std::string expected(name_of(rule.dtype));
  fail({std::string(name), std::string(name_of(view.dtype)),
        rule.owner.empty() ? expected : expected + " (from " + quoted(rule.owner) + ")",
        "Convert one of them; nothing is converted silently."});
}

void check_device(const TensorView& view, std::string_view name, const DeviceRule& rule) {
  if (view.device == rule.device) return;
  fail({std::string(name), "a tensor on " + name_of(view.device),
        name_of(rule.device) + " (the device of " + std::string(rule.owner) + ")",
        "Move one of them; nothing is moved silently."});
}

void check_layout(const TensorView& view, std::string_view name, Layout layout) {
  if (view.numel() == 0 || has_layout(view, layout)) return;
  fail({std::string(name), describe(view), std::string(layout_text(layout)),
        "Pass a copy with such strides; nothing is copied silently."});
}

void check_data(const TensorView& view, std::string_view name) {
  if (view.numel() == 0) return;
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  if (address == 0)
    fail({std::string(name), "a null pointer for " + describe(view), "the address of its elements",
          "Allocate the tensor before the call."});
  const auto size = static_cast<uintptr_t>(size_of(view.dtype));
  if (address % size == 0) return;
  fail({std::string(name), "data " + std::to_string(address % size) + " bytes past alignment",
        "a pointer aligned to the " + std::to_string(size) + " bytes of a " +
            std::string(name_of(view.dtype)),
        "Copy it to aligned memory."});
}

void check_tensor(const TensorView& view, const TensorSpec& spec) {
  check_present(view, spec.name);
  check_shape(view, spec);
  check_dtype(view, spec.name, spec.dtype);
  check_device(view, spec.name, spec.device);
  check_layout(view, spec.name, spec.layout);
  check_data(view, spec.name);
}

void check_count(int64_t value, std::string_view name, std::string_view remedy) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  if (0 <= value && value <= kMax) return;
  fail({std::string(name), std::to_string(value), "0 to " + std::to_string(kMax) + " (int32)",
        std::string(remedy)});
}

void check_workspace(const Workspace& workspace, int64_t needed, std::string_view query) {
  if (needed == 0) return;
  const std::string expected = "at least " + std::to_string(needed) + " bytes, " +
                               std::to_string(kWorkspaceAlignment) + "-byte aligned";
  const std::string remedy = "Allocate what " + std::string(query) + " returns for this context.";
  if (workspace.data == nullptr)
    fail({"workspace", "a null pointer and " + std::to_string(workspace.bytes) + " bytes", expected,
          remedy});
  if (workspace.bytes < needed)
    fail({"workspace", std::to_string(workspace.bytes) + " bytes", expected, remedy});
  const auto past = reinterpret_cast<uintptr_t>(workspace.data) % kWorkspaceAlignment;
  if (past != 0)
    fail({"workspace",
          std::to_string(workspace.bytes) + " bytes, " + std::to_string(past) +
              " bytes past alignment",
          expected, remedy});
}

int64_t checked_product(std::initializer_list<int64_t> factors, std::string_view name) {
  int64_t product = 1;
  for (int64_t factor : factors)
    if (__builtin_mul_overflow(product, factor, &product))
      fail({std::string(name), "a size past 2^63 - 1 bytes", "a size that fits 64 bits",
            "Split the problem."});
  return product;
}

}  // namespace penstock
