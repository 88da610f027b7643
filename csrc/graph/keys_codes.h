// Keys of rows that are codes of a product quantizer.
//
// Walks compare by look-ups: a query, or the node that is being inserted, has a table of the 16-bit integers
//   round((t[j][c] - low[j]) / step),  t[j][c] = |q_j - books[j][c]|^2 for l2, -<q_j, books[j][c]> for ip,
// low[j] the least of a sub-table and step the lowest power of two that makes all of them fit. A key is
//   sum_j low[j] + step * (the sum of a row's integers),
// the same at every SIMD level and in any order. In 16 bits the tables of 48 sub-vectors fit into half of the
// caches that those of floats would fill, and integers are added without waiting: four times as fast on Zen 4.
//
// Linking compares nodes with each other, one with a few at a time, where a table does not pay: rows are decoded to
// floats and compared as float rows are, so that copies are equally far from everything.
#pragma once
#include <math.h>

#include "common/simd.h"
#include "graph/graph.h"

namespace lutra {
namespace LUTRA_NS {

LUTRA_INLINE bool has_codes(const Graph& g) { return g.storage == DType::u8; }
LUTRA_INLINE int64_t code_words(const Graph& g) { return (g.m * g.bits + 63) / 64; }     // 8 bytes each
LUTRA_INLINE int64_t code_slots(const Graph& g) { return code_words(g) * 64 / g.bits; }  // m, rounded up
LUTRA_INLINE int64_t decoded_values(const Graph& g) { return (g.d + 15) / 16 * 16; }

// ---- tables
constexpr float kTableLimit = 1e37f;  // beyond, entries are equally far: no difference of two overflows

// The floats of sub-table j, and their least and largest.
static inline void sub_table(const Graph& g, const float* q, int64_t j, float* out, float* least, float* most) {
  const int64_t columns = int64_t{1} << g.bits, dsub = g.d / g.m;
  const float *part = q + j * dsub, *lanes = g.lanes + j * dsub * columns;
  const vf limit = splat(kTableLimit);
  vf low = limit, high = -limit;
  for (int64_t c = 0; c < columns; c += W) {
    vf sum = {};
    for (int64_t s = 0; s < dsub; ++s) {
      const vf x = load(lanes + s * columns + c), v = splat(part[s]);
      sum += g.metric == Metric::l2 ? (v - x) * (v - x) : -v * x;
    }
    sum = sum < limit ? sum : limit;
    sum = sum > -limit ? sum : -limit;
    store(out + c, sum);
    low = sum < low ? sum : low;
    high = sum > high ? sum : high;
  }
  float a[W], b[W];
  store(a, low);
  store(b, high);
  for (int i = 1; i < W; ++i) {
    if (a[i] < a[0]) a[0] = a[i];
    if (b[i] > b[0]) b[0] = b[i];
  }
  *least = a[0];
  *most = b[0];
}

LUTRA_INLINE void store_u16(uint16_t* to, vf v) {
#if defined(LUTRA_LEVEL_v4)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_cvttps_epi32((__m512)v)));
#else
  *reinterpret_cast<vh*>(to) = __builtin_convertvector(__builtin_convertvector(v, vi), vh);
#endif
}

// Room for the table, then for its floats and the least of each sub-table.
static inline int64_t table_bytes(const Graph& g) {
  const int64_t columns = int64_t{1} << g.bits;
  return 2 * code_slots(g) * columns + 4 * g.m * columns + 4 * g.m + 64;
}

// The table of q into `room`, aligned to 64; what keys add and multiply by.
static inline void make_table(const Graph& g, const float* q, void* room, float* add, float* mul) {
  const int64_t columns = int64_t{1} << g.bits, slots = code_slots(g);
  uint16_t* table = static_cast<uint16_t*>(room);
  float* floats = reinterpret_cast<float*>(table + slots * columns);
  float* low = floats + g.m * columns;
  float range = 0;
  double base = 0;
  for (int64_t j = 0; j < g.m; ++j) {
    float most;
    sub_table(g, q, j, floats + j * columns, low + j, &most);
    base += low[j];
    if (most - low[j] > range) range = most - low[j];
  }
  int exponent;
  frexpf(range / 65535.0f, &exponent);
  if (exponent < -100) exponent = -100;
  *add = static_cast<float>(base);
  *mul = ldexpf(1.0f, exponent);
  const float inverse = ldexpf(1.0f, -exponent);
  for (int64_t j = 0; j < g.m; ++j)
    for (int64_t c = j * columns; c < (j + 1) * columns; c += W)
      store_u16(table + c, (load(floats + c) - splat(low[j])) * inverse + 0.5f);
  memset(table + g.m * columns, 0, static_cast<size_t>((slots - g.m) * columns) * sizeof(uint16_t));
}

// Sums of R rows: eight bytes of codes at a time, one load instead of eight or sixteen.
template <int B, int R>
LUTRA_INLINE void look_up(const Graph& g, const uint16_t* table, const int32_t* ids, float add, float mul, float* out) {
  const uint8_t* x[R];
  uint32_t sum[R];
  for (int r = 0; r < R; ++r) {
    x[r] = g.rows + ids[r] * g.stride;
    sum[r] = 0;
  }
  const int64_t words = code_words(g);
  for (int64_t w = 0; w < words; ++w) {
    uint64_t codes[R];
    for (int r = 0; r < R; ++r) memcpy(&codes[r], x[r] + 8 * w, 8);
#pragma GCC unroll 16
    for (int i = 0; i < 64 / B; ++i) {
      for (int r = 0; r < R; ++r) {
        sum[r] += table[codes[r] & ((1 << B) - 1)];
        codes[r] >>= B;
      }
      table += 1 << B;
    }
  }
  for (int r = 0; r < R; ++r) out[r] = add + mul * static_cast<float>(sum[r]);
}

// ---- decoded rows
// D: the length of a sub-vector where it is known at compile time (a copy is a move or two then), else 0.
template <int B, int D>
LUTRA_INLINE void decode_parts(const Graph& g, const uint8_t* row, float* out) {
  const int64_t dsub = D ? D : g.d / g.m;
  const float* books = g.books;
  for (int64_t j = 0; j < g.m; ++j) {
    const int64_t entry = B == 8 ? row[j] : row[j >> 1] >> (4 * (j & 1)) & 15;
    if (D)
      memcpy(out + j * D, books + entry * D, D * sizeof(float));
    else
      memcpy(out + j * dsub, books + entry * dsub, static_cast<size_t>(dsub) * sizeof(float));
    books += dsub << B;
  }
}

template <int B>
LUTRA_INLINE void decode_row(const Graph& g, const uint8_t* row, float* out) {
  switch (g.d / g.m) {
    case 1: return decode_parts<B, 1>(g, row, out);
    case 2: return decode_parts<B, 2>(g, row, out);
    case 4: return decode_parts<B, 4>(g, row, out);
    case 8: return decode_parts<B, 8>(g, row, out);
    case 16: return decode_parts<B, 16>(g, row, out);
    default: return decode_parts<B, 0>(g, row, out);
  }
}

// A node's row as `decoded_values` floats, zeros behind the d values.
static inline void decode_node(const Graph& g, int64_t node, float* out) {
  const uint8_t* row = g.rows + node * g.stride;
  if (g.bits == 8)
    decode_row<8>(g, row, out);
  else
    decode_row<4>(g, row, out);
  for (int64_t j = g.d; j < decoded_values(g); ++j) out[j] = 0;
}

// A graph of which only the rows matter: floats in `rows`, `decoded_values` each.
LUTRA_INLINE Graph decoded_graph(const Graph& g, const float* rows) {
  Graph plain = g;
  plain.rows = reinterpret_cast<const uint8_t*>(rows);
  plain.stride = 4 * decoded_values(g);
  plain.storage = DType::f32;
  return plain;
}

}  // namespace LUTRA_NS
}  // namespace lutra
