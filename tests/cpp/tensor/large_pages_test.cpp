// SPDX-License-Identifier: Apache-2.0
//
// prefer_large_pages: whole pages of the given memory are marked, and nothing else; contents stay.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdio>
#include <fstream>
#include <string>

#include "penstock/memory.h"

namespace penstock {
namespace {

constexpr int64_t kPage = 4096;

// Whether the kernel lists `address` as memory for which large pages are advised ("hg").
bool is_advised(const char* address) {
  std::ifstream maps("/proc/self/smaps");
  const auto wanted = reinterpret_cast<unsigned long>(address);
  bool inside = false;
  for (std::string line; std::getline(maps, line);) {
    unsigned long begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2)
      inside = begin <= wanted && wanted < end;
    if (inside && line.rfind("VmFlags:", 0) == 0) return line.find(" hg") != std::string::npos;
  }
  return false;
}

class LargePages : public ::testing::Test {
 protected:
  static constexpr int64_t kBytes = 2 * kLargePageBytes;

  void SetUp() override {
    std::ifstream setting("/sys/kernel/mm/transparent_hugepage/enabled");
    if (!setting) GTEST_SKIP() << "this kernel has no transparent large pages";
    void* const memory =
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(memory, MAP_FAILED);
    memory_ = static_cast<char*>(memory);
  }
  void TearDown() override {
    if (memory_ != nullptr) munmap(memory_, kBytes);
  }

  char* memory_ = nullptr;
};

TEST_F(LargePages, MarkWholePagesOfTheMemoryOnly) {
  memory_[2 * kPage] = 42;
  prefer_large_pages(memory_ + kPage + 1, kLargePageBytes);
  EXPECT_FALSE(is_advised(memory_ + kPage));
  EXPECT_TRUE(is_advised(memory_ + 2 * kPage));
  EXPECT_TRUE(is_advised(memory_ + kLargePageBytes));
  EXPECT_FALSE(is_advised(memory_ + kLargePageBytes + kPage));
  EXPECT_EQ(memory_[2 * kPage], 42);
}

TEST_F(LargePages, LeaveSmallMemoryAlone) {
  prefer_large_pages(memory_, kLargePageBytes - 1);
  EXPECT_FALSE(is_advised(memory_));
  prefer_large_pages(nullptr, kBytes);
}

}  // namespace
}  // namespace penstock
