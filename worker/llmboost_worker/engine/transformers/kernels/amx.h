// Intel's AMX: eight registers that are tiles of 16 rows of 64 bytes, and an instruction that multiplies a tile of
// bfloat16 [16, 32] with one of pairs [16 pairs, 16, 2], and adds to one of float [16, 16].

#pragma once

#include "vectors.h"

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define AMX

namespace {

constexpr int TILE = 16;  // rows of a tile, and floats in one
constexpr int STEP = 32;  // bfloat16 in a row

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig() {
    for (int i = 0; i < 8; i++) bytes[i] = 64, rows[i] = TILE;
  }
};

inline int ceiling(int x, int divisor) { return (x + divisor - 1) / divisor; }

}  // namespace

#endif
