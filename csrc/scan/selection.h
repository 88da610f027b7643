// Selection inside a scan, at a SIMD level: each thread keeps a TopK for every query of a pass and offers it what
// passed a vector comparison; at the end the threads' selections are merged. The k best by (key, id) are one set
// however the rows were shared out, so the number of threads never changes a result.
#pragma once
#include "common/parallel.h"
#include "common/select.h"
#include "common/simd.h"
#include "scan/metric.h"

namespace lutra {
namespace LUTRA_NS {

struct Selection {   // of one thread
  TopK* best;        // one for each query
  float* threshold;  // of each query, in the units of the score; rounded up to whole vectors, the rest is never passed
  int64_t bad;       // lowest row with a NaN score, or -1
};

template <Metric M>
LUTRA_INLINE uint32_t passes(vf score, vf threshold) {  // NaN passes, so that it is seen
  return M == Metric::l2 ? bits_not_le(threshold, score) : bits_not_le(score, threshold);
}

// Out of line: what passes the comparison is rare.
static inline __attribute__((noinline)) void offer(Selection* s, int64_t query, float score, int64_t row,
                                                   Metric metric) {
  if (score != score) {
    if (s->bad < 0 || row < s->bad) s->bad = row;
    return;
  }
  TopK* best = s->best + query;
  topk_push(best, sign_of(metric) * score, row);
  s->threshold[query] = sign_of(metric) * best->threshold;
}

class Selections {  // of all threads
 public:
  Selections(int threads, int64_t queries, int64_t k, int64_t n, Metric metric)
      : threads_(threads), queries_(queries), lanes_((queries + W - 1) / W * W), k_(k), sign_(sign_of(metric)),
        keys_(threads * queries * topk_capacity(k, n)), ids_(threads * queries * topk_capacity(k, n)),
        best_(threads * queries), thresholds_(threads * lanes_), each_(threads) {
    const int64_t capacity = topk_capacity(k, n);
    for (int t = 0; t < threads; ++t) {
      Selection& s = each_[t];
      s.best = best_.data + t * queries;
      s.threshold = thresholds_.data + t * lanes_;
      s.bad = -1;
      for (int64_t i = queries; i < lanes_; ++i) s.threshold[i] = sign_ * __builtin_inff();
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t at = (t * queries + i) * capacity;
        topk_start(s.best + i, k, capacity, keys_.data + at, ids_.data + at);
        s.threshold[i] = __builtin_nanf("");
      }
    }
  }
  Selection* of_thread(int t) { return &each_[t]; }

  // Results of the pass, whose first query is `first`, into scores and ids (all queries, k).
  void finish(int64_t first, float* scores, int64_t* ids, int64_t* bad) {
    for (int t = 0; t < threads_; ++t)
      if (each_[t].bad >= 0 && (*bad < 0 || each_[t].bad < *bad)) *bad = each_[t].bad;
    Buffer<TopK*> parts(threads_);
    for (int64_t i = 0; i < queries_; ++i) {
      for (int t = 0; t < threads_; ++t) parts[t] = each_[t].best + i;
      topk_finish(parts.data, threads_, k_, sign_, scores + (first + i) * k_, ids + (first + i) * k_);
    }
  }

 private:
  int threads_;
  int64_t queries_, lanes_, k_;
  float sign_;
  Buffer<float> keys_;
  Buffer<int64_t> ids_;
  Buffer<TopK> best_;
  Buffer<float> thresholds_;
  Buffer<Selection> each_;
};

// Queries of one pass: as many as keep the selections below 16 MB, in whole multiples of `unit`.
static inline int64_t pass_queries(int64_t k, int64_t n, int threads, int64_t unit) {
  const int64_t fit = (16 << 20) / (12 * topk_capacity(k, n) * threads) / unit * unit;
  return fit < unit ? unit : fit;
}

// fn(thread, begin, end) over blocks of rows, each thread taking its blocks in increasing order.
template <class Fn>
static inline void scan_blocks(int64_t n, int64_t block, int threads, const Fn& fn) {
  const int64_t blocks = (n + block - 1) / block;
  if (threads <= 1) {
    for (int64_t b = 0; b < blocks; ++b) fn(0, b * block, b * block + block < n ? b * block + block : n);
    return;
  }
  parallel_slots(blocks, threads,
                 [&](int t, int64_t b) { fn(t, b * block, b * block + block < n ? b * block + block : n); });
}

}  // namespace LUTRA_NS
}  // namespace lutra
