// Attention of chunks of prompts in bfloat16 on AMX, block by block of tokens ("flash attention", Dao et al.,
// arXiv:2205.14135), with what has been gathered rescaled when a higher score is met.
//
// Everything stands the other way round: scores are keys times queries [tokens, queries], so that a key is read as it
// lies in the cache, and that a vector is a score of sixteen queries, each of which has a lane of its own; what is
// gathered is values times weights [dimensions, queries]. Blocks and parts begin at the same tokens for everyone, and
// what a query doesn't see weighs nothing in it, so that it comes to the same to the bit whatever queries are beside
// it, in whichever chunk.

#include "amx.h"
#include "attention.h"

#ifdef AMX

#include <omp.h>

#include <array>
#include <cmath>
#include <vector>

namespace {

constexpr int TOKENS = 128;        // of a block
constexpr int PART = 512;          // tokens of a context that are attended to by themselves
constexpr int QUERIES = 2 * TILE;  // that share the keys they read
constexpr int GROUP = 4;           // tiles of dimensions that are gathered at a time
constexpr int AHEAD = 2 * TILE;    // tokens
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

// What the queries of a tile have gathered, each in its lane.
struct Gathered {
  float (*values)[TILE];  // [dimensions]
  Floats top, total;

  void clear(int dim) {
    for (int d = 0; d < dim; d++) store(values[d], Floats{});
    top = all(-INFINITY), total = Floats{};
  }

  // Takes a further part into account ("online softmax", Milakov & Gimelshein, arXiv:1805.02867).
  void merge(const Gathered& part, int dim) {
    const Floats highest = larger(top, part.top), base = highest == -INFINITY ? Floats{} : highest;
    const Floats old = power_of_two(top - base), fresh = power_of_two(part.top - base);
    for (int d = 0; d < dim; d++) store(values[d], load(values[d]) * old + load(part.values[d]) * fresh);
    top = highest, total = total * old + part.total * fresh;
  }
};

// Some queries of a sequence's key head, up to QUERIES.
struct Item {
  int sequence, head, first, count;

  int tiles() const { return ceiling(count, TILE); }
};

struct Attend {
  const Attention& how;
  const BFloat16* query;
  int64_t query_stride;
  const BFloat16 *keys, *values;
  const int32_t* tables;
  int64_t table_stride;
  const int32_t* starts;  // [sequences + 1]
  const int64_t* positions;
  BFloat16* out;
  BFloat16* packed;              // values, as `pack` leaves them, of sequences with several items
  std::vector<int64_t> offsets;  // [sequences + 1]: of each one's in `packed`, in steps of STEP tokens

  int heads() const { return how.heads / how.key_heads; }
  int queries(int sequence) const { return (starts[sequence + 1] - starts[sequence]) * heads(); }
  int end(int row) const { return int(positions[row]) + 1; }
  int begin(int row) const { return how.window && end(row) > how.window ? end(row) - how.window : 0; }
  int row(const Item& item, int n) const {  // what fills up a tile stands for the first query
    return starts[item.sequence] + (item.first + (n < item.count ? n : 0)) / heads();
  }
  int first_part(const Item& item) const { return begin(row(item, 0)) / PART; }
  int parts(const Item& item) const { return (end(row(item, item.count - 1)) - 1) / PART - first_part(item) + 1; }
  int first_token(int sequence) const { return begin(starts[sequence]) / TOKENS * TOKENS; }
  int last_token(int sequence) const { return end(starts[sequence + 1] - 1); }
  int steps(int sequence) const {
    return queries(sequence) > QUERIES ? ceiling(last_token(sequence) - first_token(sequence), STEP) : 0;
  }

  // The key or value at `at`, a multiple of TILE; those of the tokens after it, as many as a tile has, follow it.
  const BFloat16* token(const BFloat16* cache, int sequence, int at, int head, int dim) const {
    const int32_t* table = tables + sequence * table_stride;
    const int64_t slot = int64_t(table[at / how.block_size]) * how.block_size + at % how.block_size;
    return cache + (slot * how.key_heads + head) * dim;
  }

  BFloat16* packed_values(int sequence, int head, int step) const {
    return packed + (offsets[sequence] * how.key_heads + int64_t(head) * steps(sequence) + step) * STEP * how.value_dim;
  }

  // The values of STEP tokens, per tile of dimensions [16 dimensions, STEP tokens]; 0 after the last token.
  void pack(int sequence, int head, int first, BFloat16* to) const {
    const int left = last_token(sequence) - first;
    const int64_t stride = int64_t(how.key_heads) * how.value_dim;
    const BFloat16* from[2] = {token(values, sequence, first, head, how.value_dim)};
    from[1] = left > TILE ? token(values, sequence, first + TILE, head, how.value_dim) : from[0];
    for (int d = 0; d < how.value_dim; d += TILE, to += TILE * STEP) {
      __m512i rows[TILE];
      for (int i = 0; i < TILE; i++) {
        const BFloat16* pair = from[2 * i / TILE] + 2 * i % TILE * stride + d;
        rows[i] = 2 * i + 1 < left   ? paired(shorts(pair), shorts(pair + stride))
                  : 2 * i + 1 == left ? paired(shorts(pair), Shorts{})
                                      : __m512i{};
      }
      transpose(rows);
      for (int i = 0; i < TILE; i++) _mm512_storeu_si512(to + i * STEP, rows[i]);
    }
  }

  // What an item's queries come to in a part of their context.
  void part(const Item& item, int index, Gathered* gathered) const {
    const int tiles = item.tiles(), key_steps = how.key_dim / STEP;
    alignas(64) BFloat16 wanted[2][MAX_DIM / STEP][TILE * STEP];  // pairs of dimensions by queries
    alignas(64) float scores[2][TOKENS][TILE];
    alignas(64) int32_t seen_from[2][TILE], seen_to[2][TILE];
    int from = 1 << 30, to = 0, all_from = 0, all_to = 1 << 30;
    for (int n = 0; n < tiles * TILE; n++) {
      const int a = begin(row(item, n)), b = end(row(item, n));
      seen_from[n / TILE][n % TILE] = a, seen_to[n / TILE][n % TILE] = b;
      from = a < from ? a : from, to = b > to ? b : to;
      all_from = a > all_from ? a : all_from, all_to = b < all_to ? b : all_to;
    }
    from = from > index * PART ? from : index * PART, to = to < (index + 1) * PART ? to : (index + 1) * PART;
    for (int tile = 0; tile < tiles; tile++) {
      gathered[tile].clear(how.value_dim);
      for (int k = 0; k < key_steps; k++) take_queries(item, tile, k * STEP, wanted[tile][k]);
    }
    for (int block = from / TOKENS * TOKENS; block < to; block += TOKENS) {
      const int tokens = to - block < TOKENS ? ceiling(to - block, STEP) * STEP : TOKENS;
      score(item, block, to, wanted, scores);
      alignas(64) BFloat16 own[TOKENS * MAX_DIM];
      const BFloat16* values = own;
      if (steps(item.sequence))
        values = packed_values(item.sequence, item.head, (block - first_token(item.sequence)) / STEP);
      else
        for (int t = 0; t < tokens; t += STEP) pack(item.sequence, item.head, block + t, own + t * how.value_dim);
      const bool is_whole = all_from <= block && block + tokens <= all_to;
      for (int tile = 0; tile < tiles; tile++) {
        if (how.softcap > 0)
          for (int t = 0; t < tokens; t++)
            store(scores[tile][t], hyperbolic_tangent(load(scores[tile][t]) * (how.scale / how.softcap)));
        if (!is_whole) hide(block, tokens, seen_from[tile], seen_to[tile], scores[tile]);
        alignas(64) BFloat16 weights[TOKENS / STEP][TILE * STEP];  // pairs of tokens by queries
        const Floats rescale = weigh(tokens, scores[tile], weights, gathered[tile]);
        gather(tokens, values, weights, rescale, gathered[tile].values);
      }
    }
  }

  // STEP dimensions of a tile's queries, as pairs of dimensions by queries.
  void take_queries(const Item& item, int tile, int d, BFloat16* to) const {
    __m512i rows[TILE];
    for (int i = 0; i < TILE; i++) {
      const int n = tile * TILE + i < item.count ? tile * TILE + i : 0;
      const int64_t head = int64_t(item.head) * heads() + (item.first + n) % heads();
      rows[i] = _mm512_loadu_si512(query + row(item, n) * query_stride + head * how.key_dim + d);
    }
    transpose(rows);
    for (int i = 0; i < TILE; i++) _mm512_store_si512(to + i * STEP, rows[i]);
  }

  // [tokens, queries] of a block, as far as `to`.
  void score(const Item& item, int block, int to, const BFloat16 (*wanted)[MAX_DIM / STEP][TILE * STEP],
             float (*scores)[TOKENS][TILE]) const {
    const int64_t stride = int64_t(how.key_heads) * how.key_dim * sizeof(BFloat16);
    const bool is_two = item.tiles() > 1, is_alone = steps(item.sequence) == 0;
    for (int t = 0; t < TOKENS && block + t < to; t += TILE) {
      const BFloat16* key = token(keys, item.sequence, block + t, item.head, how.key_dim);
      if (is_alone) {
        if (block + t + AHEAD < to) prefetch(keys, item, block + t + AHEAD, how.key_dim);
        prefetch(values, item, block + t, how.value_dim);
      }
      _tile_zero(0);
      _tile_zero(1);
      for (int k = 0; k < how.key_dim / STEP; k++) {
        _tile_loadd(4, key + k * STEP, stride);
        _tile_loadd(6, wanted[0][k], 64);
        _tile_dpbf16ps(0, 4, 6);
        if (is_two) {
          _tile_loadd(7, wanted[1][k], 64);
          _tile_dpbf16ps(1, 4, 7);
        }
      }
      _tile_stored(0, scores[0][t], 64);
      if (is_two) _tile_stored(1, scores[1][t], 64);
    }
  }

  // The blocks lie scattered, which no processor foresees.
  void prefetch(const BFloat16* cache, const Item& item, int at, int dim) const {
    const BFloat16* from = token(cache, item.sequence, at, item.head, dim);
    for (int i = 0; i < TILE; i++, from += how.key_heads * dim)
      for (int d = 0; d < dim; d += STEP) _mm_prefetch(from + d, _MM_HINT_T0);
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
  Floats weigh(int tokens, float (*scores)[TILE], BFloat16 (*weights)[TILE * STEP], Gathered& gathered) const {
    const float scale = (how.softcap > 0 ? how.softcap : how.scale) * LOG2_E;
    Floats most_of[4] = {all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY)};
    for (int t = 0; t < tokens; t += 4)
      for (int i = 0; i < 4; i++) most_of[i] = larger(most_of[i], load(scores[t + i]));
    const Floats here = larger(larger(most_of[0], most_of[1]), larger(most_of[2], most_of[3])) * scale;
    const Floats highest = larger(gathered.top, here), base = highest == -INFINITY ? Floats{} : highest;
    const Floats rescale = power_of_two(gathered.top - base);
    Floats sum = {};
    for (int t = 0; t < tokens; t += 2) {
      const Floats a = power_of_two(load(scores[t]) * scale - base);
      const Floats b = power_of_two(load(scores[t + 1]) * scale - base);
      sum += a + b;
      _mm512_store_si512(weights[t / STEP] + t % STEP * TILE, paired(halved(a), halved(b)));
    }
    gathered.total = gathered.total * rescale + sum;
    gathered.top = highest;
    return rescale;
  }

  // [dimensions, queries] += values times weights.
  void gather(int tokens, const BFloat16* values, const BFloat16 (*weights)[TILE * STEP], Floats rescale,
              float (*gathered)[TILE]) const {
    const int dims = how.value_dim / TILE;
    for (int d = 0; d < how.value_dim; d++) store(gathered[d], load(gathered[d]) * rescale);
    for (int d = 0; d < dims; d += GROUP) {
      const int many = dims - d < GROUP ? dims - d : GROUP;
      float* to = gathered[d * TILE];
      _tile_loadd(0, to, 64);
      if (many > 1) _tile_loadd(1, to + TILE * TILE, 64);
      if (many > 2) _tile_loadd(2, to + 2 * TILE * TILE, 64);
      if (many > 3) _tile_loadd(3, to + 3 * TILE * TILE, 64);
      for (int step = 0; step < tokens / STEP; step++) {
        const BFloat16* from = values + (int64_t(step) * dims + d) * TILE * STEP;
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

  void write(const Item& item, const Gathered* gathered) const {
    for (int tile = 0; tile < item.tiles(); tile++) {
      const Floats scale = 1.0f / gathered[tile].total;
      for (int d = 0; d < how.value_dim; d += TILE) {
        __m512i rows[TILE];
        for (int i = 0; i < TILE; i++) rows[i] = (__m512i)(load(gathered[tile].values[d + i]) * scale);
        transpose(rows);
        for (int n = tile * TILE; n < (tile + 1) * TILE && n < item.count; n++) {
          const int64_t head = int64_t(item.head) * heads() + (item.first + n) % heads();
          store(out + (int64_t(row(item, n)) * how.heads + head) * how.value_dim + d, (Floats)rows[n % TILE]);
        }
      }
    }
  }

  // All parts of an item, one after the other.
  void whole(const Item& item) const {
    alignas(64) float memory[2][2][MAX_DIM][TILE];
    Gathered sofar[2] = {{memory[0][0], {}, {}}, {memory[0][1], {}, {}}};
    Gathered next[2] = {{memory[1][0], {}, {}}, {memory[1][1], {}, {}}};
    const int first = first_part(item), count = parts(item);
    part(item, first, sofar);
    for (int i = 1; i < count; i++) {
      part(item, first + i, next);
      for (int tile = 0; tile < item.tiles(); tile++) sofar[tile].merge(next[tile], how.value_dim);
    }
    write(item, sofar);
  }
};

}  // namespace

extern "C" void attend_chunks(const Attention* how, const BFloat16* query, int64_t query_stride, const BFloat16* keys,
                             const BFloat16* values, const int32_t* tables, int64_t table_stride, const int32_t* starts,
                             const int64_t* positions, BFloat16* out, int sequences, BFloat16* packed) {
  Attend attend{*how, query, query_stride, keys, values, tables, table_stride, starts, positions, out, packed, {0}};
  std::vector<Item> items;
  std::vector<std::array<int, 3>> values_to_pack;
  int num_parts = 0;
  for (int i = 0; i < sequences; i++) {
    const int steps = attend.steps(i);
    attend.offsets.push_back(attend.offsets[i] + steps);
    for (int head = 0; head < how->key_heads; head++) {
      for (int first = 0; first < attend.queries(i); first += QUERIES) {
        const int left = attend.queries(i) - first;
        items.push_back({i, head, first, left < QUERIES ? left : QUERIES});
        num_parts += attend.parts(items.back());
      }
      for (int step = 0; step < steps; step++) values_to_pack.push_back({i, head, step});
    }
  }
  // Few items, as of one short chunk, are divided among the threads by their parts.
  const bool is_divided = int(items.size()) < 4 * omp_get_max_threads() && num_parts > int(items.size());
  const int size = 2 * how->value_dim * TILE;
  static thread_local std::vector<float> memory;  // kept: fresh pages cost more than what is written on them
  std::vector<Gathered> gathered;
  std::vector<std::array<int, 2>> parts;
  if (is_divided) {
    if (memory.size() < size_t(num_parts) * size) memory.resize(size_t(num_parts) * size);
    for (int i = 0; i < int(items.size()); i++)
      for (int part = 0; part < attend.parts(items[i]); part++) {
        float* of = memory.data() + int64_t(parts.size()) * size;
        for (int tile = 0; tile < 2; tile++)
          gathered.push_back(Gathered{reinterpret_cast<float (*)[TILE]>(of + tile * size / 2), {}, {}});
        parts.push_back({i, attend.first_part(items[i]) + part});
      }
  }
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (size_t i = 0; i < values_to_pack.size(); i++) {
      const auto [sequence, head, step] = values_to_pack[i];
      attend.pack(sequence, head, attend.first_token(sequence) + step * STEP,
                  attend.packed_values(sequence, head, step));
    }
    const TileConfig config;
    _tile_loadconfig(&config);
    if (is_divided) {
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < parts.size(); i++) attend.part(items[parts[i][0]], parts[i][1], &gathered[2 * i]);
    } else {
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < items.size(); i++) attend.whole(items[i]);
    }
    _tile_release();
  }
  for (size_t i = 0, first = 0; i < parts.size(); i++) {
    if (parts[i][0] != parts[first][0]) first = i;
    const Item& item = items[parts[i][0]];
    for (int tile = 0; i > first && tile < item.tiles(); tile++)
      gathered[2 * first + tile].merge(gathered[2 * i + tile], how->value_dim);
    if (i + 1 == parts.size() || parts[i + 1][0] != parts[i][0]) attend.write(item, &gathered[2 * first]);
  }
}

#else

extern "C" void attend_chunks(const Attention*, const void*, int64_t, const void*, const void*, const int32_t*, int64_t,
                             const int32_t*, const int64_t*, void*, int, void*) {}

#endif
