// SPDX-License-Identifier: Apache-2.0
//
// Where a tensor lives.
#pragma once

#include <cstdint>
#include <string>

namespace penstock {

enum class DeviceType : uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int32_t index = 0;

  friend constexpr bool operator==(const Device&, const Device&) = default;
};

inline std::string name_of(const Device& device) {
  return device.type == DeviceType::cpu ? std::string("cpu")
                                        : "cuda:" + std::to_string(device.index);
}

}  // namespace penstock
