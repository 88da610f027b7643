// Rows of 4-bit codes for a few queries: sums by tiles, and the offering of what passes a query's threshold.
#pragma once
#include <math.h>

#include "scan/candidates.h"
#include "scan/fast_scan.h"
#include "scan/fast_scan_tables.h"
#include "scan/fast_scan_tiles.h"

namespace lutra {
namespace LUTRA_NS {
namespace fast_scan_rows {

using namespace fast_scan_tables;
using namespace fast_scan_tiles;

// ---- what passes
static __attribute__((noinline)) void offer(const FastScanArgs& a, Candidates* best, float key, int64_t row) {
  const int64_t position = a.positions ? a.positions[row] : row;
  if (position < 0 || (a.keep && !(a.keep[position >> 3] >> (position & 7) & 1))) return;
  const uint64_t packed = pack_candidate(key, position);
  if (packed <= best->worst) return;
  best->packed[best->count++] = packed;
  if (best->count >= best->capacity) cut(best);
}

#if defined(LUTRA_LEVEL_v4)
// Sixteen rows at once, those of `pass`: without a branch for each, which would be guessed wrongly again and again.
// Nothing is compared with `worst`: what is too low goes with the next cut. Buffers have room for 16 beyond capacity.
LUTRA_INLINE void offer_block(const FastScanArgs& a, Candidates* best, __m512 keys, __mmask16 pass, int64_t row) {
  __m512i who = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(row)),
                                 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  if (a.positions) {
    who = _mm512_maskz_loadu_epi32(pass, a.positions + row);
    pass = _mm512_mask_cmpge_epi32_mask(pass, who, _mm512_setzero_si512());
  }
  const __m512i bits = _mm512_castps_si512(keys), sign = _mm512_srai_epi32(bits, 31);
  const __m512i order = _mm512_xor_si512(bits, _mm512_or_si512(sign, _mm512_set1_epi32(INT32_MIN)));
  const __m512i high = _mm512_maskz_compress_epi32(pass, order);
  const __m512i low = _mm512_maskz_compress_epi32(pass, _mm512_andnot_si512(who, _mm512_set1_epi32(-1)));
  uint64_t* to = best->packed + best->count;
  const auto pair = [](__m256i h, __m256i l) {
    return _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(h), 32), _mm512_cvtepu32_epi64(l));
  };
  _mm512_storeu_si512(to, pair(_mm512_castsi512_si256(high), _mm512_castsi512_si256(low)));
  _mm512_storeu_si512(to + 8, pair(_mm512_extracti32x8_epi32(high, 1), _mm512_extracti32x8_epi32(low, 1)));
  best->count += __builtin_popcount(pass);
  if (best->count >= best->capacity) cut(best);
}
#endif

// A bit for each row of the tile whose sum is `least` or more.
LUTRA_INLINE uint64_t passing(const int32_t* sums, int rows, int32_t least) {
  uint64_t pass = 0;
#if defined(LUTRA_LEVEL_v4)
  for (int r = 0; r < rows; r += 16)
    pass |= static_cast<uint64_t>(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(sums + r), _mm512_set1_epi32(least))) << r;
#else
  for (int r = 0; r < rows; r += W) {
    const vi s = *reinterpret_cast<const vi_unaligned*>(sums + r);
    pass |= static_cast<uint64_t>(mask_bits(s >= least)) << r;
  }
#endif
  return pass;
}

// ---- the least sum that matters
// `slack` in sums: some below the threshold may pass, keys are rounded.
LUTRA_INLINE int32_t least_sum(float sum, float slack) {
  const float s = sum - slack;
  if (!(s > 0)) return 0;  // also -inf and NaN
  return s > 2e9f ? 2000000000 : static_cast<int32_t>(s);
}

// From which sum on a key of the threshold or more is possible, where rows have no terms.
LUTRA_INLINE int32_t least_sum(const Query& q, float base) {
  const float constant = base + q.least, s = (q.best.threshold - constant) * q.per;
  return least_sum(s, 2 + 1e-6f * (fabsf(s) + fabsf(constant * q.per)));
}

// Of the terms of each tile's rows. A tile whose sums all stay below what its terms allow at best is done with: most
// are, and then nothing is converted, multiplied or compared in floats.
struct Bounds {
  const float *per_least, *per_most;  // one over the least and the greatest factor
  const float* most_add;              // in keys; infinite where a factor is not above 0: then there is no bound
  Bounds from(int64_t tile) const { return {per_least + tile, per_most + tile, most_add + tile}; }
};

static inline void bounds_of(const FastScanArgs& a, int64_t tile, float* per_least, float* per_most, float* most_add) {
  const int64_t row = tile * kTile, rows = a.n - row < kTile ? a.n - row : kTile;
  const float sign = order_of(a);
  float low = a.mul ? a.mul[row] : 1.0f, high = low, most = a.add ? sign * a.add[row] : 0.0f;
  vf lows = splat(low), highs = lows, mosts = splat(most);
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t at = r + W <= rows ? row + r : row + rows - W;  // the last vector ends with the rows
    if (at < row) break;
    if (a.mul) {
      const vf m = load(a.mul + at);
      lows = m < lows ? m : lows;
      highs = m > highs ? m : highs;
    }
    if (a.add) {
      const vf v = sign * load(a.add + at);
      mosts = v > mosts ? v : mosts;
    }
  }
  for (int i = 0; i < W; ++i) {
    low = lows[i] < low ? lows[i] : low;
    high = highs[i] > high ? highs[i] : high;
    most = mosts[i] > most ? mosts[i] : most;
  }
  for (int64_t r = 0; rows < W && r < rows; ++r) {
    const float m = a.mul ? a.mul[row + r] : 1.0f, v = a.add ? sign * a.add[row + r] : 0.0f;
    low = m < low ? m : low;
    high = m > high ? m : high;
    most = v > most ? v : most;
  }
  *per_least = 1 / low;
  *per_most = 1 / high;
  *most_add = low > 0 ? most : __builtin_inff();
}

// For `tiles` tiles (a vector more is written): as above. A threshold that has risen since leaves them valid.
static inline void least_sums(const Query& q, float base, const Bounds& b, int64_t tiles, int32_t* least) {
  const float threshold = q.best.threshold;
  const vf at_least = splat(q.least), per = splat(q.per), most = splat(2e9f);
  for (int64_t t = 0; t < tiles; t += W) {
    const vf per_least = load(b.per_least + t), per_most = load(b.per_most + t), add = load(b.most_add + t);
    const vf need = splat(threshold - base) - add;  // of mul * (least + step * sum)
    vf s = (need > 0 ? need * per_most : need * per_least) - at_least;
    const vf size = (splat(fabsf(threshold) + fabsf(base)) + (add < 0 ? -add : add)) * per_least + fabsf(q.least);
    s = (s - 1e-6f * size) * per - 2;
    s = s > 0 ? s : (vf){};  // also -inf and NaN
    s = s < most ? s : most;
    *reinterpret_cast<vi_unaligned*>(least + t) = __builtin_convertvector(s, vi);
  }
}

// ---- tiles
// W terms of rows from `row` on, of which a.n exist.
LUTRA_INLINE vf row_terms(const float* terms, int64_t row, int64_t n) {
  if (n - row >= W) return load(terms + row);
  return n > row ? load_first(terms + row, static_cast<int>(n - row)) : (vf){};
}

// Keys of a tile with terms of their rows, and a bit for each that reaches the threshold; `rows` of them exist, `keys`
// has room for whole vectors.
static inline uint64_t keys_with_terms(const FastScanArgs& a, const Query& q, float base, int64_t row, int rows,
                                       const int32_t* sums, float* keys) {
  const float sign = order_of(a);
  const vf threshold = splat(q.best.threshold);
  uint64_t pass = 0;
  for (int r = 0; r < rows; r += W) {
    vf key = q.least + q.step * __builtin_convertvector(*reinterpret_cast<const vi_unaligned*>(sums + r), vf_unaligned);
    if (a.mul) key *= row_terms(a.mul, row + r, a.n);
    key += base;
    if (a.add) key += sign * row_terms(a.add, row + r, a.n);
    store(keys + r, key);
    pass |= static_cast<uint64_t>(mask_bits(key >= threshold)) << r;
  }
  return pass;
}

// A tile of rows from `row` on, of which `count` exist, for a query: offers those that pass.
static inline void offer_tile(const FastScanArgs& a, Query* q, float base, int64_t row, int count,
                              const int32_t* sums) {
  Candidates* best = &q->best;
  const uint64_t exist = count == kTile ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  if (a.add || a.mul) {
    alignas(64) float keys[kTile];
    const uint64_t some = keys_with_terms(a, *q, base, row, count, sums, keys) & exist;
    if (!some) return;
#if defined(LUTRA_LEVEL_v4)
    if (!a.keep) {
      for (int r = 0; r < count; r += 16) {
        const auto pass = static_cast<__mmask16>(some >> r);
        if (pass) offer_block(a, best, (__m512)load(keys + r), pass, row + r);
      }
      return;
    }
#endif
    for (int r = 0; r < count; r += W)
      for (uint32_t pass = mask_bits(load(keys + r) >= splat(best->threshold)); pass; pass &= pass - 1) {
        const int at = r + __builtin_ctz(pass);
        if (at < count) offer(a, best, keys[at], row + at);
      }
    return;
  }
  const float constant = base + q->least;
  uint64_t pass = passing(sums, count, least_sum(*q, base)) & exist;
#if defined(LUTRA_LEVEL_v4)
  if (!a.keep) {
    for (int r = 0; r < count; r += 16) {
      const auto block = static_cast<__mmask16>(pass >> r);
      const vf sums16 = __builtin_convertvector(*reinterpret_cast<const vi*>(sums + r), vf);
      if (block) offer_block(a, best, (__m512)(constant + q->step * sums16), block, row + r);
    }
    return;
  }
#endif
  for (; pass; pass &= pass - 1) {
    const int at = __builtin_ctzll(pass);
    offer(a, best, constant + q->step * static_cast<float>(sums[at]), row + at);
  }
}

constexpr int kMostTiles = 64;  // of a piece

// Rows [begin, begin + rows) for Q queries, whose codes begin at `codes`; begin is a multiple of 16. `base` in keys.
// `bounds` of the tiles' terms, which are at most kMostTiles then, or null: every row of a tile is looked at where rows
// have terms.
template <int Q>
static void scan_rows(const FastScanArgs& a, const uint8_t* codes, Query* const* q, const float* base, int64_t begin,
                      int64_t rows, const Bounds* bounds) {
  const int64_t groups = groups_of(a.m), tiles = (rows + kTile - 1) / kTile;
  const bool terms = a.add || a.mul;
  const uint8_t* tables[Q];
  int32_t least[Q], of_tiles[Q][kMostTiles + W];
  for (int i = 0; i < Q; ++i) {
    tables[i] = q[i]->table;
    least[i] = terms ? 0 : least_sum(*q[i], base[i]);
    if (bounds) least_sums(*q[i], base[i], *bounds, tiles, of_tiles[i]);
  }
  alignas(64) Sums sum[Q];
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t at = begin + t * kTile;
    const int count = static_cast<int>(begin + rows - at < kTile ? begin + rows - at : kTile);
    if (bounds)
      for (int i = 0; i < Q; ++i) least[i] = of_tiles[i][t];
    const uint8_t* tile = codes + t * kBlocks * groups * 64;
    uint32_t some = sums<Q>(tile, groups, (count + kRows - 1) / kRows, tables, least, sum);
    for (; some; some &= some - 1) {
      const int i = __builtin_ctz(some);
      offer_tile(a, q[i], base[i], at, count, sum[i]);
      if (!terms) least[i] = least_sum(*q[i], base[i]);
    }
  }
}

}  // namespace fast_scan_rows
}  // namespace LUTRA_NS
}  // namespace lutra
