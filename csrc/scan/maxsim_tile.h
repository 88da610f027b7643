// The products and maxima of scan/maxsim.cc, at a SIMD level: query tokens in the lanes, R document rows a tile.
//
// A row is read in steps of 4 bytes (one float, two bfloat16, four int8), which are broadcast to all lanes; a panel
// holds the same 4 bytes of each of its query tokens, (steps, vectors, W lanes, 4 bytes). On AVX-512 a tile has 24
// sums: 12 rows x 2 vectors of query tokens, 24 multiply-adds for 14 loads. Its maxima are vertical, so that a row
// costs no work across lanes. Rows may be taken twice (a last tile that overlaps the one before): maxima do not mind.
#pragma once
#include "scan/exact.h"  // fused

namespace lutra {
namespace LUTRA_NS {
namespace late {

#if defined(LUTRA_LEVEL_v4)
constexpr int kMostVectors = 4;  // of sums of a row
constexpr int kRowsOf[] = {0, 16, 12, 8, 6};
#else
constexpr int kMostVectors = 2;
constexpr int kRowsOf[] = {0, 8, 6};
#endif
constexpr int kFew = 4;  // rows of a tile for what is left

struct FloatDot {
  typedef vf Sum;
  static constexpr int kDigits = 1;
  static constexpr bool kInteger = false;
  LUTRA_INLINE vf add(vf sum, vi q, vi x) { return fused(sum, (vf)q, (vf)x); }
};
#if defined(LUTRA_LEVEL_v4)
// In assembly, because an attribute would have to be given to every caller up to the loop. Used where g_features says.
struct Bf16Dot {
  typedef vf Sum;
  static constexpr int kDigits = 1;
  static constexpr bool kInteger = false;
  LUTRA_INLINE vf add(vf sum, vi q, vi x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(q), "v"(x));
    return sum;
  }
};
// The query's digit + 128 is the unsigned operand; 128 times the sum of the row's codes is where the sum starts.
template <int D>
struct ByteDot {
  typedef vi Sum;
  static constexpr int kDigits = D;  // most significant first
  static constexpr bool kInteger = true;
  LUTRA_INLINE vi add(vi sum, vi q, vi x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(q), "v"(x));
    return sum;
  }
};
#endif

// Lanes that have met a NaN, which a maximum drops.
struct Marks {
#if defined(LUTRA_LEVEL_v4)
  uint32_t bits = 0;
  LUTRA_INLINE void add(Marks* m, vf v) { m->bits |= _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q); }
  LUTRA_INLINE uint32_t get(const Marks* m) { return m->bits; }
#else
  vi bits = {};
  LUTRA_INLINE void add(Marks* m, vf v) { m->bits |= v != v; }
  LUTRA_INLINE uint32_t get(const Marks* m) { return mask_bits(m->bits); }
#endif
};

// What a panel's lanes have found in a document so far.
struct alignas(64) Lanes {
  float best[kMostVectors * W];
  int32_t where[kMostVectors * W];
  uint32_t nan[kMostVectors];
};

// Rows of one document, ready to be multiplied.
struct Rows {
  const char* x;
  int64_t stride, steps, count;  // stride in bytes
  const uint8_t* mask;           // of each row, or null
  const float* factor;           // likewise; of its products
  const int32_t* total;          // sum of its codes (ByteDot)
  int64_t first;                 // its number in x
  bool ahead;                    // whether the rows come from memory: then those of the next tile are fetched meanwhile
};

template <class Dot, int V, int R>
LUTRA_INLINE void products(const Rows& rows, int64_t i, const char* panel, typename Dot::Sum sum[R][V]) {
  constexpr int kThird = (R + 2) / 3;
  const int64_t stride = rows.stride;
  const char* x[kThird];  // of every third row: the others are at one and two strides from it
  for (int g = 0; g < kThird; ++g) x[g] = rows.x + (i + 3 * g) * stride;
  for (int64_t begin = 0; begin < rows.steps; begin += 16) {
    const int64_t end = begin + 16 < rows.steps ? begin + 16 : rows.steps;
    if (rows.ahead)
      for (int r = 0; r < R; ++r) __builtin_prefetch(x[r / 3] + (r % 3 + R) * stride);
    for (int64_t s = begin; s < end; ++s) {
      vi q[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) q[v] = *reinterpret_cast<const vi*>(panel + v * static_cast<int>(sizeof(vi)));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t four;
        memcpy(&four, x[r / 3] + r % 3 * stride, 4);
        const vi word = (vi){} + four;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = Dot::add(sum[r][v], q[v], word);
      }
      panel += V * sizeof(vi);
      for (int g = 0; g < kThird; ++g) x[g] += 4;
    }
  }
}

template <class Dot, int V, int R, bool Arg>
LUTRA_INLINE void tile(const Rows& rows, int64_t i, const char* panel, vf* best, vi* where, Marks* nan) {
  constexpr int D = Dot::kDigits;
  typename Dot::Sum sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if constexpr (Dot::kInteger)
        sum[r][v] = (vi){} - 128 * rows.total[i + r];
      else
        sum[r][v] = (vf){};
    }
  products<Dot, V, R>(rows, i, panel, sum);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (rows.mask && !rows.mask[i + r]) continue;
#pragma GCC unroll 4
    for (int v = 0; v < V / D; ++v) {
      vf value;
      if constexpr (Dot::kInteger) {
        value = __builtin_convertvector(sum[r][v * D], vf);
        if constexpr (D == 2) value = value * 256.0f + __builtin_convertvector(sum[r][v * D + 1], vf);
      } else {
        value = sum[r][v];
      }
      if (rows.factor) value *= rows.factor[i + r];
      Marks::add(nan + v, value);
      if constexpr (Arg) {
        const vi row = (vi){} + static_cast<int32_t>(rows.first + i + r);
#if defined(LUTRA_LEVEL_v4)
        const __mmask16 more = _mm512_cmp_ps_mask((__m512)value, (__m512)best[v], _CMP_GT_OQ);
        where[v] = (vi)_mm512_mask_mov_epi32((__m512i)where[v], more, (__m512i)row);
#else
        const vi more = value > best[v];
        where[v] = (row & more) | (where[v] & ~more);
#endif
      }
#if defined(LUTRA_LEVEL_v4)
      best[v] = (vf)_mm512_max_ps((__m512)value, (__m512)best[v]);
#else
      best[v] = value > best[v] ? value : best[v];
#endif
    }
  }
}

// V: vectors of sums of a row, which are V / Dot::kDigits vectors of query tokens.
template <class Dot, int V, bool Arg>
static __attribute__((noinline)) void run_rows(const Rows& given, const char* panel, Lanes* lanes) {
  constexpr int R = kRowsOf[V], N = V / Dot::kDigits;
  const Rows rows = given;
  vf best[N];
  vi where[N] = {};
  Marks nan[N];
  for (int v = 0; v < N; ++v) {
    best[v] = load(lanes->best + v * W);
    if (Arg) where[v] = *reinterpret_cast<const vi*>(lanes->where + v * W);
  }
  const int64_t n = rows.count;
  int64_t i = 0;
  for (; i + R <= n; i += R) tile<Dot, V, R, Arg>(rows, i, panel, best, where, nan);
  if (n >= R && n - i > kFew) {
    tile<Dot, V, R, Arg>(rows, n - R, panel, best, where, nan);
  } else {
    for (; i + kFew <= n; i += kFew) tile<Dot, V, kFew, Arg>(rows, i, panel, best, where, nan);
    if (i < n && n >= kFew) {
      tile<Dot, V, kFew, Arg>(rows, n - kFew, panel, best, where, nan);
    } else {
      for (; i < n; ++i) tile<Dot, V, 1, Arg>(rows, i, panel, best, where, nan);
    }
  }
  for (int v = 0; v < N; ++v) {
    store(lanes->best + v * W, best[v]);
    if (Arg) *reinterpret_cast<vi*>(lanes->where + v * W) = where[v];
    lanes->nan[v] |= Marks::get(nan + v);
  }
}

}  // namespace late
}  // namespace LUTRA_NS
}  // namespace lutra
