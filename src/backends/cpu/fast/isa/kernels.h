// SPDX-License-Identifier: Apache-2.0
//
// What one instruction set provides: packing of operand blocks into panels, the product of packed
// blocks, and loops over contiguous rows. Plain structs of pointers, because the files behind them
// are compiled with flags that the machine may not support: nothing but these tables crosses that
// border, and those files include nothing that could leave a shared inline function behind.
// Filled by isa/{portable,avx2,avx512,avx512_bf16,amx_bf16}.cpp, read by everything in this folder.
#pragma once

#include <cstdint>

namespace penstock::cpu::fast {

enum class Element : uint8_t { f32, bf16, f16 };

// Numbered as penstock::Activation.
enum class ActivationKind : uint8_t {
  swiglu,
  geglu,
  reglu,
  swiglu_clamped,
  silu,
  gelu,
  gelu_tanh,
  relu,
  relu_squared,
};
inline constexpr int kNumActivations = 9;

// One block of an operand: (o, k) is at base + at(outer_index, o) * outer_stride +
// at(k_index, k) * k_stride, where at(index, i) is index[i], or i without an index.
// It becomes panels of `width` outer elements, [panel][k][width], in 32-bit words; a word holds
// one float, or the bf16 pair (k, k + 1). Lanes past outer_count hold anything; the missing half
// of the last pair is 0.
struct PackArgs {
  const void* base;
  Element type;
  int64_t outer_stride;  // in elements
  int64_t k_stride;
  const int32_t* outer_index;
  const int32_t* k_index;
  int64_t outer_count;
  int64_t k_count;
  uint32_t* panels;
  int64_t panel_stride;  // in words
};

// What becomes of a block's sums. Past the caches: c will not be read soon; it and ldc are whole
// cache lines then.
enum class TileMode : uint8_t {
  store,
  add,
  store_past_caches,
  round_to_bf16,
  round_to_bf16_past_caches,
};

// Memory that the caller will read after this block: `bytes` from each of `count` addresses on.
// They are fetched into the second cache while the block is multiplied.
struct ReadNext {
  const void* const* at;
  int64_t count;
  int64_t bytes;
};

// c(i, j) = or += sum_k a(i, k) b(j, k): one chain of multiply-adds over k for each element, the
// same wherever the element sits. Columns of c up to a multiple of nr are written.
//
// a is packed, or read where it is: a_rows[i] is where row i's consecutive words of k begin, or
// a_columns[k] where the word k of consecutive rows begins.
// b is packed; or it is one whole panel still to be packed, b_columns[k] is where the word k of its
// columns begins, and it lies packed at b afterwards.
struct BlockArgs {
  const uint32_t* a;
  int64_t a_panel_stride;
  const void* const* a_rows;     // null: packed, or by columns
  const void* const* a_columns;  // null: packed, or by rows
  uint32_t* b;
  int64_t b_panel_stride;
  const void* const* b_columns;  // null: packed
  ReadNext next;
  int64_t words;  // of k, in a panel
  int64_t rows;
  int64_t cols;
  void* c;      // floats, or bf16 where mode rounds to it
  int64_t ldc;  // in elements
  TileMode mode;
};

inline constexpr int64_t kMaxBlockK = 1024;  // the largest k_block: callers' tables have its size

// How multiply takes an operand.
enum class Taken : uint8_t { packed, packed_or_in_place };

struct GemmKernels {
  int64_t mr;             // width of a's panels
  int64_t nr;             // width of b's panels
  int64_t k_block;        // elements of k that are packed, and summed from 0, at a time
  int64_t k_per_word;     // 1: float panels, any element type; 2: bf16 pairs, bf16 only
  int64_t word_unit;      // words of k in a panel are filled up with zeros to a multiple of this
  int64_t a_panel_spill;  // words past the end of a panel that packing may overwrite
  int64_t b_panel_spill;
  Taken left_rows;  // as a_rows
  Taken columns;    // as a_columns and b_columns
  void (*pack_a)(const PackArgs& args);
  void (*pack_b)(const PackArgs& args);
  void (*multiply)(const BlockArgs& args);
};

struct ActivationParams {
  float clamp_alpha;
  float clamp_limit;
};

// Of one row: act(gate, up) and, given `g` = dO W2 and the score s, the gradients with respect to
// gate and up times s. `up` and `d_up` are null for activations without a gate.
struct ActivationRow {
  const float* gate;
  const float* up;
  int64_t count;
  float* a;
  const float* g;  // gradient only, as everything below
  float score;
  float* d_gate;
  float* d_up;
};

// Loops over contiguous rows of floats. Sums run in an order that depends on the count alone.
struct RowKernels {
  void (*widen)(Element type, const void* from, float* to, int64_t count);
  void (*narrow)(Element type, const float* from, void* to, int64_t count);
  void (*add)(const float* addend, float* to, int64_t count);
  void (*scale)(float factor, const float* from, float* to, int64_t count);
  void (*add_scaled)(Element type, float factor, const void* from, float* to, int64_t count);
  float (*dot)(const float* left, const float* right, int64_t count);
  void (*activate[kNumActivations])(const ActivationParams& params, const ActivationRow& row);
  void (*activation_gradient[kNumActivations])(const ActivationParams& params,
                                               const ActivationRow& row);
};

struct IsaKernels {
  GemmKernels f32;
  GemmKernels bf16;  // mr = 0: bf16 operands are widened and take f32
  RowKernels rows;
};

const IsaKernels& portable_kernels();
#if defined(__x86_64__)
const IsaKernels& avx2_kernels();
const IsaKernels& avx512_kernels();
const IsaKernels& avx512_bf16_kernels();
const IsaKernels& amx_bf16_kernels();
#endif

}  // namespace penstock::cpu::fast
