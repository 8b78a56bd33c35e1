// SPDX-License-Identifier: Apache-2.0
//
// Opens libpenstock_cuda.so, which lies beside libpenstock.so, the first time backends are listed.
// A machine without the library, a GPU or a driver runs the CPU as before and is told the reason
// when it asks for the GPU.
#include "backend/cuda_library.h"

#include <dlfcn.h>

#include <string>

#include "backends/cuda/cuda_backend.h"

namespace penstock {
namespace {

constexpr char kLibraryName[] = "libpenstock_cuda.so";

// The folder of the binary that holds this code, with its trailing slash.
std::string own_folder() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&cuda_backend), &info) == 0) return {};
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? std::string() : path.substr(0, slash + 1);
}

struct Opened {
  const Backend* backend = nullptr;
  std::string reason;  // why there is none
};

Opened open_library() {
  const std::string path = own_folder() + kLibraryName;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* error = dlerror();
    return {nullptr, std::string("this build has no CUDA backend (CMake option "
                                 "PENSTOCK_BUILD_CUDA): ") +
                         (error == nullptr ? kLibraryName : error)};
  }
  const auto entry = reinterpret_cast<cuda::BackendEntry>(dlsym(library, cuda::kBackendSymbol));
  const Backend* backend = entry == nullptr ? nullptr : entry(cuda::kBackendAbi);
  if (backend == nullptr) {
    dlclose(library);
    return {nullptr, path + " is of another version of Penstock; install both from one build"};
  }
  return {backend, {}};
}

const Opened& opened() {
  static const Opened result = open_library();
  return result;
}

// Stands for the backend where it could not be opened, so that asking for it tells the reason.
const Backend& absent_backend() {
  static const Backend backend = [] {
    Backend table{};
    table.name = "cuda";
    table.device = DeviceType::cuda;
    table.description = [] { return std::string("NVIDIA GPUs"); };
    table.why_unavailable = [] { return opened().reason; };
    return table;
  }();
  return backend;
}

}  // namespace

const Backend& cuda_backend() {
  return opened().backend != nullptr ? *opened().backend : absent_backend();
}

}  // namespace penstock
