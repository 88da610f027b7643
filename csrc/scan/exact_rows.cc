// Rows along d: W products of a row and a query at a time, as the memory delivers the rows, whatever they are stored
// as. A tile has W sums in registers, of R = W / Q rows with Q queries, and adds up all their lanes together: W - 1
// additions and twice as many shuffles for W sums, in the order in which reduce_add would take each. So a vector holds
// the W scores of a tile and is compared with the thresholds at once.
// Limits: reading the rows (one query); the FMA rate, at 12 queries nearly as well as the lanes way.
#include "common/parts.h"
#include "scan/reduce_all.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// ------------------------------------------------------------------------------------------ a tile
// Rows of a tile that are read side by side: one query has sums enough under way in one row after another, which is the
// order that the processor's own prefetcher follows best.
template <int Q>
constexpr int side_by_side() {
  return Q == 1 ? 1 : W / Q < 8 ? W / Q : 8;
}

// Scores of W / Q rows with Q queries: query i with row r in lane i * R + r. `next`: rows that will be wanted soon; a
// stride of 0: nothing is fetched ahead.
template <Kind K, class T, int Q>
LUTRA_INLINE vf tile(const float* q, int64_t ldq, const typename T::type* const* x, const typename T::type* const* next,
                     int64_t stride, int64_t d) {
  constexpr int R = W / Q, G = side_by_side<Q>();
  vf sum[W];
#pragma GCC unroll 8
  for (int g = 0; g < R; g += G) {
    vf part[G][Q];
#pragma GCC unroll 8
    for (int r = 0; r < G; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) part[r][i] = (vf){};
    int64_t j = 0;
    for (; j + W <= d; j += W) {
      vf qj[Q];
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) qj[i] = load(q + i * ldq + j);
      if (stride && j * sizeof(typename T::type) % 64 < W * sizeof(typename T::type)) {  // a new line
#pragma GCC unroll 8
        for (int r = 0; r < G; ++r) __builtin_prefetch(next[g + r] + j * stride, 0, 2);
      }
#pragma GCC unroll 8
      for (int r = 0; r < G; ++r) {
        const vf xj = T::load(x[g + r] + j);
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) part[r][i] = step<K>(part[r][i], qj[i], xj);
      }
    }
    if (j < d) {
#pragma GCC unroll 8
      for (int r = 0; r < G; ++r) {
        const vf xj = load_part<T>(x[g + r] + j, static_cast<int>(d - j));
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) part[r][i] = step<K>(part[r][i], load(q + i * ldq + j), xj);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < G; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) sum[place(i * R + g + r)] = part[r][i];
  }
  return reduce_all<K>(sum);
}

template <class T>
LUTRA_INLINE const typename T::type* row_at(const Block& b, int64_t i) {
  return static_cast<const typename T::type*>(b.x) + (b.rows ? b.rows[i] : i) * b.ldx;
}

// Rows i, i + 1, ... of the block; behind its end, the last one.
template <class T, int R>
LUTRA_INLINE void rows_at(const Block& b, int64_t i, const typename T::type** out) {
  const auto* x = static_cast<const typename T::type*>(b.x);
  const int64_t last = b.count - 1;
  if (b.rows)
    for (int r = 0; r < R; ++r) out[r] = x + b.rows[i + r < last ? i + r : last] * b.ldx;
  else
    for (int r = 0; r < R; ++r) out[r] = x + (i + r < last ? i + r : last) * b.ldx;
  asm volatile("" ::"r"(out) : "memory");  // in memory they stay: there are more of them than registers
}

// Queries first .. first + Q - 1 with all rows of the block.
template <Kind K, class T, int Q>
void rows_group(const Queries& c, int64_t first, const Block& b, Finds* s) {
  constexpr int R = W / Q, kAhead = 64, G = side_by_side<Q>();
  const bool linear = !b.rows && b.ldx == b.d;
  const float* q = c.q + first * c.ld;
  alignas(64) float raw[W], thresholds[W], factors[W];
  const typename T::type *x[R], *next[R];
  const auto refresh = [&] {
    for (int i = 0; i < Q; ++i)
      for (int r = 0; r < R; ++r) thresholds[i * R + r] = s->pass[first + i];
  };
  refresh();
  vf threshold = load(thresholds);
  for (int64_t i0 = 0; i0 < b.count; i0 += R) {
    rows_at<T, R>(b, i0, x);
    rows_at<T, R>(b, i0 + kAhead, next);
    if (linear)  // line after line: the processor's own prefetcher sees that
      for (int r = 0; r < R; ++r)
        next[r] = next[0] + r / G * G * b.d + r % G * (64 / static_cast<int64_t>(sizeof(*next[0])));
    vf sums = tile<K, T, Q>(q, c.ld, x, next, !linear ? 1 : G > 1 ? G : 0, b.d);
    if (b.bias) {
      for (int i = 0; i < Q; ++i)
        for (int r = 0; r < R; ++r) factors[i * R + r] = b.bias[i0 + r < b.count ? i0 + r : b.count - 1];
      sums += load(factors);
    }
    vf score = sums;
    if (b.factor) {  // readable for W values more than there are rows
      for (int i = 0; i < Q; ++i) memcpy(factors + i * R, b.factor + i0, R * sizeof(float));
      score *= load(factors);
    }
    uint32_t mask = passes<K>(score, threshold);
    if (__builtin_expect(mask != 0, 0)) {
      store(raw, sums);
      for (; mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask), r = lane % R;
        if (i0 + r < b.count) offer(s, first + lane / R, b, i0 + r, raw[lane]);
      }
      refresh();
      threshold = load(thresholds);
    }
  }
}

template <Kind K, class T>
void rows_queries(const Queries& c, int64_t first, int64_t count, const Block& b, Finds* s) {
  int64_t i = first;
  const int64_t end = first + count;
  for (; i + 4 <= end; i += 4) rows_group<K, T, 4>(c, i, b, s);
  for (; i + 2 <= end; i += 2) rows_group<K, T, 2>(c, i, b, s);
  for (; i < end; ++i) rows_group<K, T, 1>(c, i, b, s);
}

template <class T>
void rows_of(const Queries& c, int64_t first, int64_t count, const Block& b, Finds* s) {
  switch (kind_of(c.metric)) {
    case Kind::dot: return rows_queries<Kind::dot, T>(c, first, count, b, s);
    case Kind::square: return rows_queries<Kind::square, T>(c, first, count, b, s);
    case Kind::absolute: return rows_queries<Kind::absolute, T>(c, first, count, b, s);
    case Kind::maximum: return rows_queries<Kind::maximum, T>(c, first, count, b, s);
  }
}

// ------------------------------------------------------------------------------------------ factors, conversion
template <class T>
double wide_square(const typename T::type* x, int64_t d) {  // four sums, so that additions need not wait
  double sum[4] = {0, 0, 0, 0};
  for (int64_t j = 0; j < d; ++j) {
    const double v = T::get(x + j);
    sum[j & 3] += v * v;
  }
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <class T>
void factors_of(Metric metric, const Block& b, float* factor, double* wide) {
  if (metric == Metric::poincare) {
    for (int64_t i = 0; i < b.count; ++i) {
      const double square = wide_square<T>(row_at<T>(b, i), b.d);
      wide[i] = square < 1 ? 1 / (1 - square) : static_cast<double>(__builtin_nanf(""));
      factor[i] = static_cast<float>(wide[i]);
    }
    return;
  }
  alignas(64) float squares[W];
  for (int64_t i0 = 0; i0 < b.count; i0 += W) {
    const typename T::type* x[W];
    rows_at<T, W>(b, i0, x);
    vf sum[W];
#pragma GCC unroll 4
    for (int g = 0; g < W; g += 4) {
      vf part[4] = {};
      int64_t j = 0;
      for (; j + W <= b.d; j += W)
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const vf xj = T::load(x[g + r] + j);
          part[r] = fused(part[r], xj, xj);
        }
      if (j < b.d)
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const vf xj = load_part<T>(x[g + r] + j, static_cast<int>(b.d - j));
          part[r] = fused(part[r], xj, xj);
        }
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sum[place(g + r)] = part[r];
    }
    const vf square = reduce_all<Kind::dot>(sum);
    store(squares, square);
    float* out = factor + i0;  // W more are writable
    for (int r = 0; r < W; ++r) out[r] = 1.0f / sqrtf(squares[r]);
    // where fp32 sums could overflow or lose small values
    if (bits_not_le(square, splat(1e37f)) | bits_not_le(splat(1e-24f), square))
      for (int r = 0; r < W && i0 + r < b.count; ++r)
        if (!(squares[r] >= 1e-24f && squares[r] <= 1e37f)) {
          const double exact = wide_square<T>(x[r], b.d);
          out[r] = exact == 0 ? 0.0f : static_cast<float>(1.0 / sqrt(exact));
        }
  }
}

template <class T>
void convert(const Block& b, float* out, int64_t ld) {
  for (int64_t i = 0; i < b.count; ++i, out += ld) {
    const typename T::type* x = row_at<T>(b, i);
    if (b.rows && i + 4 < b.count)
      for (int64_t j = 0; j < b.d; j += 64 / static_cast<int64_t>(sizeof(*x)))
        __builtin_prefetch(row_at<T>(b, i + 4) + j);
    int64_t j = 0;
    for (; j + W <= b.d; j += W) store(out + j, T::load(x + j));
    if (j < b.d) store(out + j, load_part<T>(x + j, static_cast<int>(b.d - j)));
  }
}

}  // namespace

void scan_rows(const Queries& c, int64_t first, int64_t count, const Block& b, DType storage, Finds* s) {
  switch (storage) {
    case DType::f16: return rows_of<F16>(c, first, count, b, s);
    case DType::bf16: return rows_of<BF16>(c, first, count, b, s);
    case DType::i8: return rows_of<I8>(c, first, count, b, s);
    case DType::u8: return rows_of<U8>(c, first, count, b, s);
    default: return rows_of<F32>(c, first, count, b, s);
  }
}

void row_factors(Metric metric, const Block& b, DType storage, float* factor, double* wide) {
  switch (storage) {
    case DType::f16: return factors_of<F16>(metric, b, factor, wide);
    case DType::bf16: return factors_of<BF16>(metric, b, factor, wide);
    case DType::i8: return factors_of<I8>(metric, b, factor, wide);
    case DType::u8: return factors_of<U8>(metric, b, factor, wide);
    default: return factors_of<F32>(metric, b, factor, wide);
  }
}

void convert_rows(const Block& b, DType storage, float* out, int64_t ld) {
  switch (storage) {
    case DType::f16: return convert<F16>(b, out, ld);
    case DType::bf16: return convert<BF16>(b, out, ld);
    case DType::i8: return convert<I8>(b, out, ld);
    case DType::u8: return convert<U8>(b, out, ld);
    default: return convert<F32>(b, out, ld);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
