// How a layer attends.

#pragma once

namespace {

constexpr int MAX_DIM = 256;  // of a head; whoever calls checks it

struct Attention {
  int heads, key_heads, key_dim, value_dim, block_size;
  float scale, softcap;  // softcap 0: none
  int window;            // 0: none
};

}  // namespace
