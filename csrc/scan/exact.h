// What the exact scans (knn, range, rescore) share, at a SIMD level: how a score is summed, and how it is offered.
//
// A score has one order of summation, whoever computes it: lane w of a vector sums the dimensions j = w, w + W, ...,
// and the lanes are added in halves (reduce_add in common/simd.h). That is what a row along d gives ("rows",
// exact_rows.cc). Many queries are scanned in another order ("lanes", exact_lanes.cc), whose sums only decide, with a
// margin that covers the rounding of both orders, which pairs of a query and a row are worth being scored: so results
// have the same bits in a batch of one and of a thousand, and from all three functions.
#pragma once
#include "common/parallel.h"
#include "common/select.h"
#include "common/simd.h"
#include "scan/metric.h"
#include "scan/range.h"

#include <math.h>
#include <stdlib.h>

namespace lutra {
namespace LUTRA_NS {

// What is summed; the metrics differ further only in a factor of the row and in the last step.
enum class Kind : int { dot = 0, square = 1, absolute = 2, maximum = 3 };

LUTRA_INLINE Kind kind_of(Metric m) {
  switch (m) {
    case Metric::ip:
    case Metric::cosine: return Kind::dot;
    case Metric::l1: return Kind::absolute;
    case Metric::linf: return Kind::maximum;
    default: return Kind::square;
  }
}

template <Kind K>
LUTRA_INLINE vf join(vf a, vf b) {
  // As integers: the order of floats that are not negative, and NaN is above all of them, so that it is not lost.
  if (K == Kind::maximum) return (vf)((vi)a > (vi)b ? (vi)a : (vi)b);
  return a + b;
}

// sum + a * b, rounded once where the level has FMA. Written out: compilers contract an expression here and not there,
// and then a score would not have one order.
LUTRA_INLINE vf fused(vf sum, vf a, vf b) {
#if defined(LUTRA_LEVEL_v4)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(LUTRA_LEVEL_v3)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < W; ++i) sum[i] = __builtin_fmaf(a[i], b[i], sum[i]);
  return sum;
#else
  return sum + a * b;  // x86-64-v2 has no FMA
#endif
}

template <Kind K>
LUTRA_INLINE vf step(vf sum, vf q, vf x) {
  if (K == Kind::dot) return fused(sum, q, x);
  const vf difference = q - x;
  if (K == Kind::square) return fused(sum, difference, difference);
  return join<K>(sum, (vf)((vi)difference & 0x7fffffff));
}

template <Kind K>
LUTRA_INLINE uint32_t passes(vf score, vf threshold) {  // NaN passes, so that it is seen
  return K == Kind::dot ? bits_not_le(score, threshold) : bits_not_le(threshold, score);
}

// Rows to be scanned: `rows` of them by number, or `count` from `first` on.
struct Block {
  const void* x;           // of the element type that the function says
  int64_t ldx, d;          // in elements
  const int64_t* rows;     // where each is in x, or null: one after another from x on
  const int64_t* numbers;  // what each is called, or null: first, first + 1, ...
  int64_t first, count;
  const float* factor;  // of each row of the block, or null: 1 / |x| (cosine), 1 / (1 - |x|^2) (poincare); and W more
  const double* wide;   // the same, for poincare
  const float* bias = nullptr;  // of each row of the block, or null: added to its sum (ip)
  int64_t number(int64_t i) const { return numbers ? numbers[i] : first + i; }
};

struct Hits {  // what one thread of a range search has found; grows
  RangeHit* data;
  int64_t count, capacity;
};

// The queries of one pass, prepared.
struct Queries {
  Metric metric;
  int64_t first, count, d;
  int64_t ld;           // d rounded up to whole vectors, zeros behind d
  const float* q;       // (count, ld), aligned; normalised for cosine
  const float* norm;    // ip: not below |q|
  const double* wide;   // poincare: 1 / (1 - |q|^2), NaN outside the ball
  const uint8_t* keep;  // rows that may be offered, or null: all
};

// What one thread has found. Either the best (knn, rescore) or all within a radius (range).
struct Finds {
  const Queries* queries;
  TopK* best;        // of each query (knn, rescore), or null
  Hits* hits;        // or null
  float radius;      // with hits
  float* pass;       // of each query: a sum that does not pass it cannot be found; NaN lets all pass
  int64_t bad;       // lowest row with a NaN score, or -1
  bool started;      // whether `pass` is set
  bool other_order;  // the sums that meet `pass` are of another order than a score
  float bound;       // ip in another order: not below |x| of any row of the block
  float shift;       // and not below |bias|
};

// arcosh(1 + y) for y >= 0.
LUTRA_INLINE float arcosh1p(double y) { return static_cast<float>(log1p(y + sqrt(y * (y + 2)))); }

// The value of `pass` for a score (a threshold or a radius): sums that do not pass it have scores that are not better.
LUTRA_INLINE float pass_for(const Finds* s, int64_t query, float score) {
  const Queries& c = *s->queries;
  // Each order of summation errs by at most d roundings of 2^-24 of the sum of the terms' magnitudes.
  const float c_d = s->other_order ? (1.2f * static_cast<float>(c.d) + 24) * 6e-8f : 0.0f;
  const float tiny = s->other_order ? static_cast<float>(c.d) * 3e-38f : 0.0f;  // of terms that are subnormal
  float pass = score;
  switch (c.metric) {
    case Metric::ip:
      pass = score - (s->other_order ? c_d * c.norm[query] * s->bound + 3e-7f * s->shift + tiny : 0.0f);
      break;
    case Metric::cosine: pass = score - 1.1f * c_d; break;
    case Metric::l1:
    case Metric::l2: pass = score + score * 2 * c_d + tiny; break;
    case Metric::linf: break;
    case Metric::poincare: {  // back to |q - x|^2 / (1 - |x|^2); the distance itself was rounded too
      const double half = sinh(0.5 * score), key = half * half / c.wide[query];
      pass = static_cast<float>(key * (1 + 2 * c_d + (score + 4) * 1e-6) + 1e-37);
    }
  }
  // Where the margin says nothing, all pass: very many dimensions, or values whose sums may overflow.
  const bool lost = !(c_d < 0.1f) || (score - score == 0 && pass - pass != 0) ||
                    (s->other_order && c.metric == Metric::ip && !(c.norm[query] * s->bound < 1e37f));
  return lost ? __builtin_nanf("") : pass;
}

// Row i of the block with its sum in the order of a score. Out of line: what passes the comparison is rare.
static inline __attribute__((noinline)) void offer(Finds* s, int64_t query, const Block& b, int64_t i, float sum) {
  const Queries& c = *s->queries;
  const int64_t row = b.number(i);
  if (c.keep && !(c.keep[row >> 3] >> (row & 7) & 1)) return;
  float score = sum;
  if (c.metric == Metric::cosine) score *= b.factor[i];
  if (c.metric == Metric::poincare) score = arcosh1p(2 * c.wide[query] * b.wide[i] * static_cast<double>(sum));
  if (score != score) {
    if (s->bad < 0 || row < s->bad) s->bad = row;
    return;
  }
  const float sign = sign_of(c.metric);
  if (s->hits) {
    if (sign * score < sign * s->radius) return;
    Hits* h = s->hits;
    if (h->count == h->capacity) {
      h->capacity = h->capacity < 512 ? 1024 : 2 * h->capacity;
      h->data = static_cast<RangeHit*>(realloc(h->data, sizeof(RangeHit) * h->capacity));
      if (!h->data) abort();
    }
    h->data[h->count++] = RangeHit{row, c.first + query, score};
    return;
  }
  TopK* best = s->best + query;
  topk_push(best, sign * score, row);
  if (best->threshold == best->threshold) s->pass[query] = pass_for(s, query, sign * best->threshold);
}

// ---- exact_rows.cc: few queries with rows of any element type, as the memory delivers them
void scan_rows(const Queries& c, int64_t first, int64_t count, const Block& b, DType storage, Finds* s);
// `factor` has room for W values more than there are rows.
void row_factors(Metric metric, const Block& b, DType storage, float* factor, double* wide);
// Rows as float32 (count, ld), zeros behind d.
void convert_rows(const Block& b, DType storage, float* out, int64_t ld);

// ---- exact_lanes.cc: many queries with float32 rows
constexpr int64_t kLaneVectors = sizeof(vf) == 64 ? 3 : 2;  // vectors of queries in a panel
void pack_queries(const Queries& c, int64_t count, float* packed);
void scan_lanes(const Queries& c, int64_t count, const float* packed, const Block& b, bool stream, Finds* s);
float norm_bound(const Block& b);  // not below |x| of any row; infinite where one overflows

// ---- exact_scan.cc
struct ExactCall {
  const float* q;
  const void* x;
  int64_t nq, n, d, ldq, ldx;
  Metric metric;
  DType storage;
  const uint8_t* keep;
  const float* bias = nullptr;  // KnnArgs
};
int scan_threads(const ExactCall& a);

// The queries [first, first + count) with zeros behind d, and what their metric needs besides.
class Prepared {
 public:
  Prepared(const ExactCall& a, int64_t first, int64_t count);
  Queries queries;

 private:
  Buffer<float> q_, norm_;
  Buffer<double> wide_;
};

// One pass: all rows with queries [first, first + count). `finds`, of each thread, have best or hits, radius, and room
// for `pass` of count values, rounded up to whole vectors; the rest is set here.
void exact_pass(const ExactCall& a, int64_t first, int64_t count, int threads, Finds* finds);

}  // namespace LUTRA_NS
}  // namespace lutra
