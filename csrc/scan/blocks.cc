// The queries of a pass are inverted: for each block that some query has, the queries that have it. A panel's sums of
// all queries (1 KB each) stay in the L1 or L2 while its blocks come from memory one after another, each read once: a
// block is cut into slices of 16 dimensions, and a tile of up to 6 queries by 64 vectors adds a slice to its sums in
// registers. A single query takes all 256 vectors of a slice at once, which then streams. The slice that comes a little
// later is fetched meanwhile: the processor's own prefetcher cannot know which blocks are passed over. Narrow elements
// are widened once a slice where more than two queries share it.
#include "scan/blocks.h"

#include "scan/panels.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kLanes = 256;
constexpr int64_t kDepth = 16;        // dimensions of a slice
constexpr int64_t kAhead = 16 << 10;  // bytes that are fetched ahead
constexpr int64_t kQueries = 64;      // of a pass: their sums stay in the L2
#if defined(LUTRA_LEVEL_v4)
constexpr int kWide = 6;                       // queries of a tile
constexpr int kOne = 16, kTwo = 8, kMany = 4;  // vectors of a tile's rows, by its queries
#else
constexpr int kWide = 4;
constexpr int kOne = 8, kTwo = 4, kMany = 2;
#endif

struct Entry {  // a query's part of a block
  const float* values;
  int64_t query;  // of the pass
};

struct Slice {
  int64_t offset;       // elements from the beginning of a panel
  int64_t first, last;  // entries of its block
  int64_t from, depth;  // dimensions of the block
};

// The pass's queries by block.
class Plan {
 public:
  Plan(const BlockQueries& q, int64_t q0, int64_t queries)
      : entries(q.ptr[q0 + queries] - q.ptr[q0]), begin_(q.num_blocks + 1) {
    const int64_t e0 = q.ptr[q0], e1 = q.ptr[q0 + queries];
    for (int64_t b = 0; b <= q.num_blocks; ++b) begin_[b] = 0;
    for (int64_t e = e0; e < e1; ++e) ++begin_[q.blocks[e] + 1];
    int64_t used = 0;
    for (int64_t b = 0; b < q.num_blocks; ++b) {
      used += begin_[b + 1] != 0;
      begin_[b + 1] += begin_[b];
    }
    slices = static_cast<Slice*>(malloc(sizeof(Slice) * (used * ((q.width + kDepth - 1) / kDepth) + 1)));
    if (!slices) abort();
    for (int64_t b = 0; b < q.num_blocks; ++b) {
      if (begin_[b] == begin_[b + 1]) continue;
      for (int64_t w = 0; w < q.width; w += kDepth)
        slices[count++] = {(b * q.width + w) * kLanes, begin_[b], begin_[b + 1], w,
                           q.width - w < kDepth ? q.width - w : kDepth};
    }
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t e = q.ptr[q0 + i]; e < q.ptr[q0 + i + 1]; ++e)
        entries[begin_[q.blocks[e]]++] = {q.values + e * q.width, i};
  }
  ~Plan() { free(slices); }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  Buffer<Entry> entries;
  Slice* slices;
  int64_t count = 0;

 private:
  Buffer<int64_t> begin_;
};

// Adds a slice to the sums of Q queries, V vectors of rows at a time. Ahead: what lies at the same places of `next` is
// fetched.
template <class T, int Q, int V, bool Ahead>
LUTRA_INLINE void tile(const typename T::type* x, const typename T::type* next, const Slice& s, const Entry* entries,
                       float* sums) {
  const float* values[Q];
  float* to[Q];
  for (int q = 0; q < Q; ++q) {
    values[q] = entries[q].values + s.from;
    to[q] = sums + entries[q].query * kLanes;
  }
  for (int64_t lane = 0; lane < kLanes; lane += V * W) {
    vf sum[Q][V];
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < V; ++v) sum[q][v] = load(to[q] + lane + v * W);
    for (int64_t w = 0; w < s.depth; ++w) {
      const typename T::type* row = x + w * kLanes + lane;
      if (Ahead)
        for (int v = 0; v < V; ++v)
          if (v * W * sizeof(*row) % 64 == 0) __builtin_prefetch(next + w * kLanes + lane + v * W, 0, 2);
      if (Q == 1) {  // no vector is needed twice: none is kept
        const vf value = splat(values[0][w]);
        for (int v = 0; v < V; ++v) sum[0][v] += T::load(row + v * W) * value;
        continue;
      }
      vf part[V];
      for (int v = 0; v < V; ++v) part[v] = T::load(row + v * W);
      for (int q = 0; q < Q; ++q) {
        const vf value = splat(values[q][w]);
        for (int v = 0; v < V; ++v) sum[q][v] += part[v] * value;
      }
    }
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < V; ++v) store(to[q] + lane + v * W, sum[q][v]);
  }
}

template <bool Ahead>
void some_queries(int64_t count, const float* x, const float* next, const Slice& s, const Entry* entries, float* sums) {
  switch (count) {
    case 1: return tile<F32, 1, kOne, Ahead>(x, next, s, entries, sums);
    case 2: return tile<F32, 2, kTwo, Ahead>(x, next, s, entries, sums);
    case 3: return tile<F32, 3, kMany, Ahead>(x, next, s, entries, sums);
    case 4: return tile<F32, 4, kMany, Ahead>(x, next, s, entries, sums);
#if defined(LUTRA_LEVEL_v4)
    case 5: return tile<F32, 5, kMany, Ahead>(x, next, s, entries, sums);
    default: return tile<F32, 6, kMany, Ahead>(x, next, s, entries, sums);
#endif
  }
}

template <class T>
void widen(const typename T::type* x, const typename T::type* next, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; j += 64 / static_cast<int64_t>(sizeof(*x))) __builtin_prefetch(next + i + j, 0, 2);
    for (int64_t j = 0; j < kLanes; j += W) store(out + i + j, T::load(x + i + j));
  }
}

// One slice for all queries that have its block.
template <class T>
void add_slice(const typename T::type* x, const typename T::type* next, const Slice& s, const Entry* entries,
               float* wide, float* sums) {
  const int64_t count = s.last - s.first;
  entries += s.first;
  if (count == 1) return tile<T, 1, kOne, true>(x, next, s, entries, sums);
  if (count == 2) return tile<T, 2, kTwo, true>(x, next, s, entries, sums);
  const float* rows;
  if constexpr (sizeof(*x) == 4) {
    rows = x;
  } else {
    widen<T>(x, next, s.depth * kLanes, wide);
    rows = wide;
  }
  // Tiles of nearly one size: 7 queries are 4 and 3.
  const int64_t tiles = (count + kWide - 1) / kWide;
  for (int64_t t = 0, at = 0; t < tiles; ++t) {
    const int64_t here = (count - at + tiles - t - 1) / (tiles - t);
    if (sizeof(*x) == 4 && t == 0)
      some_queries<true>(here, rows, reinterpret_cast<const float*>(next), s, entries + at, sums);
    else
      some_queries<false>(here, rows, rows, s, entries + at, sums);
    at += here;
  }
}

template <class T>
void pass(const BlocksArgs& a, int64_t q0, int64_t queries, int threads) {
  typedef typename T::type Element;
  const Plan plan(a.q, q0, queries);
  Selections selections(threads, queries, a.k, a.n, Metric::ip);
  const int64_t wide = sizeof(Element) == 4 ? 0 : kDepth * kLanes, each = queries * kLanes + wide;
  Buffer<float> memory(threads * each);
  const int64_t depth = a.q.width < kDepth ? a.q.width : kDepth;
  int64_t ahead = kAhead / (depth * kLanes * static_cast<int64_t>(sizeof(Element)));  // slices
  ahead = ahead < 1 ? 1 : ahead > 32 ? 32 : ahead;
  scan_blocks(a.n, kLanes, threads, [&](int t, int64_t begin, int64_t end) {
    if (!any_kept(a.keep, begin, end - begin)) return;
    float *sums = memory.data + t * each, *widened = sums + queries * kLanes;
    memset(sums, 0, sizeof(float) * queries * kLanes);
    const auto* panel = reinterpret_cast<const Element*>(a.panels[begin / kLanes]);
    for (int64_t i = 0; i < plan.count; ++i) {
      const Slice& s = plan.slices[i];
      const Slice& next = plan.slices[i + ahead < plan.count ? i + ahead : plan.count - 1];
      add_slice<T>(panel + s.offset, panel + next.offset, s, plan.entries.data, widened, sums);
    }
    for (int64_t i = 0; i < queries; ++i) {
      float* own = sums + i * kLanes;
      if (a.scale)
        for (int64_t r = 0; r < end - begin; ++r) own[r] *= a.scale[begin + r];
      offer_lanes(selections.of_thread(t), i, own, begin, end - begin, a.keep);
    }
  });
  selections.finish(q0, a.scores, a.ids, a.bad);
}

template <class T>
void search(const BlocksArgs& a) {
  const double products = static_cast<double>(a.q.ptr[a.q.nq]) * a.q.width * a.n;
  const int threads = products * 0.02 < 40e3 ? 1 : num_threads();
  int64_t queries = pass_queries(a.k, a.n, threads, 1);
  queries = queries < kQueries ? queries : kQueries;
  for (int64_t q0 = 0; q0 < a.q.nq; q0 += queries)
    pass<T>(a, q0, a.q.nq - q0 < queries ? a.q.nq - q0 : queries, threads);
}

}  // namespace

void blocks(const BlocksArgs& a) {
  switch (a.dtype) {
    case DType::f16: return search<F16>(a);
    case DType::bf16: return search<BF16>(a);
    case DType::i8: return search<I8>(a);
    default: return search<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
