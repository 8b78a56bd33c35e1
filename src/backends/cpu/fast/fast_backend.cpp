// SPDX-License-Identifier: Apache-2.0
//
// One table per instruction set; the shipped one is that of the best set the processor supports.
#include "backends/cpu/fast/fast_backend.h"

#include <string>

#include "backends/cpu/fast/table.h"

namespace penstock::cpu {
namespace fast {

std::string why_not_dtype(DType dtype) {
  switch (dtype) {
    case DType::float32:
    case DType::float16:
    case DType::bfloat16:
      return {};
    case DType::float64:
      return "it computes in float32; float64 runs on the reference backend";
    default:
      return "it computes in floating-point dtypes, not in " + std::string(name_of(dtype));
  }
}

std::string why_not(const ExpertsProblem& problem) {
  if (problem.device.type != DeviceType::cpu)
    return "it runs on the cpu, not on " + name_of(problem.device);
  return why_not_dtype(problem.dtype);
}

namespace {

template <Isa kIsa>
std::string description() {
  return std::string("grouped products with ") + name_of(kIsa) + " kernels, own threads";
}

}  // namespace
}  // namespace fast

Backend fast_backend_on(fast::Isa isa) {
  using fast::Isa;
  using fast::Table;
#if defined(__x86_64__)
  switch (isa) {
    case Isa::portable:
      break;
    case Isa::avx2:
      return Table<fast::avx2_kernels>::make(fast::description<Isa::avx2>);
    case Isa::avx512:
      return Table<fast::avx512_kernels>::make(fast::description<Isa::avx512>);
    case Isa::avx512_bf16:
      return Table<fast::avx512_bf16_kernels>::make(fast::description<Isa::avx512_bf16>);
    case Isa::amx_bf16:
      return Table<fast::amx_bf16_kernels>::make(fast::description<Isa::amx_bf16>);
  }
#else
  static_cast<void>(isa);
#endif
  return Table<fast::portable_kernels>::make(fast::description<Isa::portable>);
}

const Backend& fast_backend() {
  static const Backend backend = fast_backend_on(fast::best_isa());
  return backend;
}

}  // namespace penstock::cpu
