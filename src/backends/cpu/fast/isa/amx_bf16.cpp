// SPDX-License-Identifier: Apache-2.0
//
// Kernels for AVX-512 with matrix tiles (AMX) for bf16: as avx512.cpp, and bf16 products on tiles.
// Like the AVX-512 BF16 instruction, tiles flush subnormal inputs and sums to 0.
#include "backends/cpu/fast/isa/amx.h"
#include "backends/cpu/fast/isa/gemm.h"
#include "backends/cpu/fast/isa/rows.h"
#include "backends/cpu/fast/isa/vec_avx512.h"

namespace penstock::cpu::fast {
namespace {

// Palette 1: eight tiles of 16 rows of 64 bytes. Constant, because the intrinsic tells the
// compiler only of the first bytes it reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

constexpr int64_t kARowBytes = kTileSide * 4;
constexpr int64_t kBRowBytes = kAmxPanel * 4;

// Tiles 0 to 3 are the sums [upper left, upper right, lower left, lower right], 4 and 5 the rows,
// 6 and 7 the columns.
struct AmxTiles {
  static void begin() { _tile_loadconfig(&kTileConfig); }
  static void end() { _tile_release(); }
  static void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  static void multiply_upper(const uint32_t* a, const uint32_t* b) {
    _tile_loadd(4, a, kARowBytes);
    _tile_loadd(6, b, kBRowBytes);
    _tile_loadd(7, b + kTileSide, kBRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  static void multiply_both(const uint32_t* a, const uint32_t* b) {
    _tile_loadd(4, a, kARowBytes);
    _tile_loadd(6, b, kBRowBytes);
    _tile_loadd(7, b + kTileSide, kBRowBytes);
    _tile_loadd(5, a + kTileSide * kTileSide, kARowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  static void store_upper(float* sums) {
    _tile_stored(0, sums, kBRowBytes);
    _tile_stored(1, sums + kTileSide, kBRowBytes);
  }
  static void store_both(float* sums) {
    store_upper(sums);
    _tile_stored(2, sums + kTileSide * kAmxPanel, kBRowBytes);
    _tile_stored(3, sums + kTileSide * kAmxPanel + kTileSide, kBRowBytes);
  }
};

}  // namespace

const IsaKernels& amx_bf16_kernels() {
  using V = Avx512Vec;
  static constexpr IsaKernels kernels = {Gemm<V, FloatProduct<V>, 6, 4>::kernels(),
                                         AmxGemm<V, AmxTiles>::kernels(), Rows<V>::kernels()};
  return kernels;
}

}  // namespace penstock::cpu::fast
