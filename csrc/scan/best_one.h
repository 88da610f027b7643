// knn for k = 1 and many queries (assignment to centroids: k-means, PQ codes, IVF lists), at a SIMD level.
//
// Queries lie in the lanes, as in knn.cc, but nothing is selected: the best score and row of each lane are kept in
// vectors and replaced under a mask, without a branch. That matters where d is small (a PQ sub-space has 4 to 16
// dimensions): the scores of a tile cost d * 2 operations a lane, and offering the many that pass an early
// threshold would cost more. Threads share the queries, not the rows, so there is nothing to merge.
// Rows are taken in increasing order and replace a best only when they are better. Scores are sums along d one after
// another, not in the order of exact.h: they may differ from the general way's in their last bits, and so may the
// choice between rows that are equally near but for those. So only address.nearest asks for this way.
#pragma once
#include "common/parallel.h"
#include "common/simd.h"
#include "scan/knn.h"
#include "scan/metric.h"

namespace lutra {
namespace LUTRA_NS {
namespace best_one {

#if defined(LUTRA_LEVEL_v4)
constexpr int kVectors = 3, kRows = 8;
#else
constexpr int kVectors = 2, kRows = 6;
#endif
constexpr int kLanes = kVectors * W;
constexpr int64_t kBytes = 128 << 10;  // of rows, and of packed queries: both stay in the L2

struct Best {  // of the queries of a panel
  float score[kLanes];
  int32_t row[kLanes];
};

// Where `score` is better than `best`, or `best` is NaN (nothing yet), it and its row take the place.
template <Metric M>
LUTRA_INLINE void replace(vf* best, vi* row, vf score, vi number) {
#if defined(LUTRA_LEVEL_v4)
  const __mmask16 better = M == Metric::l2 ? _mm512_cmp_ps_mask((__m512)*best, (__m512)score, _CMP_NLE_UQ)
                                           : _mm512_cmp_ps_mask((__m512)score, (__m512)*best, _CMP_NLE_UQ);
  *best = (vf)_mm512_mask_mov_ps((__m512)*best, better, (__m512)score);
  *row = (vi)_mm512_mask_mov_epi32((__m512i)*row, better, (__m512i)number);
#else
  const vi better = M == Metric::l2 ? ~(vi)(*best <= score) : ~(vi)(score <= *best);
  *best = (vf)(((vi)score & better) | ((vi)*best & ~better));
  *row = (number & better) | (*row & ~better);
#endif
}

// R rows from number `first` on with a panel (d, kLanes). The sum of the scores: NaN where one is.
template <Metric M, int R>
LUTRA_INLINE vf tile(const float* panel, const float* x, int64_t ldx, int64_t d, int32_t first, Best* best) {
  vf sum[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = (vf){};
  for (int64_t j = 0; j < d; ++j) {
    vf q[kVectors];
    for (int v = 0; v < kVectors; ++v) q[v] = load(panel + (j * kVectors + v) * W);
    for (int r = 0; r < R; ++r) {
      const vf xj = splat(x[r * ldx + j]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = accumulate<M>(sum[r][v], q[v], xj);
    }
  }
  vf all = {};
  for (int v = 0; v < kVectors; ++v) {
    vf score = load(best->score + v * W);
    vi row = *reinterpret_cast<const vi_unaligned*>(best->row + v * W);
    for (int r = 0; r < R; ++r) {
      replace<M>(&score, &row, sum[r][v], (vi){} + (first + r));
      all += sum[r][v];
    }
    store(best->score + v * W, score);
    *reinterpret_cast<vi_unaligned*>(best->row + v * W) = row;
  }
  return all;
}

template <Metric M>
bool group(const KnnArgs& a, int64_t begin, int64_t end) {  // queries [begin, end)
  const int64_t panels = (end - begin + kLanes - 1) / kLanes;
  Buffer<float> packed(panels * kLanes * a.d);
  Buffer<Best> best(panels);
  for (int64_t p = 0; p < panels; ++p) {
    float* panel = packed.data + p * kLanes * a.d;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t query = begin + p * kLanes + i;
      const float* q = a.q + (query < end ? query : end - 1) * a.ldq;  // the last again fills the panel
      for (int64_t j = 0; j < a.d; ++j) panel[j * kLanes + i] = q[j];
      best[p].score[i] = __builtin_nanf("");
      best[p].row[i] = 0;
    }
  }
  int64_t block = kBytes / (4 * (a.d > 0 ? a.d : 1)) / kRows * kRows;
  if (block < kRows) block = kRows;
  vf all = {};
  for (int64_t from = 0; from < a.n; from += block) {
    const int64_t to = from + block < a.n ? from + block : a.n;
    for (int64_t p = 0; p < panels; ++p) {
      const float* panel = packed.data + p * kLanes * a.d;
      int64_t i = from;
      for (; i + kRows <= to; i += kRows)
        all += tile<M, kRows>(panel, a.x + i * a.ldx, a.ldx, a.d, static_cast<int32_t>(i), &best[p]);
      for (; i < to; ++i) all += tile<M, 1>(panel, a.x + i * a.ldx, a.ldx, a.d, static_cast<int32_t>(i), &best[p]);
    }
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t p = (i - begin) / kLanes, lane = (i - begin) % kLanes;
    a.scores[i] = best[p].score[lane];
    a.ids[i] = best[p].row[lane];
  }
  const float total = reduce_add(all);
  return total == total;
}

// Whether this way is meant for a call.
static inline bool suits(const KnnArgs& a) {
  return a.k == 1 && a.nq >= 4 * kLanes && a.n >= 1 && a.n < (int64_t{1} << 31) && a.storage == DType::f32 && !a.keep &&
         (a.metric == Metric::ip || a.metric == Metric::l2);
}

// False: a score may be NaN (the sum of all is, which infinite scores can cause too), and the results are
// unspecified; the general way finds out.
template <Metric M>
bool search(const KnnArgs& a) {
  const int64_t panels = (a.nq + kLanes - 1) / kLanes;
  int64_t each = kBytes / (4 * kLanes * (a.d > 0 ? a.d : 1));  // panels of a group
  if (each < 1) each = 1;
  const int64_t shares = (panels + 15) / 16;  // enough groups for the threads to end together
  if (each > shares) each = shares;
  const int64_t groups = (panels + each - 1) / each;
  Buffer<uint8_t> good(groups);
  const double nanoseconds = static_cast<double>(a.nq) * a.n * (a.d * 0.02 + 0.1);
  parallel_for(groups, nanoseconds, [&](int64_t g) {
    const int64_t begin = g * each * kLanes, end = begin + each * kLanes;
    good[g] = group<M>(a, begin, end < a.nq ? end : a.nq);
  });
  for (int64_t g = 0; g < groups; ++g)
    if (!good[g]) return false;
  return true;
}

}  // namespace best_one
}  // namespace LUTRA_NS
}  // namespace lutra
