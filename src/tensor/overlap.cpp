// SPDX-License-Identifier: Apache-2.0
//
// See overlap.h. Two views overlap where delta + sum_k c_k s_k lies within an element, for integer
// c_k in [low_k, high_k] and the strides s_k of both views; with nested strides at most two values
// of each c_k can still reach it, so the search visits a handful of nodes.
#include "tensor/overlap.h"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "tensor/checks.h"

namespace penstock {
namespace {

constexpr int kMaxTerms = 2 * kMaxRank;
constexpr int kMaxVisits = 4096;

struct Term {
  int64_t stride = 0;  // bytes, > 0
  int64_t low = 0;
  int64_t high = 0;
};

// Largest first. A handful of terms: insertion.
void sort_by_stride(Term* terms, int count) {
  for (int i = 1; i < count; ++i)
    for (int j = i; j > 0 && terms[j].stride > terms[j - 1].stride; --j)
      std::swap(terms[j], terms[j - 1]);
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - ((a % b != 0) && (a < 0) ? 1 : 0); }

// Looks for coefficients that bring a byte offset into (above, below).
class OffsetSearch {
 public:
  OffsetSearch(int64_t above, int64_t below) : above_(above), below_(below) {}

  void add_axes(const TensorView& view, int64_t sign) {
    for (int32_t axis = 0; axis < view.rank; ++axis) {
      const int64_t stride = view.stride(axis) * size_of(view.dtype) * sign;
      const int64_t last = view.size(axis) - 1;
      if (stride == 0 || last == 0) continue;
      Term& term = term_of(stride < 0 ? -stride : stride);
      (stride < 0 ? term.low : term.high) += stride < 0 ? -last : last;
    }
  }

  bool reaches(int64_t offset) {
    sort_by_stride(terms_.data(), count_);
    for (int k = count_ - 1; k >= 0; --k) {
      const Term& term = terms_[static_cast<size_t>(k)];
      const auto i = static_cast<size_t>(k);
      rest_low_[i] = rest_low_[i + 1] + term.low * term.stride;
      rest_high_[i] = rest_high_[i + 1] + term.high * term.stride;
    }
    visits_ = 0;
    return search(0, offset);
  }

 private:
  Term& term_of(int64_t stride) {
    for (int k = 0; k < count_; ++k)
      if (terms_[static_cast<size_t>(k)].stride == stride) return terms_[static_cast<size_t>(k)];
    terms_[static_cast<size_t>(count_)].stride = stride;
    return terms_[static_cast<size_t>(count_++)];
  }

  bool search(int k, int64_t offset) {
    if (++visits_ > kMaxVisits) return true;
    if (k == count_) return above_ < offset && offset < below_;
    const auto next = static_cast<size_t>(k) + 1;
    const Term& term = terms_[static_cast<size_t>(k)];
    // above < offset + c * stride + rest_high and offset + c * stride + rest_low < below
    const int64_t first = floor_div(above_ - offset - rest_high_[next], term.stride) + 1;
    const int64_t last = floor_div(below_ - 1 - offset - rest_low_[next], term.stride);
    for (int64_t c = std::max(first, term.low); c <= std::min(last, term.high); ++c)
      if (search(k + 1, offset + c * term.stride)) return true;
    return false;
  }

  int64_t above_;
  int64_t below_;
  int count_ = 0;
  int visits_ = 0;
  std::array<Term, kMaxTerms> terms_ = {};
  std::array<int64_t, kMaxTerms + 1> rest_low_ = {};
  std::array<int64_t, kMaxTerms + 1> rest_high_ = {};
};

}  // namespace

bool share_memory(const TensorView& a, const TensorView& b) {
  if (a.numel() == 0 || b.numel() == 0 || a.device != b.device) return false;
  const auto delta = static_cast<int64_t>(reinterpret_cast<uintptr_t>(b.data) -
                                          reinterpret_cast<uintptr_t>(a.data));
  OffsetSearch search(-size_of(b.dtype), size_of(a.dtype));
  search.add_axes(a, -1);
  search.add_axes(b, 1);
  return search.reaches(delta);
}

bool overlaps_itself(const TensorView& view) {
  if (view.numel() == 0) return false;
  std::array<Term, kMaxRank> axes = {};
  int count = 0;
  for (int32_t axis = 0; axis < view.rank; ++axis)
    if (view.size(axis) > 1)
      axes[static_cast<size_t>(count++)] = {view.stride(axis), 0, view.size(axis) - 1};
  sort_by_stride(axes.data(), count);
  int64_t covered = 1;  // elements from the first to the last of the axes seen so far
  for (int k = count - 1; k >= 0; --k) {
    const Term& axis = axes[static_cast<size_t>(k)];
    if (axis.stride < covered) return true;
    covered += axis.stride * axis.high;
  }
  return false;
}

void AliasCheck::add(const TensorView& view, std::string_view name, Role role) {
  if (view.numel() == 0) return;
  int64_t low = 0;
  int64_t high = size_of(view.dtype);
  for (int32_t axis = 0; axis < view.rank; ++axis) {
    const int64_t reach = (view.size(axis) - 1) * view.stride(axis) * size_of(view.dtype);
    (reach < 0 ? low : high) += reach;
  }
  const auto data = reinterpret_cast<uintptr_t>(view.data);
  arguments_.push_back(
      {view, name, role, data + static_cast<uintptr_t>(low), data + static_cast<uintptr_t>(high)});
}

void AliasCheck::workspace(const Workspace& workspace, int64_t needed) {
  output(TensorView::contiguous(workspace.data, DType::uint8, {needed},
                                arguments_.empty() ? Device{} : arguments_.front().view.device),
         "workspace");
}

void AliasCheck::run() const {
  for (size_t i = 0; i < arguments_.size(); ++i) {
    for (size_t j = i + 1; j < arguments_.size(); ++j) {
      const Argument& a = arguments_[i];
      const Argument& b = arguments_[j];
      if (a.role == Role::read && b.role == Role::read) continue;
      if (a.end <= b.begin || b.end <= a.begin || !share_memory(a.view, b.view)) continue;
      const Argument& written = b.role == Role::written ? b : a;
      const Argument& other = b.role == Role::written ? a : b;
      fail({std::string(written.name), "memory that overlaps " + std::string(other.name),
            "an output that shares no memory with any other argument",
            "Pass a buffer of its own."});
    }
  }
}

}  // namespace penstock
