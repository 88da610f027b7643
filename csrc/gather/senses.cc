#include "gather/senses.h"

#include "common/parallel.h"
#include "common/simd.h"
#include "common/team.h"
#include "gather/bag_ids.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// Scores of R rows that follow one another: each vector of the context is loaded once. Two partial sums a row,
// whatever R is, so that a score does not depend on its neighbours.
template <class T, int R>
LUTRA_INLINE void scores_of(const float* context, const typename T::type* rows, int64_t dim, float* out) {
  vf even[R], odd[R];
  float rest[R];
  for (int r = 0; r < R; ++r) {
    even[r] = odd[r] = (vf){};
    rest[r] = 0;
  }
  int64_t j = 0;
  for (; j + 2 * W <= dim; j += 2 * W) {
    const vf c = load(context + j), d = load(context + j + W);
    for (int r = 0; r < R; ++r) {
      even[r] += c * T::load(rows + r * dim + j);
      odd[r] += d * T::load(rows + r * dim + j + W);
    }
  }
  if (j + W <= dim) {
    const vf c = load(context + j);
    for (int r = 0; r < R; ++r) even[r] += c * T::load(rows + r * dim + j);
    j += W;
  }
  for (; j < dim; ++j)
    for (int r = 0; r < R; ++r) rest[r] += context[j] * T::get(rows + r * dim + j);
  for (int r = 0; r < R; ++r) out[r] = reduce_add(even[r] + odd[r]) + rest[r];
}

struct Best {
  float score = 0;
  int64_t row = -1;
  LUTRA_INLINE void take(Best* b, const float* scores, int64_t row, int n) {
    for (int r = 0; r < n; ++r) {
      const float s = scores[r];
      const bool better = b->row < 0 || s > b->score || (s != s && b->score == b->score);
      b->score = better ? s : b->score;
      b->row = better ? row + r : b->row;
    }
  }
};

template <class T, class Id>
void tokens(const SensesArgs& a, int64_t begin, int64_t end, BadFirst* bad, BadFirst* none) {
  typedef typename T::type type;
  constexpr bool narrow = sizeof(type) < 4;
  constexpr int64_t kAhead = 2, kMost = 4096;
  const auto* ids = static_cast<const Id*>(a.ids);
  const auto* table = static_cast<const type*>(a.table);
  const int64_t row_bytes = a.dim * static_cast<int64_t>(sizeof(type));
  Buffer<float> wide(narrow ? a.dim : 0);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) {
      const int64_t x = ids[i + kAhead];
      if (static_cast<uint64_t>(x) < static_cast<uint64_t>(a.tokens)) {
        const int64_t r0 = a.offsets ? a.offsets[x] : x * a.each, r1 = a.offsets ? a.offsets[x + 1] : r0 + a.each;
        const int64_t bytes = (r1 - r0) * row_bytes < kMost ? (r1 - r0) * row_bytes : kMost;
        const auto* p = reinterpret_cast<const char*>(table) + static_cast<uint64_t>(r0) * row_bytes;
        for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(p + c);
      }
    }
    const int64_t x = ids[i];
    if (static_cast<uint64_t>(x) >= static_cast<uint64_t>(a.tokens)) return bad->report(i);
    const int64_t r0 = a.offsets ? a.offsets[x] : x * a.each, r1 = a.offsets ? a.offsets[x + 1] : r0 + a.each;
    if (r0 < 0 || r1 <= r0 || r1 > a.total) return none->report(i);
    const auto* given = static_cast<const type*>(a.context) + i * a.dim;
    const float* context;
    if (narrow) {
      for (int64_t j = 0; j < a.dim; ++j) wide[j] = T::get(given + j);
      context = wide.data;
    } else {
      context = reinterpret_cast<const float*>(given);
    }
    Best best;
    float scores[4];
    int64_t r = r0;
    for (; r + 4 <= r1; r += 4) {
      scores_of<T, 4>(context, table + r * a.dim, a.dim, scores);
      Best::take(&best, scores, r, 4);
    }
    for (; r < r1; ++r) {
      scores_of<T, 1>(context, table + r * a.dim, a.dim, scores);
      Best::take(&best, scores, r, 1);
    }
    memcpy(static_cast<type*>(a.out) + i * a.dim, table + best.row * a.dim, static_cast<size_t>(row_bytes));
    a.best[i] = best.row;
    a.scores[i] = best.score;
  }
}

template <class T>
void all_tokens(const SensesArgs& a, BadFirst* bad, BadFirst* none) {
  const double each_token = a.offsets ? static_cast<double>(a.total) / (static_cast<double>(a.tokens) + 1) : a.each;
  const double each = 15 + (each_token + 1) * (3 + static_cast<double>(a.dim) * sizeof(typename T::type) / 20);
  const int64_t grain = static_cast<int64_t>(40e3 / each) + 1;
  team_ranges(a.n, grain, each * static_cast<double>(a.n), [&](int64_t begin, int64_t end) {
    if (a.id_type == DType::i32)
      tokens<T, int32_t>(a, begin, end, bad, none);
    else
      tokens<T, int64_t>(a, begin, end, bad, none);
  });
}

}  // namespace

void senses(const SensesArgs& a) {
  BadFirst bad, none;
  switch (a.dtype) {
    case DType::f16: all_tokens<F16>(a, &bad, &none); break;
    case DType::bf16: all_tokens<BF16>(a, &bad, &none); break;
    default: all_tokens<F32>(a, &bad, &none); break;
  }
  a.bad[0] = bad.result();
  a.bad[1] = none.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
