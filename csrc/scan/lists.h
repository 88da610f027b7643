// What the scans of inverted lists share, at a SIMD level: the convention of lists, the order of the work, the offer.
//
// Lists lie in one arena of rows. List l takes rows list_begin[l] (a multiple of 16) to list_begin[l] + list_rows[l];
// the rows up to the next multiple of 16 exist and are never reported. positions[row] is what a row is reported as,
// in [0, npositions); -1: the row is empty. probes (nq, nprobe) are the lists of each query, -1: none. A position
// whose bit in `keep` is 0 (packed, little bit order; null: all are 1) is not reported.
//
// The work is done list by list, so that the queries of a batch that probe a list share each load of its rows. A
// query's k best are taken from the same set of (score, position) whatever the order, so neither the batch nor the
// number of threads changes a result; ties go to the lower position.
#pragma once
#include "scan/lists_args.h"
#include "scan/selection.h"

namespace lutra {
namespace LUTRA_NS {

constexpr int64_t kListBlock = 16;
constexpr int64_t kItemRows = 1024;  // of one piece of work

// One bit for each lane whose score is at least as good as the threshold, or NaN (then it must be seen; and a
// threshold of NaN lets all pass). Equal scores pass, for their positions decide.
template <Metric M>
LUTRA_INLINE uint32_t passes_equal(vf score, vf threshold) {
#if defined(LUTRA_LEVEL_v4)
  return M == Metric::l2 ? _mm512_cmp_ps_mask((__m512)score, (__m512)threshold, _CMP_NGT_UQ)
                         : _mm512_cmp_ps_mask((__m512)score, (__m512)threshold, _CMP_NLT_UQ);
#elif defined(LUTRA_LEVEL_v3)
  return static_cast<uint32_t>(_mm256_movemask_ps(M == Metric::l2
                                                      ? _mm256_cmp_ps((__m256)score, (__m256)threshold, _CMP_NGT_UQ)
                                                      : _mm256_cmp_ps((__m256)score, (__m256)threshold, _CMP_NLT_UQ)));
#else
  return mask_bits(M == Metric::l2 ? ~(vi)(score > threshold) : ~(vi)(score < threshold));
#endif
}

static inline __attribute__((noinline)) void offer_row(const ListsArgs& a, Selection* s, int64_t query, float score,
                                                       int64_t row, Metric metric) {
  const int32_t position = a.positions ? a.positions[row] : static_cast<int32_t>(row);
  if (position < 0) return;
  if (score != score || position >= a.npositions) {
    if (s->bad < 0 || position < s->bad) s->bad = position;
    return;
  }
  if (a.keep && !(a.keep[position >> 3] >> (position & 7) & 1)) return;
  TopK* best = s->best + query;
  topk_offer(best, sign_of(metric) * score, position);
  s->threshold[query] = sign_of(metric) * best->threshold;
}

// Offer the scores of `rows` rows from `row` on; `score` has room for whole vectors.
template <Metric M>
LUTRA_INLINE void offer_scores(const ListsArgs& a, Selection* s, int64_t query, const float* score, int64_t row,
                               int64_t rows) {
  const vf t = splat(s->threshold[query]);
  for (int64_t g = 0; g < rows; g += W) {
    uint32_t m = passes_equal<M>(load(score + g), t);
    m &= rows - g < W ? (1u << (rows - g)) - 1 : static_cast<uint32_t>((uint64_t{1} << W) - 1);
    for (; m; m &= m - 1) {
      const int k = static_cast<int>(g) + __builtin_ctz(m);
      offer_row(a, s, query, score[k], row + k, M);
    }
  }
}

// Sort by merging runs of doubling length.
static inline void sort_keys(int64_t* keys, int64_t count, int64_t* scratch) {
  int64_t *from = keys, *to = scratch;
  for (int64_t width = 1; width < count; width *= 2) {
    for (int64_t begin = 0; begin < count; begin += 2 * width) {
      const int64_t middle = begin + width < count ? begin + width : count;
      const int64_t end = begin + 2 * width < count ? begin + 2 * width : count;
      int64_t x = begin, y = middle;
      for (int64_t o = begin; o < end; ++o)
        to[o] = x < middle && (y >= end || from[x] <= from[y]) ? from[x++] : from[y++];
    }
    int64_t* swap = from;
    from = to;
    to = swap;
  }
  if (from != keys) memcpy(keys, from, sizeof(int64_t) * count);
}

struct ListItem {  // rows [begin, end) of the arena
  int64_t begin, end;
  int64_t first, last;  // their probes: Plan::pairs from first to last
};

// The work of the queries [q0, q0 + queries): their probes sorted by list, and the lists cut into items.
class Plan {
 public:
  Plan(const ListsArgs& a, int64_t q0, int64_t queries) : pairs_(queries * a.nprobe), scratch_(queries * a.nprobe) {
    int64_t most = 0;
    for (int64_t i = 0; i < queries * a.nprobe; ++i) {
      const int64_t list = a.probes[q0 * a.nprobe + i];
      if (list < 0 || list >= a.nlist || a.list_rows[list] <= 0) continue;
      if (a.list_begin[list] < 0 || a.list_rows[list] > a.arena_rows - a.list_begin[list]) {
        *a.bad = (int64_t{1} << 40) + list;
        continue;
      }
      pairs_[count_++] = list << 32 | i;
      most += (a.list_rows[list] + kItemRows - 1) / kItemRows;
      rows += a.list_rows[list];
    }
    sort_keys(pairs_.data, count_, scratch_.data);
    items = static_cast<ListItem*>(malloc(sizeof(ListItem) * (most + 1)));
    if (!items) abort();
    for (int64_t i = 0; i < count_;) {
      const int64_t list = pairs_[i] >> 32, first = i;
      while (i < count_ && pairs_[i] >> 32 == list) ++i;
      const int64_t begin = a.list_begin[list], end = begin + a.list_rows[list];
      for (int64_t at = begin; at < end; at += kItemRows)
        items[item_count++] = {at, at + kItemRows < end ? at + kItemRows : end, first, i};
    }
  }
  ~Plan() { free(items); }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Where the probe of a pair stands in the arrays (nq, nprobe), counted from q0 * nprobe.
  int64_t place(int64_t pair) const { return pairs_[pair] & 0xffffffff; }
  int64_t list(const ListItem& item) const { return pairs_[item.first] >> 32; }

  ListItem* items;
  int64_t item_count = 0;
  int64_t rows = 0;  // that all probes ask for

 private:
  Buffer<int64_t> pairs_, scratch_;
  int64_t count_ = 0;
};

}  // namespace LUTRA_NS
}  // namespace lutra
