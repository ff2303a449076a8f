// Attention of chunks of prompts in bfloat16 on AMX, block by block of tokens ("flash attention", Dao et al.,
// arXiv:2205.14135), with what has been gathered rescaled when a higher score is met.
//
// Everything stands the other way round: scores are keys times queries [tokens, queries], so that a key is read as it
// lies in the cache, and that a vector is a score of sixteen queries, each of which has a lane of its own; what is
// gathered is values times weights [dimensions, queries]. Blocks begin at the same tokens for everyone, and what a
// query doesn't see weighs nothing in it, so that it comes to the same to the bit whatever queries are beside it.

#include "amx.h"
#include "attention.h"

#ifdef AMX

#include <cmath>
#include <vector>

namespace {

constexpr int TOKENS = 128;      // of a block
constexpr int QUERIES = 2 * TILE;  // that share the keys they read
constexpr int GROUP = 4;         // tiles of dimensions that are gathered at a time
constexpr float LOG2_E = 1.44269504088896341f;

inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }

// 2^x, within 3e-6 of it; 0 where that is next to nothing. By hand, as a number too small to be normal costs a hundred
// cycles in the instruction for it.
inline Floats power_of_two(Floats x) {
  const __mmask16 is_some = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
  const __m512i whole = _mm512_cvtps_epi32((__m512)x);
  const Floats rest = x - (Floats)_mm512_cvtepi32_ps(whole);
  Floats p = all(9.58284669e-3f);
  p = p * rest + 5.59064346e-2f;
  p = p * rest + 2.40240988e-1f;
  p = p * rest + 6.93124192e-1f;
  p = p * rest + 1.0f;
  return (Floats)_mm512_maskz_add_epi32(is_some, (__m512i)p, _mm512_slli_epi32(whole, 23));
}

// Sixteen rows of sixteen words become columns.
inline void transpose(__m512i* rows) {
  __m512i a[TILE], b[TILE];
  for (int i = 0; i < TILE; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < TILE; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  // Now b[4 * i + j] has, in each quarter q, column 4 * q + j of the rows 4 * i to 4 * i + 3.
  for (int j = 0; j < 4; j++) {
    const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x44), high = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x44);
    const __m512i high2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xee);
    rows[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    rows[8 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
    rows[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
}

// bfloat16 of two rows, side by side for each column.
inline __m512i paired(Shorts first, Shorts second) {
  return (__m512i)(widened(first) | (widened(second) << 16));
}

inline Shorts shorts(const BFloat16* from) { return *reinterpret_cast<const Shorts*>(from); }

struct Chunks {
  const Attention& how;
  const BFloat16* query;
  int64_t query_stride;
  const BFloat16 *keys, *values;
  const int32_t* tables;
  int64_t table_stride;
  const int32_t* starts;  // [sequences + 1]
  const int64_t* positions;
  BFloat16* out;
  BFloat16* packed;              // values, as `pack` leaves them
  std::vector<int64_t> offsets;  // [sequences + 1]: of each one's values in `packed`, in steps of STEP tokens

  int heads() const { return how.heads / how.key_heads; }
  int queries(int sequence) const { return (starts[sequence + 1] - starts[sequence]) * heads(); }
  int end(int row) const { return int(positions[row]) + 1; }
  int begin(int row) const { return how.window && end(row) > how.window ? end(row) - how.window : 0; }
  int first_block(int sequence) const { return begin(starts[sequence]) / TOKENS * TOKENS; }
  int last_token(int sequence) const { return end(starts[sequence + 1] - 1); }
  int steps(int sequence) const { return ceiling(last_token(sequence) - first_block(sequence), STEP); }

  const BFloat16* token(const BFloat16* cache, int sequence, int at, int head, int dim) const {
    const int32_t* table = tables + sequence * table_stride;
    const int64_t slot = int64_t(table[at / how.block_size]) * how.block_size + at % how.block_size;
    return cache + (slot * how.key_heads + head) * dim;
  }

  BFloat16* values_of(int sequence, int head, int step) const {
    const int64_t steps = offsets[sequence] * how.key_heads + int64_t(head) * this->steps(sequence) + step;
    return packed + steps * STEP * how.value_dim;
  }

  // STEP tokens' values, per tile of dimensions [16 dimensions, STEP tokens]; 0 after the last token.
  void pack(int sequence, int head, int step) const {
    const int first = first_block(sequence) + step * STEP, last = last_token(sequence);
    BFloat16* to = values_of(sequence, head, step);
    for (int d = 0; d < how.value_dim; d += TILE, to += TILE * STEP) {
      __m512i rows[TILE];
      for (int i = 0; i < TILE; i++) {
        Shorts pair[2] = {};
        for (int j = 0; j < 2; j++)
          if (const int at = first + 2 * i + j; at < last)
            pair[j] = shorts(token(values, sequence, at, head, how.value_dim) + d);
        rows[i] = paired(pair[0], pair[1]);
      }
      transpose(rows);
      for (int i = 0; i < TILE; i++) _mm512_storeu_si512(to + i * STEP, rows[i]);
    }
  }

  // What some queries of a sequence's key head come to; `first` of them.
  void attend(int sequence, int head, int first) const {
    const int count = queries(sequence) - first < QUERIES ? queries(sequence) - first : QUERIES;
    const int tiles = ceiling(count, TILE), key_steps = how.key_dim / STEP;
    alignas(64) BFloat16 wanted[2][MAX_DIM / STEP][TILE * STEP];  // pairs of dimensions by queries
    alignas(64) float scores[2][TOKENS][TILE];
    alignas(64) float gathered[2][MAX_DIM][TILE];
    alignas(64) int32_t seen_from[2][TILE], seen_to[2][TILE];
    Floats top[2] = {all(-INFINITY), all(-INFINITY)}, total[2] = {};
    int from = 1 << 30, to = 0, all_from = 0, all_to = 1 << 30;
    for (int n = 0; n < tiles * TILE; n++) {
      const int row = starts[sequence] + (first + (n < count ? n : 0)) / heads();
      const int a = begin(row), b = end(row);
      seen_from[n / TILE][n % TILE] = a, seen_to[n / TILE][n % TILE] = b;
      from = a < from ? a : from, to = b > to ? b : to;
      all_from = a > all_from ? a : all_from, all_to = b < all_to ? b : all_to;
    }
    for (int tile = 0; tile < tiles; tile++) {
      for (int d = 0; d < how.value_dim; d++) store(gathered[tile][d], Floats{});
      for (int k = 0; k < key_steps; k++) {
        __m512i rows[TILE];
        for (int i = 0; i < TILE; i++) {
          const int n = first + (tile * TILE + i < count ? tile * TILE + i : 0);
          const int row = starts[sequence] + n / heads();
          rows[i] = _mm512_loadu_si512(query + row * query_stride +
                                       (int64_t(head) * heads() + n % heads()) * how.key_dim + k * STEP);
        }
        transpose(rows);
        for (int i = 0; i < TILE; i++) _mm512_store_si512(wanted[tile][k] + i * STEP, rows[i]);
      }
    }
    for (int block = from / TOKENS * TOKENS; block < to; block += TOKENS) {
      const int tokens = to - block < TOKENS ? ceiling(to - block, STEP) * STEP : TOKENS;
      score(sequence, head, block, to, wanted, tiles, scores);
      const bool is_whole = all_from <= block && block + tokens <= all_to;
      for (int tile = 0; tile < tiles; tile++) {
        if (how.softcap > 0)
          for (int t = 0; t < tokens; t++)
            store(scores[tile][t], hyperbolic_tangent(load(scores[tile][t]) * (how.scale / how.softcap)));
        if (!is_whole) hide(block, tokens, seen_from[tile], seen_to[tile], scores[tile]);
        alignas(64) BFloat16 weights[TOKENS / STEP][TILE * STEP];  // pairs of tokens by queries
        const Floats rescale = weigh(tokens, scores[tile], weights, top[tile], total[tile]);
        gather(sequence, head, block, tokens, weights, rescale, gathered[tile]);
      }
    }
    for (int tile = 0; tile < tiles; tile++)
      write(sequence, head, first + tile * TILE, count - tile * TILE, gathered[tile], 1.0f / total[tile]);
  }

  // [tokens, queries] of a block, as far as `to`; of a whole tile of tokens, which lie side by side in the cache.
  void score(int sequence, int head, int block, int to, const BFloat16 (*wanted)[MAX_DIM / STEP][TILE * STEP],
             int tiles, float (*scores)[TOKENS][TILE]) const {
    const int64_t stride = int64_t(how.key_heads) * how.key_dim * sizeof(BFloat16);
    for (int t = 0; t < TOKENS && block + t < to; t += TILE) {
      const BFloat16* key = token(keys, sequence, block + t, head, how.key_dim);
      _tile_zero(0);
      _tile_zero(1);
      for (int k = 0; k < how.key_dim / STEP; k++) {
        _tile_loadd(4, key + k * STEP, stride);
        _tile_loadd(6, wanted[0][k], 64);
        _tile_dpbf16ps(0, 4, 6);
        if (tiles > 1) {
          _tile_loadd(7, wanted[1][k], 64);
          _tile_dpbf16ps(1, 4, 7);
        }
      }
      _tile_stored(0, scores[0][t], 64);
      if (tiles > 1) _tile_stored(1, scores[1][t], 64);
    }
  }

  // What a query doesn't see, and what was not scored, becomes -infinity.
  static void hide(int block, int tokens, const int32_t* seen_from, const int32_t* seen_to, float (*scores)[TILE]) {
    const __m512i from = _mm512_load_si512(seen_from), to = _mm512_load_si512(seen_to);
    for (int t = 0; t < tokens; t++) {
      const __m512i at = _mm512_set1_epi32(block + t);
      const __mmask16 seen = _mm512_cmple_epi32_mask(from, at) & _mm512_cmplt_epi32_mask(at, to);
      _mm512_store_ps(scores[t], _mm512_mask_load_ps(_mm512_set1_ps(-INFINITY), seen, scores[t]));
    }
  }

  // exp(score - top) of a block's tokens; returns by how much what was gathered under an older top must be scaled.
  Floats weigh(int tokens, float (*scores)[TILE], BFloat16 (*weights)[TILE * STEP], Floats& top, Floats& total) const {
    const float scale = (how.softcap > 0 ? how.softcap : how.scale) * LOG2_E;
    Floats most_of[4] = {all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY)};
    for (int t = 0; t < tokens; t += 4)
      for (int i = 0; i < 4; i++) most_of[i] = larger(most_of[i], load(scores[t + i]));
    const Floats highest = larger(top, larger(larger(most_of[0], most_of[1]), larger(most_of[2], most_of[3])) * scale);
    const Floats base = highest == -INFINITY ? Floats{} : highest;
    const Floats rescale = power_of_two(top - base);
    Floats sum = {};
    for (int t = 0; t < tokens; t += 2) {
      const Floats a = power_of_two(load(scores[t]) * scale - base);
      const Floats b = power_of_two(load(scores[t + 1]) * scale - base);
      sum += a + b;
      _mm512_store_si512(weights[t / STEP] + t % STEP * TILE, paired(halved(a), halved(b)));
    }
    total = total * rescale + sum;
    top = highest;
    return rescale;
  }

  // [dimensions, queries] += values times weights.
  void gather(int sequence, int head, int block, int tokens, const BFloat16 (*weights)[TILE * STEP], Floats rescale,
              float (*gathered)[TILE]) const {
    const int first = (block - first_block(sequence)) / STEP, dims = how.value_dim / TILE;
    for (int d = 0; d < how.value_dim; d++) store(gathered[d], load(gathered[d]) * rescale);
    for (int d = 0; d < dims; d += GROUP) {
      const int many = dims - d < GROUP ? dims - d : GROUP;
      float* to = gathered[d * TILE];
      _tile_loadd(0, to, 64);
      if (many > 1) _tile_loadd(1, to + TILE * TILE, 64);
      if (many > 2) _tile_loadd(2, to + 2 * TILE * TILE, 64);
      if (many > 3) _tile_loadd(3, to + 3 * TILE * TILE, 64);
      for (int step = 0; step < tokens / STEP; step++) {
        const BFloat16* from = values_of(sequence, head, first + step) + d * TILE * STEP;
        _tile_loadd(6, weights[step], 64);
        _tile_loadd(4, from, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (many > 1) {
          _tile_loadd(5, from + TILE * STEP, 64);
          _tile_dpbf16ps(1, 5, 6);
        }
        if (many > 2) {
          _tile_loadd(4, from + 2 * TILE * STEP, 64);
          _tile_dpbf16ps(2, 4, 6);
        }
        if (many > 3) {
          _tile_loadd(5, from + 3 * TILE * STEP, 64);
          _tile_dpbf16ps(3, 5, 6);
        }
      }
      _tile_stored(0, to, 64);
      if (many > 1) _tile_stored(1, to + TILE * TILE, 64);
      if (many > 2) _tile_stored(2, to + 2 * TILE * TILE, 64);
      if (many > 3) _tile_stored(3, to + 3 * TILE * TILE, 64);
    }
  }

  void write(int sequence, int head, int first, int count, const float (*gathered)[TILE], Floats scale) const {
    for (int d = 0; d < how.value_dim; d += TILE) {
      __m512i rows[TILE];
      for (int i = 0; i < TILE; i++) rows[i] = (__m512i)(load(gathered[d + i]) * scale);
      transpose(rows);
      for (int i = 0; i < TILE && i < count; i++) {
        const int64_t row = starts[sequence] + (first + i) / heads();
        const int64_t of = row * how.heads + int64_t(head) * heads() + (first + i) % heads();
        store(out + of * how.value_dim + d, (Floats)rows[i]);
      }
    }
  }
};

}  // namespace

extern "C" void attend_chunks(const Attention* how, const BFloat16* query, int64_t query_stride, const BFloat16* keys,
                              const BFloat16* values, const int32_t* tables, int64_t table_stride,
                              const int32_t* starts, const int64_t* positions, BFloat16* out, int sequences,
                              BFloat16* packed) {
  Chunks chunks{*how, query, query_stride, keys, values, tables, table_stride, starts, positions, out, packed, {0}};
  std::vector<int> items{0};
  for (int i = 0; i < sequences; i++) {
    chunks.offsets.push_back(chunks.offsets[i] + chunks.steps(i));
    items.push_back(items[i] + ceiling(chunks.queries(i), QUERIES) * how->key_heads);
  }
#pragma omp parallel
  {
    int sequence = 0;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks.offsets[sequences] * how->key_heads; i++) {
      while (i < chunks.offsets[sequence] * how->key_heads) sequence--;
      while (i >= chunks.offsets[sequence + 1] * how->key_heads) sequence++;
      const int64_t within = i - chunks.offsets[sequence] * how->key_heads;
      chunks.pack(sequence, int(within / chunks.steps(sequence)), int(within % chunks.steps(sequence)));
    }
    const TileConfig config;
    _tile_loadconfig(&config);
    sequence = 0;
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < items[sequences]; i++) {
      while (i < items[sequence]) sequence--;
      while (i >= items[sequence + 1]) sequence++;
      const int within = i - items[sequence], blocks = (items[sequence + 1] - items[sequence]) / how->key_heads;
      chunks.attend(sequence, within / blocks, within % blocks * QUERIES);
    }
    _tile_release();
  }
}

#else

extern "C" void attend_chunks(const Attention*, const void*, int64_t, const void*, const void*, const int32_t*, int64_t,
                              const int32_t*, const int64_t*, void*, int, void*) {}

#endif
