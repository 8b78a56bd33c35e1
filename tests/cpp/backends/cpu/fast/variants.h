// SPDX-License-Identifier: Apache-2.0
//
// The backends that every test of this folder runs on: one per instruction set of this processor,
// and the emulated ones.
#pragma once

#include <string>
#include <vector>

#include "backend/ops.h"
#include "backends/cpu/fast/fast_backend.h"
#include "backends/cpu/fast/table.h"
#include "emulated_kernels.h"

namespace penstock::cpu::fast_test {

struct Variant {
  std::string name;
  Backend backend;
};

inline std::vector<Variant> variants() {
  std::vector<Variant> result;
  for (fast::Isa isa : fast::supported_isas())
    result.push_back({fast::name_of(isa), fast_backend_on(isa)});
  const auto description = [] { return std::string("emulated"); };
  result.push_back({"emulated_avx512_bf16", fast::Table<emulated_avx512_bf16>::make(description)});
  result.push_back({"emulated_amx_bf16", fast::Table<emulated_amx_bf16>::make(description)});
  return result;
}

inline std::ostream& operator<<(std::ostream& stream, const Variant& variant) {
  return stream << variant.name;
}

}  // namespace penstock::cpu::fast_test
