// SPDX-License-Identifier: Apache-2.0
//
// Memory for the hostile tests: a block with guard bytes on both sides and a chosen fill, so that
// a write outside, or a read of something never written, shows. Also the conversions between the
// storage types and double that the tests' own float64 statement needs.
#pragma once

#include <cstdint>
#include <vector>

#include "penstock/tensor.h"

namespace penstock::hostile {

inline constexpr int64_t kGuardBytes = 256;

class Buffer {
 public:
  Buffer() = default;
  // `offset` moves the data off its 64-byte alignment by that many bytes.
  explicit Buffer(int64_t bytes, uint8_t fill = 0, int64_t offset = 0);

  uint8_t* data() const { return const_cast<uint8_t*>(block_.data()) + begin_; }
  int64_t bytes() const { return bytes_; }
  bool guards_intact() const;
  std::vector<uint8_t> copy() const;

 private:
  std::vector<uint8_t> block_;
  int64_t begin_ = 0;
  int64_t bytes_ = 0;
};

// What `value` becomes when stored as dtype.
double rounded(double value, DType dtype);

void store(const std::vector<double>& values, DType dtype, void* out);
std::vector<double> loaded(const void* data, int64_t count, DType dtype);
std::vector<double> loaded(const std::vector<uint8_t>& bytes, DType dtype);

}  // namespace penstock::hostile
