// tables for few tokens: rows that lie anywhere, each used about once. What limits is reading them.
//
// Eight rows at a time are added to a token's sums, which lie in the first-level cache, while the eight of the next
// token (or of the next eight tables) are prefetched: 16 streams are under way at once, each of whole pages. Measured
// on a Zen 4, rows of 4 KB (16 KB) out of 134 MB (2.1 GB), one thread: 46 (23) GB/s; one row at a time 21 (16); walking
// the list of rows for each 512 bytes of columns with a prefetch 24 rows ahead 11 (10).
#pragma once
#include "common/parallel.h"
#include "gather/rows.h"
#include "gather/tables.h"

namespace lutra {
namespace LUTRA_NS {

// A row of `n` values of any float type as f32, and f32 sums (plus `shift`) as a row of any float type.
static inline void widen_row(DType t, const void* from, int64_t n, float* to) {
  for (int64_t c = 0; c < n; ++c) {
    if (t == DType::f32)
      to[c] = static_cast<const float*>(from)[c];
    else
      to[c] = t == DType::f16 ? F16::get(static_cast<const uint16_t*>(from) + c)
                              : BF16::get(static_cast<const uint16_t*>(from) + c);
  }
}
template <class T>
LUTRA_INLINE void narrow_values(const float* from, float shift, bool shifted, int64_t n, void* out) {
  auto* to = static_cast<typename T::type*>(out);
  int64_t c = 0;
  for (; c + W <= n; c += W) T::store(to + c, shifted ? load(from + c) + shift : load(from + c));
  for (; c < n; ++c) T::put(to + c, shifted ? from[c] + shift : from[c]);
}
static inline void narrow_row(DType t, const float* from, float shift, bool shifted, int64_t n, void* to) {
  switch (t) {
    case DType::f16: return narrow_values<F16>(from, shift, shifted, n, to);
    case DType::bf16: return narrow_values<BF16>(from, shift, shifted, n, to);
    default: return narrow_values<F32>(from, shift, shifted, n, to);
  }
}
LUTRA_INLINE int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

template <class T>
struct TableRows {
  typedef typename T::type type;
  static constexpr int kLine = 64 / static_cast<int>(sizeof(type));   // values in a cache line
  static constexpr int kStep = kLine > W ? kLine : W;                 // columns of one turn of the loop
  static constexpr int kVectors = kStep / W, kLines = kStep / kLine;  // lines: of one row in one turn
  static constexpr bool kCodes = is_code<T>::value;

  // sum[0, n) += the R rows, in their order; the rows at `next` (as many) are prefetched.
  template <int R>
  static void add(float* sum, int64_t n, const type* const* row, const type* const* next, const float* weight) {
    vf w[R];
    LUTRA_UNROLL
    for (int r = 0; r < R; ++r) w[r] = splat(weight[r]);
    int64_t c = 0;
    for (; c + kStep <= n; c += kStep) {
      vf acc[kVectors];
      LUTRA_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[v] = load(sum + c + v * W);
      LUTRA_UNROLL
      for (int r = 0; r < R; ++r) {
        LUTRA_UNROLL
        for (int v = 0; v < kVectors; ++v) acc[v] += T::load(row[r] + c + v * W) * w[r];
        LUTRA_UNROLL
        for (int l = 0; l < kLines; ++l) prefetch_far(next[r] + c + l * kLine);
      }
      LUTRA_UNROLL
      for (int v = 0; v < kVectors; ++v) store(sum + c + v * W, acc[v]);
    }
    for (; c < n; c += W) {
      const int part = static_cast<int>(n - c < W ? n - c : W);
      vf acc = load_part<F32>(sum + c, part);
      for (int r = 0; r < R; ++r) {
        acc += load_part<T>(row[r] + c, part) * w[r];
        prefetch_far(next[r] + c);
      }
      store_part<F32>(sum + c, acc, part);
    }
  }

  // Columns [c0, c1) of the tokens [t0, t1).
  static void run(const TablesArgs& a, int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
    const int64_t n = c1 - c0, K = a.n_tables, stride = (n + 15) / 16 * 16;
    const auto* tables = static_cast<const type*>(a.tables) + c0;
    Buffer<float> sums((t1 - t0) * stride), shift(kCodes ? t1 - t0 : 0), bias(a.bias ? n : 0);
    if (a.bias) widen_row(a.out_dtype, static_cast<const char*>(a.bias) + c0 * size_of(a.out_dtype), n, bias.data);
    for (int64_t t = 0; t < t1 - t0; ++t) {
      if (a.bias)
        memcpy(sums.data + t * stride, bias.data, static_cast<size_t>(n) * sizeof(float));
      else
        memset(sums.data + t * stride, 0, static_cast<size_t>(n) * sizeof(float));
      if (kCodes) shift[t] = 0;
    }
    constexpr int R = 8;
    const type* rows[2][R];
    float weights[2][R];
    const auto look_up = [&](int64_t k0, int g, int64_t t, int into) {
      for (int r = 0; r < g; ++r) {
        const int64_t i = t * K + k0 + r, row = (k0 + r) * a.entries + a.codes[i];
        rows[into][r] = tables + row * a.dim;
        weights[into][r] = a.weights ? a.weights[i] : 1.0f;
        if (kCodes) {
          shift[t - t0] += weights[into][r] * a.minimum[row];
          weights[into][r] *= a.scale[row];
        }
      }
      for (int r = g; r < R; ++r) rows[into][r] = rows[into][g > 0 ? 0 : r];
    };
    int at = 0;
    const auto group = [&](int64_t k) { return static_cast<int>(K - k < R ? K - k : R); };
    if (K > 0 && t1 > t0) look_up(0, group(0), t0, 0);
    for (int64_t k0 = 0; k0 < K; k0 += R) {
      const int g = group(k0);
      for (int64_t t = t0; t < t1; ++t, at ^= 1) {
        int next = at ^ 1;
        if (t + 1 < t1)
          look_up(k0, g, t + 1, next);
        else if (k0 + R < K)
          look_up(k0 + R, group(k0 + R), t0, next);
        else
          next = at;
        float* sum = sums.data + (t - t0) * stride;
        if (g == R) {
          add<R>(sum, n, rows[at], rows[next], weights[at]);
        } else {
          int r = 0;
          for (; r + 2 <= g; r += 2) add<2>(sum, n, rows[at] + r, rows[next] + r, weights[at] + r);
          if (r < g) add<1>(sum, n, rows[at] + r, rows[next] + r, weights[at] + r);
        }
      }
    }
    char* out = static_cast<char*>(a.out) + c0 * size_of(a.out_dtype);
    for (int64_t t = t0; t < t1; ++t)
      narrow_row(a.out_dtype, sums.data + (t - t0) * stride, kCodes ? shift[t - t0] : 0.0f, kCodes, n,
                 out + t * a.dim * size_of(a.out_dtype));
  }
};

}  // namespace LUTRA_NS
}  // namespace lutra
