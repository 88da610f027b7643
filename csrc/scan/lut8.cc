// Tables have 2^bits entries a look-up inside; those from ksub on are NaN, so that a code that is too large shows up as
// a NaN score, which the selection reports. Codes of fewer than 8 bits are spread to a byte each, eight at a time, in a
// register, or where W queries share the rows into memory once for all of them.
#include "scan/lut8.h"

#include "scan/lists.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kGroup = 64;          // rows whose scores are compared at once
constexpr int64_t kLookups = 20;        // whose interleaved tables are used at once: they stay in the L2
constexpr int64_t kRowBlock = 512;      // rows whose sums are kept between groups
constexpr int64_t kSpread = 256 << 10;  // bytes of codes that are spread for all queries

template <int B>
constexpr int64_t kEntries = int64_t{1} << B;

template <int B>
LUTRA_INLINE int64_t row_bytes(const Lut8Args& a) {
  return B == 8 ? a.m : (a.m * B + 7) / 8;
}

// Eight codes of B bits, the first in the lowest: each into a byte of its own.
template <int B>
LUTRA_INLINE uint64_t spread(uint64_t w) {
  if (B == 8) return w;
#if defined(LUTRA_LEVEL_v4)  // where it takes a cycle; on AMD's processors before Zen 3, hundreds
  return _pdep_u64(w, 0x0101010101010101u * ((1u << B) - 1));
#else
  constexpr uint64_t one = 1;
  constexpr uint64_t two = ((one << 2 * B) - 1) * 0x0000000100000001u, half = ((one << B) - 1) * 0x0001000100010001u;
  w = (w & ((one << 4 * B) - 1)) | (w >> 4 * B & ((one << 4 * B) - 1)) << 32;
  w = (w & two) | (w & two << 2 * B) << (16 - 2 * B);
  return (w & half) | (w & half << B) << (8 - B);
#endif
}

// Eight bytes, or what there is of them before `end`; `whole`: there are eight.
LUTRA_INLINE uint64_t load_word(const uint8_t* p, const uint8_t* end, bool whole) {
  uint64_t word = 0;
  if (whole || end - p >= 8)
    memcpy(&word, p, 8);
  else
    for (int i = 0; i < end - p; ++i) word |= static_cast<uint64_t>(p[i]) << (8 * i);
  return word;
}

// ------------------------------------------------------------------------------------------ one query at a time
// gcc would gather the sums of rows in a vector, which takes a fifth longer.
LUTRA_INLINE void by_itself(float* x) {
#if defined(__x86_64__)
  asm("" : "+x"(*x));
#else
  (void)x;
#endif
}

// `whole`: there are eight bytes behind the rows.
template <int B, int R, bool whole>
LUTRA_INLINE void sum_codes(const float* table, const uint8_t* codes, int64_t size, const uint8_t* end, int64_t m,
                            float* out) {
  float sum[R] = {};
  int64_t j = 0;
  for (; j + 8 <= m; j += 8, codes += B, table += 8 * kEntries<B>) {
    uint64_t word[R];  // eight codes at a time: one load instead of eight
    for (int r = 0; r < R; ++r) word[r] = spread<B>(load_word(codes + r * size, end, whole));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      for (int r = 0; r < R; ++r) {
        sum[r] += (table + i * kEntries<B>)[word[r] & 255];
        by_itself(&sum[r]);
        word[r] >>= 8;
      }
  }
  if (j < m) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      uint64_t word = spread<B>(load_word(codes + r * size, end, whole));
      for (int64_t i = 0; i < m - j; ++i, word >>= 8) sum[r] += (table + i * kEntries<B>)[word & 255];
    }
  }
  for (int r = 0; r < R; ++r) out[r] = sum[r];
}

// In one expression, so that the compiler fuses the same operations wherever it is used.
LUTRA_INLINE vf complete(vf sum, bool has_mul, vf mul, vf constant, bool has_add, vf add) {
  const vf s = has_mul ? sum * mul + constant : sum + constant;
  return has_add ? s + add : s;
}

LUTRA_INLINE vf load_rows(const float* p, int64_t left) {
  return left >= W ? load(p) : load_first(p, static_cast<int>(left));
}

template <Metric M, int B>
void rows_alone(const Lut8Args& a, const float* table, int64_t query, float constant, int64_t begin, int64_t end,
                Selection* s) {
  alignas(64) float score[kGroup];
  const int64_t size = row_bytes<B>(a);
  const uint8_t* last = a.codes + a.lists.arena_rows * size;
  for (int64_t row = begin; row < end; row += kGroup) {
    const int64_t rows = end - row < kGroup ? end - row : kGroup;
    const uint8_t* codes = a.codes + row * size;
    int64_t r = 0;
    for (; r + 4 <= rows && last - codes >= (r + 4) * size + 8; r += 4)
      sum_codes<B, 4, true>(table, codes + r * size, size, last, a.m, score + r);
    for (; r < rows; ++r) sum_codes<B, 1, false>(table, codes + r * size, size, last, a.m, score + r);
    for (; r % W; ++r) score[r] = 0;
    for (r = 0; r < rows; r += W) {
      const vf mul = a.mul ? load_rows(a.mul + row + r, rows - r) : (vf){};
      const vf add = a.add ? load_rows(a.add + row + r, rows - r) : (vf){};
      store(score + r, complete(load(score + r), a.mul, mul, splat(constant), a.add, add));
    }
    offer_scores<M>(a.lists, s, query, score, row, rows);
  }
}

template <int B>
void widen_table(const Lut8Args& a, int64_t query, float* table) {
  for (int64_t j = 0; j < a.m; ++j) {
    memcpy(table + j * kEntries<B>, a.lut + (query * a.m + j) * a.ksub, sizeof(float) * a.ksub);
    for (int64_t c = a.ksub; c < kEntries<B>; ++c) table[j * kEntries<B> + c] = __builtin_nanf("");
  }
}

float constant_of(const Lut8Args& a, int64_t query, int64_t probe) {  // probe: its place in (nq, nprobe)
  const float bias = a.bias ? a.bias[query] : 0.0f;
  return a.base ? a.base[probe] + bias : bias;
}

// ------------------------------------------------------------------------------------------ flat, W queries in lanes
template <int B>
void interleave(const Lut8Args& a, int64_t first, int64_t queries, float* table) {
  for (int64_t lane = 0; lane < W; ++lane) {
    const int64_t query = first + (lane < queries ? lane : 0);
    for (int64_t j = 0; j < a.m; ++j) {
      const float* from = a.lut + (query * a.m + j) * a.ksub;
      float* to = table + j * kEntries<B> * W + lane;
      for (int64_t c = 0; c < a.ksub; ++c) to[c * W] = from[c];
      for (int64_t c = a.ksub; c < kEntries<B>; ++c) to[c * W] = __builtin_nanf("");
    }
  }
}

template <int B, int R>
LUTRA_INLINE void lane_sums(const float* table, const uint8_t* codes, int64_t ld, int64_t j0, int64_t j1, float* sums) {
  vf sum[R];
  for (int r = 0; r < R; ++r) sum[r] = j0 ? load(sums + r * W) : (vf){};
  for (int64_t j = j0; j < j1; ++j) {
    const float* t = table + j * kEntries<B> * W;
    for (int r = 0; r < R; ++r) sum[r] += load(t + codes[r * ld + j] * static_cast<int64_t>(W));
  }
  for (int r = 0; r < R; ++r) store(sums + r * W, sum[r]);
}

int64_t whole_words(int64_t m) { return (m + 7) / 8 * 8; }

template <int B>
void spread_rows(const Lut8Args& a, int64_t begin, int64_t end, uint8_t* out) {
  const int64_t size = row_bytes<B>(a), ld = whole_words(a.m);
  const uint8_t* last = a.codes + a.lists.arena_rows * size;
  const uint8_t* codes = a.codes + begin * size;
  for (int64_t row = begin; row < end; ++row, codes += size, out += ld) {
    const uint8_t* from = codes;
    if (last - codes >= size + 8)
      for (int64_t j = 0; j < ld; j += 8, from += B) {
        const uint64_t word = spread<B>(load_word(from, last, true));
        memcpy(out + j, &word, 8);
      }
    else
      for (int64_t j = 0; j < ld; j += 8, from += B) {
        const uint64_t word = spread<B>(load_word(from, last, false));
        memcpy(out + j, &word, 8);
      }
  }
}

// `block`: the codes of rows [begin, end), a byte each, `ld` a row. `first`: the first query, counted from that of the
// pass, as the selection does; `constant`: of the W lanes.
template <Metric M, int B>
void rows_in_lanes(const Lut8Args& a, const float* table, int64_t first, int64_t queries, const float* constant,
                   const uint8_t* block, int64_t ld, int64_t begin, int64_t end, float* sums, Selection* s) {
  const vf constants = load(constant);
  for (int64_t row = begin; row < end; row += kRowBlock) {
    const int64_t rows = end - row < kRowBlock ? end - row : kRowBlock;
    const uint8_t* codes = block + (row - begin) * ld;
    for (int64_t j0 = 0; j0 < a.m; j0 += kLookups) {
      const int64_t j1 = j0 + kLookups < a.m ? j0 + kLookups : a.m;
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) lane_sums<B, 4>(table, codes + r * ld, ld, j0, j1, sums + r * W);
      for (; r < rows; ++r) lane_sums<B, 1>(table, codes + r * ld, ld, j0, j1, sums + r * W);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const vf mul = a.mul ? splat(a.mul[row + r]) : (vf){}, add = a.add ? splat(a.add[row + r]) : (vf){};
      const vf score = complete(load(sums + r * W), a.mul, mul, constants, a.add, add);
      uint32_t m = passes_equal<M>(score, load(s->threshold + first));
      if (!m) continue;
      float lane[W];
      store(lane, score);
      for (; m; m &= m - 1) {
        const int i = __builtin_ctz(m);
        if (i < queries) offer_row(a.lists, s, first + i, lane[i], row + r, M);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------ passes
template <Metric M, int B>
void flat(const Lut8Args& a, int64_t q0, int64_t queries, int threads) {
  const bool lanes = queries >= 4;
  const int64_t unit = lanes ? W : 1, groups = (queries + unit - 1) / unit, n = a.lists.list_rows[0];
  const int64_t table_size = a.m * kEntries<B> * unit;
  // Rows that go past all queries at once. Fewer than `kRowBlock`, and tables would be read too often.
  const bool spreads = lanes && B < 8;
  const int64_t ld = spreads ? whole_words(a.m) : a.m;
  int64_t block = lanes ? 16 * kRowBlock : 8192;
  if (spreads && block > kSpread / ld)
    block = kSpread / ld > kRowBlock ? kSpread / ld / kRowBlock * kRowBlock : kRowBlock;
  Selections selections(threads, queries, a.lists.k, n, M);
  Buffer<float> tables(groups * table_size), constant(groups * unit);
  Buffer<float> sums(lanes ? threads * kRowBlock * W : 1);
  Buffer<uint8_t> codes(spreads ? threads * block * ld : 1);
  parallel_for(groups, static_cast<double>(groups) * table_size * 0.5, [&](int64_t g) {
    const int64_t first = g * unit, count = queries - first < unit ? queries - first : unit;
    if (lanes)
      interleave<B>(a, q0 + first, count, tables.data + g * table_size);
    else
      widen_table<B>(a, q0 + first, tables.data + g * table_size);
    for (int64_t i = 0; i < unit; ++i)
      constant[first + i] = i < count ? constant_of(a, q0 + first + i, q0 + first + i) : 0.0f;
  });
  scan_blocks(n, block, threads, [&](int t, int64_t begin, int64_t end) {
    const uint8_t* rows = a.codes + begin * a.m;
    if (spreads) {
      spread_rows<B>(a, begin, end, codes.data + t * block * ld);
      rows = codes.data + t * block * ld;
    }
    for (int64_t g = 0; g < groups; ++g) {
      const float* table = tables.data + g * table_size;
      if (lanes)
        rows_in_lanes<M, B>(a, table, g * W, queries - g * W < W ? queries - g * W : W, constant.data + g * W, rows, ld,
                            begin, end, sums.data + t * kRowBlock * W, selections.of_thread(t));
      else
        rows_alone<M, B>(a, table, g, constant[g], begin, end, selections.of_thread(t));
    }
  });
  selections.finish(q0, a.lists.scores, a.lists.ids, a.lists.bad);
}

template <Metric M, int B>
void in_lists(const Lut8Args& a, int64_t q0, int64_t queries) {
  const ListsArgs& l = a.lists;
  Plan plan(l, q0, queries);
  const int threads = static_cast<double>(plan.rows) * (a.m * 0.25 + 1) < 40e3 ? 1 : num_threads();
  Selections selections(threads, queries, l.k, 2 * l.npositions, M);
  const int64_t table_size = a.m * kEntries<B>;
  const bool widen = a.ksub < kEntries<B>;
  Buffer<float> tables(widen ? queries * table_size : 1);
  if (widen)
    for (int64_t i = 0; i < queries; ++i) widen_table<B>(a, q0 + i, tables.data + i * table_size);
  scan_blocks(plan.item_count, 1, threads, [&](int t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const ListItem& w = plan.items[i];
      for (int64_t p = w.first; p < w.last; ++p) {
        const int64_t place = plan.place(p), query = place / l.nprobe;
        const float* table = widen ? tables.data + query * table_size : a.lut + (q0 + query) * table_size;
        rows_alone<M, B>(a, table, query, constant_of(a, q0 + query, q0 * l.nprobe + place), w.begin, w.end,
                         selections.of_thread(t));
      }
    }
  });
  selections.finish(q0, l.scores, l.ids, l.bad);
}

template <Metric M, int B>
void search(const Lut8Args& a) {
  const ListsArgs& l = a.lists;
  const int all = num_threads();
  const double cost = static_cast<double>(l.nq) * l.list_rows[0] * (a.m * 0.2 + 1);  // flat
  const int threads = l.probes || cost >= 60e3 ? all : 1;
  int64_t queries = pass_queries(l.k, 2 * l.npositions, all, W);
  const int64_t by_tables = (32 << 20) / (a.m * kEntries<B> * W * 4 + 1) * W;  // tables of a pass below 32 MB
  if (queries > by_tables) queries = by_tables < W ? W : by_tables;
  for (int64_t q0 = 0; q0 < l.nq; q0 += queries) {
    const int64_t count = l.nq - q0 < queries ? l.nq - q0 : queries;
    if (l.probes)
      in_lists<M, B>(a, q0, count);
    else
      flat<M, B>(a, q0, count, threads);
  }
}

template <Metric M>
void of_bits(const Lut8Args& a) {
  switch (a.bits) {
    case 5: return search<M, 5>(a);
    case 6: return search<M, 6>(a);
    case 7: return search<M, 7>(a);
    default: return search<M, 8>(a);
  }
}

}  // namespace

void lut8(const Lut8Args& a) {
  if (a.lists.metric == Metric::l2)
    of_bits<Metric::l2>(a);
  else
    of_bits<Metric::ip>(a);
}

}  // namespace LUTRA_NS
}  // namespace lutra
