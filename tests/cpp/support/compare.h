// SPDX-License-Identifier: Apache-2.0
//
// Comparison with an oracle in relative L2, and of errors with what they must say. Tolerances come
// from tests/cases/tolerances.json through penstock_cases.h.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "penstock/error.h"
#include "penstock_cases.h"

namespace penstock::test {

// ||got - expected|| / ||expected||, or ||got|| where the expected values are all zero. A NaN on
// either side gives NaN, which no tolerance accepts.
inline double relative_l2(const std::vector<double>& got, const std::vector<double>& expected) {
  if (got.size() != expected.size()) return NAN;
  double error = 0;
  double norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

inline void expect_close(const std::vector<double>& got, const std::vector<double>& expected,
                         double tolerance, const char* name) {
  ASSERT_EQ(got.size(), expected.size()) << name;
  EXPECT_LE(relative_l2(got, expected), tolerance) << name;
}

inline void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is not in: " << text;
}

// The call throws Error with this code and all of these words in its message.
template <typename Call>
void expect_error(Call&& call, ErrorCode code, std::initializer_list<const char*> words) {
  try {
    call();
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    for (const char* word : words) expect_contains(error.what(), word);
    EXPECT_FALSE(error.details().remedy.empty());
  }
}

template <typename Call>
void expect_invalid(Call&& call, std::initializer_list<const char*> words) {
  expect_error(std::forward<Call>(call), ErrorCode::invalid_argument, words);
}

}  // namespace penstock::test
