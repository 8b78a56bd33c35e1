// SPDX-License-Identifier: Apache-2.0
//
// See buffer.h.
#include "buffer.h"

#include <algorithm>
#include <cstring>

#include "tensor/half.h"

namespace penstock::hostile {
namespace {

constexpr uint8_t kGuard = 0xA5;
constexpr int64_t kAlignment = 64;

template <typename T, typename Convert>
void store_as(const std::vector<double>& values, void* out, Convert convert) {
  auto* bytes = static_cast<uint8_t*>(out);
  for (size_t i = 0; i < values.size(); ++i) {
    const T value = convert(values[i]);
    std::memcpy(bytes + i * sizeof(T), &value, sizeof(T));  // the block may be misaligned
  }
}

template <typename T, typename Convert>
std::vector<double> loaded_as(const void* data, int64_t count, Convert convert) {
  std::vector<double> values(static_cast<size_t>(count));
  const auto* bytes = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < values.size(); ++i) {
    T value;
    std::memcpy(&value, bytes + i * sizeof(T), sizeof(T));
    values[i] = convert(value);
  }
  return values;
}

}  // namespace

Buffer::Buffer(int64_t bytes, uint8_t fill, int64_t offset) : bytes_(bytes) {
  block_.assign(static_cast<size_t>(bytes + offset + 2 * kGuardBytes + kAlignment), kGuard);
  const auto address = reinterpret_cast<uintptr_t>(block_.data()) + kGuardBytes;
  const uintptr_t aligned = (address + kAlignment - 1) / kAlignment * kAlignment;
  begin_ = static_cast<int64_t>(aligned - reinterpret_cast<uintptr_t>(block_.data())) + offset;
  std::memset(data(), fill, static_cast<size_t>(bytes));
}

bool Buffer::guards_intact() const {
  const auto is_guard = [](uint8_t byte) { return byte == kGuard; };
  return std::all_of(block_.begin(), block_.begin() + begin_, is_guard) &&
         std::all_of(block_.begin() + begin_ + bytes_, block_.end(), is_guard);
}

std::vector<uint8_t> Buffer::copy() const { return {data(), data() + bytes_}; }

double rounded(double value, DType dtype) {
  switch (dtype) {
    case DType::float32:
      return static_cast<double>(static_cast<float>(value));
    case DType::bfloat16:
      return to_float(to_bfloat16(static_cast<float>(value)));
    case DType::float16:
      return to_float(to_float16(static_cast<float>(value)));
    default:
      return value;
  }
}

void store(const std::vector<double>& values, DType dtype, void* out) {
  switch (dtype) {
    case DType::float64:
      return store_as<double>(values, out, [](double v) { return v; });
    case DType::float32:
      return store_as<float>(values, out, [](double v) { return static_cast<float>(v); });
    case DType::bfloat16:
      return store_as<bfloat16>(values, out,
                                [](double v) { return to_bfloat16(static_cast<float>(v)); });
    case DType::float16:
      return store_as<float16>(values, out,
                               [](double v) { return to_float16(static_cast<float>(v)); });
    default:
      return;
  }
}

std::vector<double> loaded(const void* data, int64_t count, DType dtype) {
  switch (dtype) {
    case DType::float64:
      return loaded_as<double>(data, count, [](double v) { return v; });
    case DType::float32:
      return loaded_as<float>(data, count, [](float v) { return static_cast<double>(v); });
    case DType::bfloat16:
      return loaded_as<bfloat16>(data, count, [](bfloat16 v) { return to_float(v); });
    case DType::float16:
      return loaded_as<float16>(data, count, [](float16 v) { return to_float(v); });
    default:
      return {};
  }
}

std::vector<double> loaded(const std::vector<uint8_t>& bytes, DType dtype) {
  return loaded(bytes.data(), static_cast<int64_t>(bytes.size()) / size_of(dtype), dtype);
}

}  // namespace penstock::hostile
