// What a decoding step on a CPU does between its matrix products, without a call into torch for each operation.
//
// Each function takes rows (tokens) of a type T, computes in float and rounds where transformers' modules round,
// so that a row depends on nothing but itself: not on its neighbours, nor on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "vectors.h"

namespace {

constexpr int PART = 256;      // tokens of a context that are attended to at a time
constexpr int AHEAD = 16;      // tokens
constexpr int TILE = 4;        // queries that share the registers they read keys into
constexpr int MAX_QUERIES = 64;  // of a group, per key head

// Attention ------------------------------------------------------------------------------------------------------

// Sums of four vectors: in each quarter first, then across them.
inline Quarters sums(const Floats& a, const Floats& b, const Floats& c, const Floats& d) {
#define LOW(x, y) __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH(x, y) __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW2(x, y) __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH2(x, y) __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
  const Floats ab = LOW(a, b) + HIGH(a, b), cd = LOW(c, d) + HIGH(c, d);
  const Floats all = LOW2(ab, cd) + HIGH2(ab, cd);
#undef LOW
#undef HIGH
#undef LOW2
#undef HIGH2
  const Halves half = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}

// Where the tokens [begin, end) of a sequence lie, as rows of the cache; padded to a multiple of four with the last.
inline void find(const int32_t* table, int block_size, int begin, int end, int64_t* rows) {
  int block = begin / block_size, offset = begin % block_size, count = 0;
  for (int i = begin; i < end; i++) {
    rows[count++] = int64_t(table[block]) * block_size + offset;
    if (++offset == block_size) offset = 0, block++;
  }
  for (; count % 4; count++) rows[count] = rows[count - 1];
}

// Keys or values of one key head.
template <class T>
struct Heads {
  const T* first;  // of [tokens, key_heads, dim]
  int64_t stride;
  int dim;
};

// The blocks lie scattered, which no processor foresees: what follows is asked for while this is computed.
template <class T>
inline void prefetch(const T* head, int dim) {
  for (int line = 0; line < dim * int(sizeof(T)); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(head) + line);
}

// What a query sees of a part: tokens [begin, end) of it.
struct Span {
  int begin, end;
};

// What queries are multiplied with keys as, and weights with values.
template <class T>
struct Operand {
  typedef float Type;
};

// N queries times four keys, which share the registers that they are read into.
template <class T, int N>
inline void score(const float* query, const T* const* key, int dim, float scale, float (*scores)[PART], int t) {
  Floats products[N][4] = {};
  for (int d = 0; d < dim; d += WIDTH) {
    Floats k[4];
    for (int i = 0; i < 4; i++) k[i] = load(key[i] + d);
    for (int n = 0; n < N; n++) {
      const Floats q = load(query + n * dim + d);
      for (int i = 0; i < 4; i++) products[n][i] += q * k[i];
    }
  }
  for (int n = 0; n < N; n++) {
    const Quarters four = sums(products[n][0], products[n][1], products[n][2], products[n][3]);
    *reinterpret_cast<Quarters*>(scores[n] + t) = four * scale;
  }
}

// Sums of `count` values, a multiple of four, weighted for N queries.
template <class T, int N>
inline void weigh(const Heads<T>& values, const int64_t* rows, int count, const float (*weights)[PART], float* out) {
  for (int d = 0; d < values.dim; d += WIDTH) {
    Floats sums_of_values[N] = {};
    for (int t = 0; t < count; t += 4) {
      Floats v[4];
      for (int i = 0; i < 4; i++) v[i] = load(values.first + rows[t + i] * values.stride + d);
      for (int n = 0; n < N; n++)
        for (int i = 0; i < 4; i++) sums_of_values[n] += v[i] * weights[n][t + i];
    }
    for (int n = 0; n < N; n++) store(out + n * values.dim + d, sums_of_values[n]);
  }
}

#ifdef __AVX512BF16__

// bfloat16 in pairs, without making floats of them. Weights are rounded, as where softmax's result is stored.
template <>
struct Operand<BFloat16> {
  typedef BFloat16 Type;
};

inline __m512bh pairs(const void* from) { return (__m512bh)_mm512_loadu_si512(from); }

template <class T, int N>
inline void score(const BFloat16* query, const BFloat16* const* key, int dim, float scale, float (*scores)[PART],
                  int t) {
  __m512 products[N][4] = {};
  int d = 0;
  for (; d + 2 * WIDTH <= dim; d += 2 * WIDTH)
    for (int i = 0; i < 4; i++) {
      const __m512bh k = pairs(key[i] + d);
      for (int n = 0; n < N; n++) products[n][i] = _mm512_dpbf16_ps(products[n][i], k, pairs(query + n * dim + d));
    }
  if (d < dim)
    for (int i = 0; i < 4; i++) {
      const Floats k = load(key[i] + d);
      for (int n = 0; n < N; n++) products[n][i] += (__m512)(k * load(query + n * dim + d));
    }
  for (int n = 0; n < N; n++) {
    const Quarters four = sums((Floats)products[n][0], (Floats)products[n][1], (Floats)products[n][2],
                               (Floats)products[n][3]);
    *reinterpret_cast<Quarters*>(scores[n] + t) = four * scale;
  }
}

template <class T, int N>
inline void weigh(const Heads<BFloat16>& values, const int64_t* rows, int count, const float (*weights)[PART],
                  float* out) {
  alignas(64) int32_t rounded[N][PART / 2];  // pairs of tokens
  for (int n = 0; n < N; n++)
    for (int t = 0; t < count; t += 2 * WIDTH)
      _mm512_store_si512(rounded[n] + t / 2, (__m512i)_mm512_cvtne2ps_pbh((__m512)load(weights[n] + t + WIDTH),
                                                                          (__m512)load(weights[n] + t)));
  int d = 0;
  for (; d + 2 * WIDTH <= values.dim; d += 2 * WIDTH) {
    __m512 sums_of_values[N][2] = {};
    for (int t = 0; t < count; t += 2) {
      const __m512i a = _mm512_loadu_si512(values.first + rows[t] * values.stride + d);
      const __m512i b = _mm512_loadu_si512(values.first + rows[t + 1] * values.stride + d);
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
      for (int n = 0; n < N; n++) {
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(rounded[n][t / 2]);
        sums_of_values[n][0] = _mm512_dpbf16_ps(sums_of_values[n][0], low, weight);
        sums_of_values[n][1] = _mm512_dpbf16_ps(sums_of_values[n][1], high, weight);
      }
    }
    // What was unpacked lies in fours: of each eight dimensions the first ones in one vector, the others in the other.
    for (int n = 0; n < N; n++) {
      const Floats x = (Floats)sums_of_values[n][0], y = (Floats)sums_of_values[n][1];
      float* to = out + n * values.dim + d;
      store(to, __builtin_shufflevector(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
      store(to + WIDTH, __builtin_shufflevector(x, y, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
    }
  }
  if (d < values.dim)
    for (int n = 0; n < N; n++) {
      Floats sum_of_values = {};
      for (int t = 0; t < count; t++)
        sum_of_values += load(values.first + rows[t] * values.stride + d) * weights[n][t];
      store(out + n * values.dim + d, sum_of_values);
    }
}

#endif

// N queries attend to `count` tokens, at most PART: sums of values weighted by exp(score - top), the sum of those
// weights (0 for one that sees nothing), and top.
template <class T, int N>
void attend_part(const typename Operand<T>::Type* query, const Span* seen, const Heads<T>& keys,
                 const Heads<T>& values, const int64_t* rows, int count, float scale, float softcap, float* out,
                 float* total, float* top) {
  float weights[N][PART];
  for (int t = 0; t < count; t += 4) {
    const T* key[4];
    for (int i = 0; i < 4; i++) {
      key[i] = keys.first + rows[t + i] * keys.stride;
      if (t + i + AHEAD < count) prefetch(keys.first + rows[t + i + AHEAD] * keys.stride, keys.dim);
      prefetch(values.first + rows[t + i] * values.stride, values.dim);
    }
    score<T, N>(query, key, keys.dim, scale, weights, t);
  }
  const int padded = (count + 2 * WIDTH - 1) / (2 * WIDTH) * (2 * WIDTH);
  for (int n = 0; n < N; n++) {
    float* row = weights[n];
    if (softcap > 0)
      for (int t = 0; t < count; t += WIDTH) store(row + t, hyperbolic_tangent(load(row + t) / softcap) * softcap);
    for (int t = 0; t < seen[n].begin && t < padded; t++) row[t] = -INFINITY;
    for (int t = seen[n].end > 0 ? seen[n].end : 0; t < padded; t++) row[t] = -INFINITY;
    if (seen[n].begin >= seen[n].end) {
      for (int t = 0; t < padded; t += WIDTH) store(row + t, Floats{});
      top[n] = total[n] = 0;
      continue;
    }
    Floats best = all(-INFINITY), total_weight = {};
    for (int t = 0; t < padded; t += WIDTH) best = most(best, load(row + t));
    top[n] = largest(best);
    for (int t = 0; t < padded; t += WIDTH) {
      const Floats x = load(row + t), weight = x == -INFINITY ? Floats{} : exponential(x - top[n]);
      total_weight += weight;
      store(row + t, weight);
    }
    total[n] = sum(total_weight);
  }
  weigh<T, N>(values, rows, (count + 3) / 4 * 4, weights, out);  // what pads the rows weighs 0
}

// What queries have gathered so far.
struct Sums {
  float* out;  // [queries, value_dim]
  float *total, *top;
};

// Takes a further part into account ("online softmax", Milakov & Gimelshein, arXiv:1805.02867).
void merge(Sums& sofar, const Sums& part, int queries, int dim) {
  for (int n = 0; n < queries; n++) {
    if (part.total[n] == 0) continue;
    float *a = sofar.out + n * dim, *b = part.out + n * dim;
    if (sofar.total[n] == 0) {
      std::memcpy(a, b, sizeof(float) * dim);
      sofar.total[n] = part.total[n];
      sofar.top[n] = part.top[n];
      continue;
    }
    const float top = sofar.top[n] > part.top[n] ? sofar.top[n] : part.top[n];
    const float old = std::exp(sofar.top[n] - top), fresh = std::exp(part.top[n] - top);
    sofar.total[n] = sofar.total[n] * old + part.total[n] * fresh;
    sofar.top[n] = top;
    for (int d = 0; d < dim; d += WIDTH) store(a + d, load(a + d) * old + load(b + d) * fresh);
  }
}

// Rows come in groups, each of neighbours in one sequence: what one row has read of the cache is still near for the
// next. Parts begin at multiples of PART, so that a row comes to the same to the bit in whichever group it is.
template <class T>
struct Attend {
  const Attention& how;
  const T* query;
  int64_t query_stride;
  const T *keys, *values;
  const int32_t* tables;
  int64_t table_stride;
  const int32_t *owners, *starts;  // [groups], [groups + 1]
  const int64_t* positions;
  T* out;

  int heads() const { return how.heads / how.key_heads; }
  int queries(int group) const { return (starts[group + 1] - starts[group]) * heads(); }
  int end(int row) const { return int(positions[row]) + 1; }
  int begin(int row) const { return how.window && end(row) > how.window ? end(row) - how.window : 0; }
  int first_part(int group) const { return begin(starts[group]) / PART; }
  int parts(int group) const { return (end(starts[group + 1] - 1) - 1) / PART - first_part(group) + 1; }

  void part(int group, int head, int index, Sums into) const {
    const int row = starts[group], last = end(starts[group + 1] - 1), from = (first_part(group) + index) * PART;
    const int skipped = begin(row) > from ? (begin(row) - from) / WIDTH * WIDTH : 0;
    const int first = from + skipped, count = (last < from + PART ? last : from + PART) - first;
    int64_t found[PART + 4];
    find(tables + owners[group] * table_stride, how.block_size, first, first + count, found);
    const Heads<T> k{keys + int64_t(head) * how.key_dim, int64_t(how.key_heads) * how.key_dim, how.key_dim};
    const Heads<T> v{values + int64_t(head) * how.value_dim, int64_t(how.key_heads) * how.value_dim, how.value_dim};
    typename Operand<T>::Type wanted[TILE * MAX_DIM];
    Span seen[TILE];
    for (int n = 0; n < queries(group);) {
      const int left = queries(group) - n, many = left < TILE ? left : TILE;
      for (int i = 0; i < many; i++) {
        const int of = row + (n + i) / heads();
        const T* from_query = query + of * query_stride + (int64_t(head) * heads() + (n + i) % heads()) * how.key_dim;
        for (int d = 0; d < how.key_dim; d += WIDTH) store(wanted + i * how.key_dim + d, load(from_query + d));
        seen[i] = {begin(of) - first, end(of) - first < count ? end(of) - first : count};
      }
      float *o = into.out + n * how.value_dim, *total = into.total + n, *top = into.top + n;
      switch (many) {
        case 1: attend_part<T, 1>(wanted, seen, k, v, found, count, how.scale, how.softcap, o, total, top); break;
        case 2: attend_part<T, 2>(wanted, seen, k, v, found, count, how.scale, how.softcap, o, total, top); break;
        case 3: attend_part<T, 3>(wanted, seen, k, v, found, count, how.scale, how.softcap, o, total, top); break;
        default: attend_part<T, 4>(wanted, seen, k, v, found, count, how.scale, how.softcap, o, total, top);
      }
      n += many;
    }
  }

  void write(int group, int head, const Sums& sums) const {
    for (int n = 0; n < queries(group); n++) {
      const int64_t row = starts[group] + n / heads();
      T* to = out + (row * how.heads + int64_t(head) * heads() + n % heads()) * how.value_dim;
      for (int d = 0; d < how.value_dim; d += WIDTH)
        store(to + d, load(sums.out + n * how.value_dim + d) * (1.0f / sums.total[n]));
    }
  }

  // One thread does a group's key head.
  void whole(int group, int head) const {
    float memory[2][MAX_QUERIES * (MAX_DIM + 2)];
    Sums sums = split(group, memory[0]), next = split(group, memory[1]);
    part(group, head, 0, sums);
    for (int i = 1; i < parts(group); i++) {
      part(group, head, i, next);
      merge(sums, next, queries(group), how.value_dim);
    }
    write(group, head, sums);
  }

  Sums split(int group, float* memory) const {
    float* total = memory + queries(group) * how.value_dim;
    return {memory, total, total + queries(group)};
  }
};

// `scratch`: [groups, key_heads, most_parts, size] floats, or null: a thread does all parts of a group's key head.
template <class T>
void attend(const Attend<T>& task, int groups, float* scratch, int most_parts, int size) {
  const int heads = task.how.key_heads, items = groups * heads;
  if (scratch == nullptr) {
#pragma omp parallel for schedule(dynamic, 1) if (items > 1)
    for (int i = 0; i < items; i++) task.whole(i / heads, i % heads);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (int i = 0; i < items * most_parts; i++) {
    const int group = i / most_parts / heads;
    if (i % most_parts < task.parts(group))
      task.part(group, i / most_parts % heads, i % most_parts, task.split(group, scratch + int64_t(i) * size));
  }
#pragma omp parallel for schedule(dynamic, 1) if (items > 1)
  for (int i = 0; i < items; i++) {
    const int group = i / heads;
    float* parts = scratch + int64_t(i) * most_parts * size;
    Sums sums = task.split(group, parts);
    for (int p = 1; p < task.parts(group); p++)
      merge(sums, task.split(group, parts + int64_t(p) * size), task.queries(group), task.how.value_dim);
    task.write(group, i % heads, sums);
  }
}

// Between the products ---------------------------------------------------------------------------------------------

// Starting the threads costs more than this many elements do.
constexpr int64_t ALONE = 1 << 16;

template <class T>
inline float scale_of(const T* row, int dim, float epsilon) {
  Floats squares = {};
  for (int d = 0; d < dim; d += WIDTH) squares += load(row + d) * load(row + d);
  return 1.0f / std::sqrt(sum(squares) / float(dim) + epsilon);
}

template <class T>
inline void normalise(const T* row, const T* weight, float epsilon, T* out, int dim) {
  const float scale = scale_of(row, dim, epsilon);
  for (int d = 0; d < dim; d += WIDTH) store(out + d, rounded<T>(load(row + d) * scale) * load(weight + d));
}

// residual += x (unless x is null); out = RMS norm of residual.
template <class T>
void add_rms_norm(const T* x, T* residual, const T* weight, float epsilon, T* out, int rows, int dim) {
#pragma omp parallel for schedule(static) if (int64_t(rows) * dim > ALONE)
  for (int r = 0; r < rows; r++) {
    T* row = residual + int64_t(r) * dim;
    if (x != nullptr)
      for (int d = 0; d < dim; d += WIDTH) store(row + d, load(row + d) + load(x + int64_t(r) * dim + d));
    normalise(row, weight, epsilon, out + int64_t(r) * dim, dim);
  }
}

// [rows, gate and up] -> [rows, dim]: silu(gate) * up.
template <class T>
void silu_mul(const T* gate_up, T* out, int rows, int dim) {
#pragma omp parallel for schedule(static) if (int64_t(rows) * dim > ALONE)
  for (int r = 0; r < rows; r++) {
    const T *gate = gate_up + int64_t(r) * 2 * dim, *up = gate + dim;
    for (int d = 0; d < dim; d += WIDTH) store(out + int64_t(r) * dim + d, silu<T>(load(gate + d)) * load(up + d));
  }
}

struct Rotation {
  int heads, key_heads, dim, value_dim;
  int rotated;             // the first dimensions of a head, a multiple of 2 * WIDTH
  const float *cos, *sin;  // [positions, rotated]
  float epsilon;
};

template <class T>
inline void rotate(T* head, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i += WIDTH) {
    const Floats a = load(head + i), b = load(head + half + i);
    store(head + i, a * load(cos + i) - b * load(sin + i));
    store(head + half + i, b * load(cos + half + i) + a * load(sin + half + i));
  }
}

// qkv [rows, queries, keys and values]: norms of heads (unless null), rotary positions, and what is to be kept into
// its slot.
template <class T>
void rotate_and_store(T* qkv, const Rotation& how, const T* query_norm, const T* key_norm, const int64_t* positions,
                      const int64_t* slots, T* keys, T* values, int rows) {
  const int64_t key_row = int64_t(how.key_heads) * how.dim, value_row = int64_t(how.key_heads) * how.value_dim;
  const int64_t stride = how.heads * how.dim + key_row + value_row;
#pragma omp parallel for schedule(static) if (rows * stride > ALONE)
  for (int r = 0; r < rows; r++) {
    T* row = qkv + r * stride;
    const float *cos = how.cos + positions[r] * how.rotated, *sin = how.sin + positions[r] * how.rotated;
    for (int h = 0; h < how.heads + how.key_heads; h++) {
      T* head = row + int64_t(h) * how.dim;
      const T* norm = h < how.heads ? query_norm : key_norm;
      if (norm != nullptr) normalise(head, norm, how.epsilon, head, how.dim);
      rotate(head, cos, sin, how.rotated / 2);
    }
    const T* key = row + how.heads * how.dim;
    std::memcpy(keys + slots[r] * key_row, key, sizeof(T) * key_row);
    std::memcpy(values + slots[r] * value_row, key + key_row, sizeof(T) * value_row);
  }
}

// Weights in int8 ------------------------------------------------------------------------------------------------

inline Floats load(const int8_t* from) {
  return __builtin_convertvector(widened(*reinterpret_cast<const Bytes*>(from)), Floats);
}

inline void store_one(float* to, float x) { *to = x; }
inline void store_one(BFloat16* to, float x) {
  BFloat16 memory[WIDTH];
  store(memory, all(x));
  *to = memory[0];
}

// R rows by four outputs.
template <class T, int R>
inline void int8_tile(const float* x, const int8_t* weight, const float* scale, T* out, int outputs, int inputs) {
  Floats products[R][4] = {};
  for (int k = 0; k < inputs; k += WIDTH) {
    Floats w[4];
    for (int n = 0; n < 4; n++) w[n] = load(weight + int64_t(n) * inputs + k);
    for (int r = 0; r < R; r++) {
      const Floats row = load(x + int64_t(r) * inputs + k);
      for (int n = 0; n < 4; n++) products[r][n] += row * w[n];
    }
  }
  for (int r = 0; r < R; r++) {
    const Quarters total = sums(products[r][0], products[r][1], products[r][2], products[r][3]);
    for (int n = 0; n < 4; n++) store_one(out + int64_t(r) * outputs + n, total[n] * scale[n]);
  }
}

// x [rows, inputs] times weight [outputs, inputs], each output by its scale.
template <class T>
void int8_product(const float* x, const int8_t* weight, const float* scale, T* out, int rows, int outputs, int inputs) {
#pragma omp parallel for schedule(static)
  for (int n = 0; n < outputs; n += 4) {
    const int8_t* w = weight + int64_t(n) * inputs;
    for (int r = 0; r < rows; r += 4) {
      const float* from = x + int64_t(r) * inputs;
      T* to = out + int64_t(r) * outputs + n;
      switch (rows - r) {
        case 1: int8_tile<T, 1>(from, w, scale + n, to, outputs, inputs); break;
        case 2: int8_tile<T, 2>(from, w, scale + n, to, outputs, inputs); break;
        case 3: int8_tile<T, 3>(from, w, scale + n, to, outputs, inputs); break;
        default: int8_tile<T, 4>(from, w, scale + n, to, outputs, inputs);
      }
    }
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                               \
  extern "C" void attend_##NAME(const Attention* how, const T* query, int64_t query_stride, const T* keys,            \
                                const T* values, const int32_t* tables, int64_t table_stride, const int32_t* owners,  \
                                const int32_t* starts, const int64_t* positions, T* out, int groups, float* scratch,  \
                                int most_parts, int size) {                                                           \
    attend(                                                                                                           \
        Attend<T>{*how, query, query_stride, keys, values, tables, table_stride, owners, starts, positions, out},     \
        groups, scratch, most_parts, size);                                                                           \
  }                                                                                                                   \
  extern "C" void add_rms_norm_##NAME(const T* x, T* residual, const T* weight, float epsilon, T* out, int rows,      \
                                      int dim) {                                                                      \
    add_rms_norm(x, residual, weight, epsilon, out, rows, dim);                                                       \
  }                                                                                                                   \
  extern "C" void silu_mul_##NAME(const T* gate_up, T* out, int rows, int dim) { silu_mul(gate_up, out, rows, dim); } \
  extern "C" void int8_product_##NAME(const float* x, const int8_t* weight, const float* scale, T* out, int rows,     \
                                      int outputs, int inputs) {                                                     \
    int8_product(x, weight, scale, out, rows, outputs, inputs);                                                       \
  }                                                                                                                   \
  extern "C" void rotate_and_store_##NAME(T* qkv, const Rotation* how, const T* query_norm, const T* key_norm,        \
                                          const int64_t* positions, const int64_t* slots, T* keys, T* values,         \
                                          int rows) {                                                                 \
    rotate_and_store(qkv, *how, query_norm, key_norm, positions, slots, keys, values, rows);                          \
  }

EXPORT(float, float32)
EXPORT(BFloat16, bfloat16)
