// Logits of packed rows in integers (AVX-512 VNNI): codes of 8, 4 or 2 bits times tokens in fixed point.
//
// A token is rounded to integers of D bytes on one unit, its largest magnitude divided by about 2^(8 D - 1); a code is
// an integer already. One instruction (vpdpbusd) multiplies 64 codes with one byte of the token and adds the products
// to 16 sums, exactly, so that a logit takes D / 64 instructions a column:
//   <row, h> = scale (unit sum code digits) + minimum (unit sum digits)
// What is lost: a column of h at most half a unit, 2^-16 (D = 2) or 2^-24 (D = 3) of the token's largest, and two
// roundings of the result.
//
// 32 rows are turned around, four bytes of a row side by side, rows in the lanes; 4- and 2-bit codes are then taken out
// of their bytes, so that the columns of a step lie apart in the row and those of the token are put into the same
// order. Limit: vpdpbusd, one a cycle (Zen 4), and below some 4 tokens reading the rows once.
#pragma once
#include "common/parallel.h"
#include "common/simd.h"
#include "gather/packed_rows.h"

#if defined(LUTRA_LEVEL_v4)
namespace lutra {
namespace LUTRA_NS {
namespace digits {

constexpr int kTile = 32;                               // rows of a tile: two vectors of sums
constexpr int64_t kKept = 4 * kTile;                    // rows whose scores are kept before they go out
constexpr int64_t kMaxColumns = 65536;                  // of a group: above, sums could leave 32 bits
constexpr int64_t kPassBytes = 256000;                  // of the tokens of a pass, which stay in the second-level cache
constexpr int64_t kPassTokens = 64;                     // at most
constexpr int widest(int d) { return d == 2 ? 6 : 4; }  // tokens of a tile: 24 registers of sums

struct Shape {  // of the columns, in steps of four codes
  int64_t bytes, steps, groups, group_steps;
};
template <Packed K>
static inline Shape shape_of(const PackedTable& p) {
  Shape s;
  s.bytes = packed_code_bytes(K, p.dim);
  s.steps = (s.bytes + 63) / 64 * 16 * (8 / packed_bits(K));
  const bool one = p.group >= p.dim;
  s.groups = one ? 1 : (p.dim + p.group - 1) / p.group;
  s.group_steps = one ? s.steps : p.group / 4;
  return s;
}

struct Tokens {  // of a pass; those of a tile lie together, as (steps, tokens of the tile, D, 4)
  Buffer<int8_t> bytes;
  Buffer<float> total;  // (groups, tokens): sums of columns
  Buffer<float> unit;
  int64_t count;
  Tokens(int64_t n, int d, const Shape& s) : bytes(n * d * 4 * s.steps), total(n * s.groups), unit(n), count(n) {}
};

// Tokens as digits. False where one is not finite, or too small for a unit: there is no fixed point for it.
template <int D, int Bits>
static inline bool encode(const float* hidden, int64_t dim, const Shape& s, Tokens* to) {
  constexpr int per = 8 / Bits;
  constexpr double most = D == 2 ? 32630 : 8355000;  // below the largest whose digits are signed bytes
  memset(to->bytes.data, 0, to->count * D * 4 * s.steps);
  for (int64_t t = 0; t < to->count; ++t) {
    const int64_t t0 = t / widest(D) * widest(D);
    const int64_t wide = to->count - t0 < widest(D) ? to->count - t0 : widest(D);
    int8_t* out = to->bytes.data + (t0 * s.steps + t - t0) * D * 4;
    const float* h = hidden + t * dim;
    float largest = 0;
    for (int64_t c = 0; c < dim; ++c) {
      const float size = __builtin_fabsf(h[c]);
      if (!(size <= 3.4028235e38f)) return false;
      largest = size > largest ? size : largest;
    }
    const float unit = static_cast<float>(largest / most);
    if (largest > 0 && unit < 1e-30f) return false;
    const double inverse = largest > 0 ? 1.0 / unit : 0.0;
    to->unit[t] = unit;
    for (int64_t g = 0, c = 0; g < s.groups; ++g) {
      const int64_t last = g + 1 == s.groups ? dim : c + s.group_steps * 4;
      int64_t sums[D] = {};
      for (; c < last; ++c) {
        const double magic = 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer in the low bits
        const double shifted = h[c] * inverse + magic;
        int64_t bits;
        memcpy(&bits, &shifted, 8);
        int32_t q = static_cast<int32_t>(bits);
        const int64_t at = c / per, step = at / 4 * per + c % per;
        int8_t* place = out + (step * wide * D) * 4 + at % 4;
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) {
          const int32_t digit = static_cast<int8_t>(q);
          place[4 * d] = static_cast<int8_t>(digit);
          sums[d] += digit;
          q = (q - digit) >> 8;
        }
      }
      double total = 0;
      for (int d = D; d-- > 0;) total = total * 256 + static_cast<double>(sums[d]);
      to->total[g * to->count + t] = static_cast<float>(total * unit);
    }
  }
  return true;
}

// Row i of x holds 16 words; afterwards x[w] holds word w of rows 0 to 15.
LUTRA_INLINE void transpose(__m512i* x) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // 4 x 4 blocks of 128 bits
    y[j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88);
    y[4 + j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
    y[8 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
    y[12 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0x88);
    x[4 + j] = _mm512_shuffle_i32x4(y[4 + j], y[12 + j], 0x88);
    x[8 + j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0xdd);
    x[12 + j] = _mm512_shuffle_i32x4(y[4 + j], y[12 + j], 0xdd);
  }
}

struct Tile {
  Buffer<uint8_t> codes;  // (steps, 32 rows, 4), a code a byte
  Buffer<float> scale;    // (groups, 32)
  Buffer<float> minimum;
  explicit Tile(const Shape& s) : codes(s.steps * 4 * kTile), scale(s.groups * kTile), minimum(s.groups * kTile) {}
};

// Rows [row, row + 32) of the table, of which there may be fewer.
template <Packed K>
static inline void turn(const PackedTable& p, const Shape& s, int64_t row, Tile* to) {
  typedef PackedGroups<K> G;
  constexpr int bits = packed_bits(K), per = 8 / bits;
  const uint8_t* rows[kTile];
  for (int i = 0; i < kTile; ++i) rows[i] = p.data + (row + i < p.rows ? row + i : p.rows - 1) * p.row_bytes;
  const __m512i low = _mm512_set1_epi8((1 << bits) - 1);
  for (int half = 0; half < 2; ++half) {
    for (int64_t b = 0; b < s.bytes; b += 64) {
      const int64_t left = s.bytes - b;
      const __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const uint8_t* from = rows[half * 16 + i] + b;
        x[i] = _mm512_maskz_loadu_epi8(mask, from);
        __builtin_prefetch(from + kTile * p.row_bytes);
      }
      transpose(x);
      uint8_t* out = to->codes.data + b / 4 * per * (4 * kTile) + half * 64;
#pragma GCC unroll 16
      for (int w = 0; w < 16; ++w)
#pragma GCC unroll 4
        for (int j = 0; j < per; ++j) {
          const __m512i v = per == 1 ? x[w] : _mm512_and_si512(_mm512_srli_epi32(x[w], bits * j), low);
          _mm512_store_si512(out + (w * per + j) * (4 * kTile), v);
        }
    }
  }
  for (int i = 0; i < kTile; ++i) {
    const uint8_t* groups = G::groups(p, rows[i]);
    for (int64_t g = 0; g < s.groups; ++g) {
      const Affine a = G::group_at(groups, g);
      to->scale[g * kTile + i] = a.scale;
      to->minimum[g * kTile + i] = a.minimum;
    }
  }
}

// Scores of a tile's rows for N tokens from t0 on, into scores (tokens, kKept).
template <int D, int N>
static __attribute__((noinline)) void product(const Tile& tile, const Shape& s, const Tokens& q, int64_t t0,
                                              float* scores) {
  const int8_t* digits = q.bytes.data + t0 * s.steps * D * 4;
  const uint8_t* codes = tile.codes.data;
  for (int64_t g = 0, step = 0; g < s.groups; ++g) {
    vi sum[2][N * D] = {};
    const int64_t last = g + 1 == s.groups ? s.steps : step + s.group_steps;
    for (; step < last; ++step) {
      const vi x0 = *reinterpret_cast<const vi*>(codes), x1 = *reinterpret_cast<const vi*>(codes + 64);
#pragma GCC unroll 12
      for (int v = 0; v < N * D; ++v) {
        int32_t four;
        memcpy(&four, digits + 4 * v, 4);
        const vi h = (vi)_mm512_set1_epi32(four);
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[0][v]) : "v"(x0), "v"(h));
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[1][v]) : "v"(x1), "v"(h));
      }
      codes += 4 * kTile;
      digits += N * D * 4;
    }
    const float* total = q.total.data + g * q.count + t0;
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const vf scale = load(tile.scale.data + g * kTile + r * 16),
               minimum = load(tile.minimum.data + g * kTile + r * 16);
#pragma GCC unroll 6
      for (int t = 0; t < N; ++t) {
        vf value = __builtin_convertvector(sum[r][t * D + D - 1], vf);
#pragma GCC unroll 2
        for (int d = D - 2; d >= 0; --d) value = value * 256.0f + __builtin_convertvector(sum[r][t * D + d], vf);
        float* out = scores + (t0 + t) * kKept + r * 16;
        vf score = scale * (value * q.unit[t0 + t]) + minimum * total[t];
        if (g) score += load(out);
        store(out, score);
      }
    }
  }
}

template <int D>
static inline void products(const Tile& tile, const Shape& s, const Tokens& q, float* scores) {
  for (int64_t t = 0; t < q.count; t += widest(D)) {
    switch (q.count - t) {
      case 1: product<D, 1>(tile, s, q, t, scores); break;
      case 2: product<D, 2>(tile, s, q, t, scores); break;
      case 3: product<D, 3>(tile, s, q, t, scores); break;
      case 4: product<D, 4>(tile, s, q, t, scores); break;
      case 5: product<D, D == 2 ? 5 : 4>(tile, s, q, t, scores); break;
      default: product<D, widest(D)>(tile, s, q, t, scores);
    }
  }
}

}  // namespace digits
}  // namespace LUTRA_NS
}  // namespace lutra
#endif
