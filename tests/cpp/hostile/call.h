// SPDX-License-Identifier: Apache-2.0
//
// One call of the library over a Layer: guarded memory for every tensor, exact workspaces, and the
// argument structs, which a test may bend before it runs a step. Outputs and workspaces start out
// as `poison` bytes, so that a value that was never written shows in the bits.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "buffer.h"
#include "layer.h"
#include "penstock/penstock.h"

namespace penstock::hostile {

using Bytes = std::vector<uint8_t>;

class Call {
 public:
  explicit Call(const Layer& layer, const Context& context = {}, uint8_t poison = 0xFF);

  void build_plan();
  void forward();
  void backward();
  void run() {
    build_plan();
    forward();
    backward();
  }

  // The named result's bytes: output, h, dx, dscores, dw1, dw2, db1, db2 (those that exist).
  Bytes bytes(const std::string& name) const { return buffers_.at(name).copy(); }
  std::map<std::string, Bytes> all_results() const;
  std::vector<double> values(const std::string& name) const;
  Buffer& buffer(const std::string& name) { return buffers_.at(name); }
  // Replaces a buffer, for instance by one at another alignment, with the same bytes.
  TensorView moved(const std::string& name, const TensorView& view, int64_t offset);
  bool guards_intact() const;

  Context context;
  Routing routing;
  RoutingPlan plan;
  ExpertsForwardArgs forward_args;
  ExpertsBackwardArgs backward_args;

 private:
  TensorView input(const std::string& name, const std::vector<double>& values, DType dtype,
                   std::initializer_list<int64_t> shape);
  TensorView output(const std::string& name, DType dtype, std::initializer_list<int64_t> shape);
  ExpertWeights weights(const Layer& layer);
  ExpertWeights gradients(const Layer& layer);
  void make_routing(const Layer& layer);
  Workspace workspace(const std::string& name, int64_t bytes);

  uint8_t poison_;
  DType dtype_;
  std::map<std::string, Buffer> buffers_;
  Layer const* layer_;
};

// The relative error that `elements` results of this type may have.
double bound_for(size_t elements, DType dtype);
// Every result within a stage's tolerance of its type, and all guards intact.
void expect_near_statement(const Call& call, const Layer& layer);
// The same bits in every result.
void expect_same_bits(const std::map<std::string, Bytes>& got,
                      const std::map<std::string, Bytes>& expected);

// The CPU backends of this build that run `dtype`, by name.
std::vector<std::string> cpu_backends(DType dtype);

// The message of the Error that `action` throws; fails the test on anything else.
template <typename Action>
std::string error_of(Action action, ErrorCode code) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_FALSE(error.details().remedy.empty()) << error.what();
    return error.what();
  } catch (const std::exception& other) {
    ADD_FAILURE() << "threw something else: " << other.what();
    return other.what();
  }
  ADD_FAILURE() << "did not throw";
  return "";
}

// Runs on every CPU backend and dtype that it can run: GetParam() is {backend, dtype}.
struct Door {
  std::string backend;
  DType dtype;
};
std::vector<Door> doors();
std::string name_of_door(const ::testing::TestParamInfo<Door>& info);

class Hostile : public ::testing::TestWithParam<Door> {
 protected:
  DType dtype() const { return GetParam().dtype; }
  Context context(int32_t threads = 2) const {
    Context result;
    result.backend = GetParam().backend;
    result.threads = threads;
    return result;
  }
};

}  // namespace penstock::hostile

#define PENSTOCK_EVERY_DOOR(suite)                                                        \
  INSTANTIATE_TEST_SUITE_P(Doors, suite, ::testing::ValuesIn(penstock::hostile::doors()), \
                           penstock::hostile::name_of_door)
