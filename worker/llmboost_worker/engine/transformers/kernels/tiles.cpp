// Products of bfloat16 rows with weights on Intel's AMX, whose registers are tiles of 16 rows of 64 bytes.
//
// Few rows take as long as the weights take to come from memory: they are packed in the order in which they are
// read, and asked for ahead. Many rows take as long as the tiles are busy: sums are rounded and stored while the
// next ones are made. Every output is a sum over its inputs in their order, whatever rows are beside its own.

#include "amx.h"

#ifdef AMX

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int BLOCK = 2 * TILE;            // rows, and outputs, that are computed at a time
constexpr int PIECE = BLOCK * STEP;        // weights that a step reads
constexpr int AHEAD = 8;                   // steps
constexpr int MANY = 4;                    // blocks for each thread
constexpr int64_t SPAN = 1 << 20;          // bytes of rows that stay in a core's cache while weights pass by
constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;

// Tiles 0 to 3: sums, of two times two tiles. 4 and 5: rows. 6 and 7: weights. If there are fewer rows than a tile
// has, there is one tile of them.
inline void configure(int rows) {
  TileConfig config;
  if (rows < TILE) config.rows[0] = config.rows[1] = config.rows[4] = rows;
  _tile_loadconfig(&config);
}

// A block's sums, on their way out: all of them, or silu of the first half of their columns times the second.
template <bool GATED>
struct Sums {
  static constexpr int OUTPUTS = GATED ? TILE : BLOCK;

  const float* from;  // [rows, BLOCK]
  const float* bias;  // [BLOCK], or null
  BFloat16* to[2];    // for each tile of rows
  int64_t stride;
  int outputs, rows, row;

  void store(int count) {
    for (const int end = row + count < rows ? row + count : rows; row < end; row++) {
      Floats low = load(from + row * BLOCK), high = load(from + row * BLOCK + TILE);
      if (bias != nullptr) low += load(bias), high += load(bias + TILE);
      BFloat16* at = to[row / TILE] + row % TILE * stride;
      if (GATED) {
        const Floats gate = rounded<BFloat16>(low), up = rounded<BFloat16>(high);
        ::store(at, silu<BFloat16>(gate) * up);
      } else if (outputs >= BLOCK) {
        _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
      } else {
        _mm512_mask_storeu_epi16(at, (1u << outputs) - 1, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
      }
    }
  }
};

// x [rows, inputs] times packed weights.
template <bool GATED>
struct Product {
  typedef ::Sums<GATED> Sums;


  const BFloat16 *x, *packed;
  const float* bias;
  BFloat16* out;
  int rows, outputs, inputs;  // `outputs` that are stored

  int steps() const { return inputs / STEP; }
  int panels() const { return ceiling(outputs, Sums::OUTPUTS); }

  // The sums of a tile of rows, or of two, while those of `before` are stored.
  // Each step asks for so many `lines` of the weights that are wanted next.
  template <bool TWO>
  inline void block(int row, int second, int panel, const BFloat16* wanted, int lines, float* sums,
                    Sums& before) const {
    const BFloat16* a = x + int64_t(row) * inputs;
    const int64_t apart = int64_t(second - row) * inputs;
    const BFloat16* b = packed + int64_t(panel) * steps() * PIECE;
    const int64_t stride = int64_t(inputs) * sizeof(BFloat16);
    const int stored = ceiling(BLOCK, steps());
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int k = 0; k < steps(); k++, a += STEP, b += PIECE) {
      for (int i = 0; i < lines; i++, wanted += STEP) _mm_prefetch(wanted, _MM_HINT_T1);
      before.store(stored);
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + PIECE / 2, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (TWO) {
        _tile_loadd(5, a + apart, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    constexpr int64_t line = BLOCK * sizeof(float);
    _tile_stored(0, sums, line);
    _tile_stored(1, sums + TILE, line);
    if (TWO) {
      _tile_stored(2, sums + TILE * BLOCK, line);
      _tile_stored(3, sums + TILE * BLOCK + TILE, line);
    }
  }

  // A thread's share: some panels, for the rows [begin, end).
  void run(int first_panel, int last_panel, int begin, int end) const {
    alignas(64) float memory[2][BLOCK * BLOCK];
    // As few equal spans as it takes for the rows of each to stay in the cache.
    const int spans = int(int64_t(end - begin) * inputs * sizeof(BFloat16) / SPAN) + 1;
    const int span = ceiling(ceiling(end - begin, spans), BLOCK) * BLOCK;
    Sums before{};
    int turn = 0;
    for (int from = begin; from < end; from += span) {
      const int to = from + span < end ? from + span : end;
      const int blocks = ceiling(to - from, BLOCK), lines = ceiling(BLOCK, blocks);
      for (int panel = first_panel; panel < last_panel; panel++) {
        // The next panel's weights come while this one's meet their rows, or a few steps ahead if that is once.
        const BFloat16* wanted = packed + (int64_t(panel) * steps() + (blocks > 1 ? steps() : AHEAD)) * PIECE;
        for (int row = from; row < to; row += BLOCK) {
          // A tile that isn't full begins among rows that have been computed, and computes them once more.
          const int last = rows < TILE ? 0 : to - TILE, second = row + TILE;
          const bool is_two = to > second;
          const int at[2] = {row < last ? row : last, second < last ? second : last};
          float* sums = memory[turn ^= 1];
          if (is_two)
            block<true>(at[0], at[1], panel, wanted, lines, sums, before);
          else
            block<false>(at[0], at[1], panel, wanted, lines, sums, before);
          wanted += steps() * lines * STEP;
          before.store(BLOCK);
          BFloat16* corner = out + panel * Sums::OUTPUTS;
          before = Sums{sums,
                        bias == nullptr ? nullptr : bias + panel * BLOCK,
                        {corner + int64_t(at[0]) * outputs, corner + int64_t(at[1]) * outputs},
                        outputs,
                        outputs - panel * Sums::OUTPUTS,
                        rows < TILE ? rows : is_two ? BLOCK : TILE,
                        0};
        }
      }
    }
    before.store(BLOCK);
  }
};

// Into how many parts the rows are divided among `threads`. Many rows: one each, as the other kernels do, so that they
// stay with their core. Few: so that the largest share is smallest.
int row_parts(int threads, int panels, int blocks) {
  if (blocks >= MANY * threads) return threads;
  int best = 1;
  int64_t least = INT64_MAX;
  for (int parts = 1; parts <= threads; parts++) {
    if (threads % parts) continue;
    const int64_t share = int64_t(ceiling(panels, threads / parts)) * ceiling(blocks, parts);
    if (share < least) least = share, best = parts;
  }
  return best;
}

}  // namespace

// Whether this machine has tiles, and lets this process use them.
extern "C" int tiles_usable() { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0; }

// weight [outputs, inputs] -> packed [panels, steps, 2, 16 pairs of inputs, 16 outputs, 2]; what is missing of the
// last panel is zero.
extern "C" void tiles_pack(const BFloat16* weight, BFloat16* packed, int outputs, int inputs) {
  const int panels = ceiling(outputs, BLOCK), steps = inputs / STEP;
#pragma omp parallel for schedule(static)
  for (int panel = 0; panel < panels; panel++) {
    for (int n = 0; n < BLOCK; n++) {
      const int output = panel * BLOCK + n;
      const BFloat16* from = weight + int64_t(output) * inputs;
      BFloat16* to = packed + int64_t(panel) * steps * PIECE + n / TILE * (PIECE / 2) + n % TILE * 2;
      for (int k = 0; k < inputs; k += 2) {
        BFloat16* pair = to + k / STEP * PIECE + k % STEP * TILE;
        pair[0] = output < outputs ? from[k] : BFloat16{0};
        pair[1] = output < outputs ? from[k + 1] : BFloat16{0};
      }
    }
  }
}

namespace {

template <bool GATED>
void product(const Product<GATED>& how) {
  if (how.rows == 0) return;
  const int panels = how.panels(), blocks = how.rows < BLOCK ? 1 : how.rows / BLOCK;
#pragma omp parallel
  {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int parts = row_parts(threads, panels, blocks), others = threads / parts;
    const int part = thread / others, other = thread % others;
    const int begin = int(int64_t(blocks) * part / parts) * BLOCK;
    const int end = part + 1 == parts ? how.rows : int(int64_t(blocks) * (part + 1) / parts) * BLOCK;
    configure(how.rows);
    how.run(int(int64_t(panels) * other / others), int(int64_t(panels) * (other + 1) / others), begin, end);
    _tile_release();
  }
}

}  // namespace

// out [rows, outputs] = x [rows, inputs] times packed weights, plus bias [panels * 32] unless it is null. If it is
// gated, of twice as many outputs of the product, each 16 are followed by 16 that they gate.
extern "C" void tiles_product(const BFloat16* x, const BFloat16* packed, const float* bias, BFloat16* out, int rows,
                              int outputs, int inputs, int is_gated) {
  if (is_gated)
    product(Product<true>{x, packed, bias, out, rows, outputs, inputs});
  else
    product(Product<false>{x, packed, bias, out, rows, outputs, inputs});
}

#else

extern "C" int tiles_usable() { return 0; }
extern "C" void tiles_pack(const void*, void*, int, int) {}
extern "C" void tiles_product(const void*, const void*, const void*, void*, int, int, int, int) {}

#endif
