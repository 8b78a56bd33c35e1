// SPDX-License-Identifier: Apache-2.0
//
// A whole layer at the level of the backend's table: every tensor of forward and backward, and one
// function per operation that runs it on any Backend. The fast backend is compared operation by
// operation with the reference backend in float64, fed the fast one's own stored inputs. Scratch is
// exactly what the backend asks for, poisoned, with guard bytes behind. Used by the tests of this
// folder and by benchmarks/cpu.
#pragma once

#include <cstdint>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "backend/ops.h"

namespace penstock::cpu::fast_test {

// Cache lines, as torch allocates: stores past the caches are taken only there.
template <typename T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {}
  T* allocate(size_t count) {
    return static_cast<T*>(::operator new (count * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* memory, size_t) { ::operator delete (memory, std::align_val_t{64}); }
  friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
};

// A contiguous array that owns its bytes. A default one is absent.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::vector<int64_t> shape);

  bool present() const { return !shape_.empty(); }
  DType dtype() const { return dtype_; }
  int64_t size(size_t axis) const { return shape_[axis]; }
  int64_t numel() const;
  TensorView view();

  double get(int64_t index) const;
  void set(int64_t index, double value);
  void poison();  // every byte 0xff: NaN, or -1
  Tensor to_float64() const;
  bool same_bits(const Tensor& other) const { return bytes_ == other.bytes_; }

  template <typename T>
  T* data() {
    return reinterpret_cast<T*>(bytes_.data());
  }

 private:
  DType dtype_ = DType::float32;
  std::vector<int64_t> shape_;
  std::vector<uint8_t, LineAllocator<uint8_t>> bytes_;
};

enum class Biases : uint8_t { absent, present };
enum class Load : uint8_t { random, skewed, one_expert };  // skewed leaves most experts empty
enum class Values : uint8_t { normal, small_integers };

struct LayerSpec {
  int64_t tokens = 0, hidden = 0, intermediate = 0, experts = 0, top_k = 1;
  DType dtype = DType::float32;
  Activation activation = Activation::swiglu;
  GateLayout gate_layout = GateLayout::concatenated;
  WeightOrder weight_order = WeightOrder::output_major;
  Biases biases = Biases::absent;
  Load load = Load::random;
  Values values = Values::normal;
  GradMode grad_mode = GradMode::overwrite;
  uint64_t seed = 1;

  int64_t halves() const { return is_gated(activation) ? 2 : 1; }
  std::string name() const;
  ExpertsProblem problem() const;
};

struct Layer {
  explicit Layer(const LayerSpec& layer_spec);

  LayerSpec spec;
  Tensor x, w1, w2, b1, b2, scores, d_output, router_weight;
  Tensor ids, counts, offsets, row_to_token, row_to_slot, slot_to_row;
  Tensor logits, router_scores, router_ids, d_logits, router_dx, d_router_weight;
  Tensor h, a, y, output;
  Tensor dh, a_scaled, partials, dscores, dx_rows, dx, dw1, dw2, db1, db2;

  RoutingPlan plan();
  RowGroups groups();
  UpWeights up_weights(Tensor& w, Tensor& b);
  DownWeights down_weights(Tensor& w, Tensor& b);
  // The same in float64, every tensor as stored here.
  Layer to_float64() const;

 private:
  std::vector<Tensor*> floating();
};

struct Time {
  double wall = 0.0;  // ms
  double processor = 0.0;
};

struct Runner {
  const Backend* backend;
  int32_t threads = 1;
  Time* time = nullptr;  // what the backend's calls took is added; poisoning is not counted
};

struct Operation {
  const char* name;
  void (*run)(Layer& layer, const Runner& runner);
  std::vector<Tensor Layer::*> outputs;
};

// In the order of a forward and a backward pass.
const std::vector<Operation>& operations();
void run_all(Layer& layer, const Runner& runner);

// Empty, or what is wrong with `operation` on this runner: a value outside the stage's tolerance
// of the float64 reference. The layer's inputs to it have been computed; its outputs are written.
std::string check_operation(Layer& layer, const Operation& operation, const Runner& runner);

}  // namespace penstock::cpu::fast_test
