// Two ways, chosen by the number of queries.
//
// Few queries: one table (m, 256) for a query, several rows at a time so that their chains of additions overlap;
//   about one look-up a cycle.
// More queries: the tables of W queries are interleaved, table[j][c][W], and one vector load and one addition serve
//   W look-ups. Sub-quantizers are taken in groups whose tables fit the L2, with the sums of a block of rows kept in
//   between.
//
// Tables have 256 entries a sub-quantizer; those from ksub on are NaN, so that a code that is too large shows up as
// a NaN score, which the selection reports. Every sum runs over j in increasing order, in either way.
#include "scan/pq.h"

#include "scan/selection.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kEntries = 256;
constexpr int kGroup = 16;                  // rows whose scores are compared at once (few queries)
constexpr int64_t kTableBytes = 320 << 10;  // of a group of sub-quantizers' interleaved tables
constexpr int64_t kRowBlock = 512;          // rows whose sums are kept between groups

// ------------------------------------------------------------------------------------------ few queries
template <Metric M>
void single_table(const PqArgs& a, const float* q, float* table) {
  for (int64_t j = 0; j < a.m; ++j) {
    float* t = table + j * kEntries;
    const float *book = a.codebooks + j * a.ksub * a.dsub, *qj = q + j * a.dsub;
    for (int64_t c = 0; c < a.ksub; ++c) {
      float sum = 0;
      for (int64_t i = 0; i < a.dsub; ++i) {
        const float x = book[c * a.dsub + i], difference = qj[i] - x;
        sum += M == Metric::l2 ? difference * difference : qj[i] * x;
      }
      t[c] = sum;
    }
    for (int64_t c = a.ksub; c < kEntries; ++c) t[c] = __builtin_nanf("");
  }
}

template <int R>
LUTRA_INLINE void sum_codes(const float* table, const uint8_t* codes, int64_t m, float* out) {
  float sum[R] = {};
  int64_t j = 0;
  for (; j + 8 <= m; j += 8) {
    uint64_t word[R];  // eight codes at a time: one load instead of eight
    for (int r = 0; r < R; ++r) memcpy(&word[r], codes + r * m + j, 8);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      for (int r = 0; r < R; ++r) {
        sum[r] += table[(j + i) * kEntries + (word[r] & 255)];
        word[r] >>= 8;
      }
  }
  for (; j < m; ++j)
    for (int r = 0; r < R; ++r) sum[r] += table[j * kEntries + codes[r * m + j]];
  for (int r = 0; r < R; ++r) out[r] = sum[r];
}

template <Metric M>
void single_rows(const PqArgs& a, const float* table, int64_t query, int64_t begin, int64_t end, Selection* s) {
  alignas(64) float score[kGroup];
  for (int64_t i0 = begin; i0 < end; i0 += kGroup) {
    const int rows = static_cast<int>(end - i0 < kGroup ? end - i0 : kGroup);
    const uint8_t* codes = a.codes + i0 * a.m;
    int r = 0;
    for (; r + 4 <= rows; r += 4) sum_codes<4>(table, codes + r * a.m, a.m, score + r);
    for (; r < rows; ++r) sum_codes<1>(table, codes + r * a.m, a.m, score + r);
    for (; r < kGroup; ++r) score[r] = 0;
    const vf t = splat(s->threshold[query]);
    for (int g = 0; g < kGroup; g += W)
      for (uint32_t m = passes<M>(load(score + g), t); m; m &= m - 1) {
        const int k = g + __builtin_ctz(m);
        if (k < rows) offer(s, query, score[k], i0 + k, M);
      }
  }
}

// ------------------------------------------------------------------------------------------ W queries in lanes
template <Metric M>
void lane_tables(const PqArgs& a, const float* lanes, float* table) {  // lanes: (d, W)
  for (int64_t j = 0; j < a.m; ++j) {
    float* t = table + j * kEntries * W;
    const float* book = a.codebooks + j * a.ksub * a.dsub;
    for (int64_t c = 0; c < a.ksub; ++c) {
      vf sum = {};
      for (int64_t i = 0; i < a.dsub; ++i)
        sum = accumulate<M>(sum, load(lanes + (j * a.dsub + i) * W), splat(book[c * a.dsub + i]));
      store(t + c * W, sum);
    }
    for (int64_t c = a.ksub; c < kEntries; ++c) store(t + c * W, splat(__builtin_nanf("")));
  }
}

// Sums over sub-quantizers [j0, j1) of R rows, going on from what `sums` holds.
template <int R>
LUTRA_INLINE void lane_sums(const float* table, const uint8_t* codes, int64_t m, int64_t j0, int64_t j1, float* sums) {
  vf sum[R];
  for (int r = 0; r < R; ++r) sum[r] = j0 ? load(sums + r * W) : (vf){};
  for (int64_t j = j0; j < j1; ++j) {
    const float* t = table + j * kEntries * W;
    for (int r = 0; r < R; ++r) sum[r] += load(t + codes[r * m + j] * static_cast<int64_t>(W));
  }
  for (int r = 0; r < R; ++r) store(sums + r * W, sum[r]);
}

template <Metric M>
void lane_rows(const PqArgs& a, const float* table, int64_t first, int64_t queries, int64_t begin, int64_t end,
               float* sums, Selection* s) {
  const int64_t group = kTableBytes / (kEntries * W * 4);
  for (int64_t i0 = begin; i0 < end; i0 += kRowBlock) {
    const int64_t rows = end - i0 < kRowBlock ? end - i0 : kRowBlock;
    const uint8_t* codes = a.codes + i0 * a.m;
    for (int64_t j0 = 0; j0 < a.m; j0 += group) {
      const int64_t j1 = j0 + group < a.m ? j0 + group : a.m;
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) lane_sums<4>(table, codes + r * a.m, a.m, j0, j1, sums + r * W);
      for (; r < rows; ++r) lane_sums<1>(table, codes + r * a.m, a.m, j0, j1, sums + r * W);
    }
    for (int64_t r = 0; r < rows; ++r)
      for (uint32_t m = passes<M>(load(sums + r * W), load(s->threshold + first)); m; m &= m - 1) {
        const int lane = __builtin_ctz(m);
        if (first + lane < queries) offer(s, first + lane, sums[r * W + lane], i0 + r, M);
      }
  }
}

// ------------------------------------------------------------------------------------------ a pass over the codes
template <Metric M>
void pass(const PqArgs& a, int64_t first, int64_t queries, int threads) {
  const bool single = queries == 1;
  const int64_t vectors = (queries + W - 1) / W, d = a.m * a.dsub;
  const int64_t table_size = a.m * kEntries * (single ? 1 : W);
  Selections selections(threads, queries, a.k, a.n, M);
  Buffer<float> tables(table_size * (single ? queries : vectors));
  Buffer<float> sums(threads * kRowBlock * W);
  if (single) {
    for (int64_t i = 0; i < queries; ++i) single_table<M>(a, a.q + (first + i) * a.ldq, tables.data + i * table_size);
  } else {
    parallel_for(vectors, vectors * table_size * a.dsub * 0.1, [&](int64_t v) {
      Buffer<float> lanes(d * W);
      for (int64_t i = 0; i < W; ++i) {
        const int64_t query = v * W + i;
        for (int64_t j = 0; j < d; ++j) lanes[j * W + i] = query < queries ? a.q[(first + query) * a.ldq + j] : 0.0f;
      }
      lane_tables<M>(a, lanes.data, tables.data + v * table_size);
    });
  }
  // Without `kRowBlock` rows a block, the tables of the next queries would be read too often.
  const int64_t block = single ? 8192 : 16 * kRowBlock;
  scan_blocks(a.n, block, threads, [&](int t, int64_t begin, int64_t end) {
    Selection* s = selections.of_thread(t);
    if (single)
      for (int64_t i = 0; i < queries; ++i) single_rows<M>(a, tables.data + i * table_size, i, begin, end, s);
    else
      for (int64_t v = 0; v < vectors; ++v)
        lane_rows<M>(a, tables.data + v * table_size, v * W, queries, begin, end, sums.data + t * kRowBlock * W, s);
  });
  selections.finish(first, a.scores, a.ids, a.bad);
}

template <Metric M>
void search(const PqArgs& a) {
  const double cost = static_cast<double>(a.nq) * (a.n * (a.m * 0.2 + 1) + a.m * a.ksub * a.dsub * 0.1);
  const int threads = cost < 60e3 ? 1 : num_threads();
  int64_t queries = pass_queries(a.k, a.n, threads, W);
  const int64_t by_tables = (64 << 20) / (a.m * kEntries * W * 4 + 1) * W;  // tables of a pass below 64 MB
  if (by_tables >= W && queries > by_tables) queries = by_tables;
  for (int64_t first = 0; first < a.nq; first += queries)
    pass<M>(a, first, a.nq - first < queries ? a.nq - first : queries, threads);
}

}  // namespace

void pq(const PqArgs& a) {
  if (a.metric == Metric::l2)
    search<Metric::l2>(a);
  else
    search<Metric::ip>(a);
}

}  // namespace LUTRA_NS
}  // namespace lutra
