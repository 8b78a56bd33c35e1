// SPDX-License-Identifier: Apache-2.0
//
// See id_checks.h.
#include "routing/id_checks.h"

#include <algorithm>
#include <string>
#include <vector>

#include "tensor/checks.h"
#include "tensor/dispatch.h"

namespace penstock {
namespace {

struct SlotRange {
  int64_t begin;
  int64_t end;
};

SlotRange slots_of(const Routing& routing, int64_t token) {
  if (!routing.token_offsets.present()) return {token * routing.top_k, (token + 1) * routing.top_k};
  const int32_t* offsets = routing.token_offsets.as<const int32_t>();
  return {offsets[token], offsets[token + 1]};
}

template <typename Id>
std::string ids_text(const Id* ids, SlotRange slots, int64_t token) {
  constexpr int64_t kShown = 16;
  std::string text = "token " + std::to_string(token) + " with ids (";
  for (int64_t slot = slots.begin; slot < std::min(slots.end, slots.begin + kShown); ++slot)
    text += (slot > slots.begin ? ", " : "") + std::to_string(ids[slot]);
  return text + (slots.end > slots.begin + kShown ? ", ...)" : ")");
}

template <typename Id>
void check_typed_ids(const Routing& routing, int64_t num_experts) {
  const Id* ids = routing.ids.as<const Id>();
  std::vector<int64_t> last_token(static_cast<size_t>(num_experts), -1);
  for (int64_t token = 0; token < routing.num_tokens; ++token) {
    const SlotRange slots = slots_of(routing, token);
    for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
      const auto id = static_cast<int64_t>(ids[slot]);
      if (id == -1 || id >= num_experts) continue;
      if (id < -1)
        fail({"ids", ids_text(ids, slots, token),
              "ids from 0 to " + std::to_string(num_experts - 1) + ", or -1 to skip",
              "Write -1 (or any id >= E) for a slot to skip."});
      if (last_token[static_cast<size_t>(id)] == token)
        fail({"ids", ids_text(ids, slots, token),
              "no expert twice within a token, but " + std::to_string(id) + " repeats",
              "Add the two scores into one slot and skip the other."});
      last_token[static_cast<size_t>(id)] = token;
    }
  }
}

}  // namespace

void check_token_offsets(const Routing& routing) {
  const int32_t* offsets = routing.token_offsets.as<const int32_t>();
  constexpr std::string_view kRemedy = "Pass exclusive offsets of each token's slots.";
  if (offsets[0] != 0)
    fail({"token_offsets", "a first offset of " + std::to_string(offsets[0]), "0",
          std::string(kRemedy)});
  for (int64_t token = 0; token < routing.num_tokens; ++token)
    if (offsets[token + 1] < offsets[token])
      fail({"token_offsets",
            std::to_string(offsets[token]) + " then " + std::to_string(offsets[token + 1]) +
                " at token " + std::to_string(token),
            "offsets that never fall", std::string(kRemedy)});
  const int64_t last = offsets[routing.num_tokens];
  if (last > routing.num_slots())
    fail({"token_offsets", "a last offset of " + std::to_string(last),
          "at most " + std::to_string(routing.num_slots()) + ", the number of ids",
          std::string(kRemedy)});
  visit_index(routing.ids.dtype, [&](auto tag) {
    const auto* ids = routing.ids.as<const typename decltype(tag)::type>();
    for (int64_t slot = last; slot < routing.num_slots(); ++slot)
      if (ids[slot] >= 0)
        fail({"ids", std::to_string(ids[slot]) + " at slot " + std::to_string(slot),
              "-1 at and past the last offset of token_offsets, " + std::to_string(last),
              "Write -1 there, or pass the ids up to that offset."});
  });
}

void check_ids(const Routing& routing, int64_t num_experts) {
  visit_index(routing.ids.dtype, [&](auto tag) {
    check_typed_ids<typename decltype(tag)::type>(routing, num_experts);
  });
}

}  // namespace penstock
