// SPDX-License-Identifier: Apache-2.0
//
// The one exception of the core. Every error says what was wrong, what was got, what was expected
// and what to do about it; it is thrown before anything is launched or written.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "penstock/export.h"

namespace penstock {

enum class ErrorCode : uint8_t {
  invalid_argument,  // a shape, dtype, stride, device or value that the contract excludes
  unsupported,       // valid, but no backend (or not the named one) can run it
  out_of_memory,     // an allocation failed; `got` and `expected` are bytes
  device_error,      // the device reported a failure, ours or an earlier one
};

class PENSTOCK_API Error : public std::runtime_error {
 public:
  struct Details {
    std::string what;      // the argument or operation, by its public name
    std::string got;       // the value that was passed or met
    std::string expected;  // the values that are accepted
    std::string remedy;    // what the caller can do
  };

  Error(ErrorCode code, Details details)
      : std::runtime_error(message(details)), code_(code), details_(std::move(details)) {}

  ErrorCode code() const { return code_; }
  const Details& details() const { return details_; }

 private:
  static std::string message(const Details& d) {
    return d.what + ": got " + d.got + ", expected " + d.expected + ". " + d.remedy;
  }

  ErrorCode code_;
  Details details_;
};

}  // namespace penstock
