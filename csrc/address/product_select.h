// Selection for product keys, at a SIMD level: the k best of a row of scores, sorted, and the k best sums of two rows.
//
// A row is in cache. The maxima of 2 k interleaved groups of it give a threshold that at least k of its scores exceed
// and few more do; what exceeds it is collected and put in order by counting, for each, how many are greater: W
// comparisons an instruction, and no branch that depends on the scores.
#pragma once
#include "common/parallel.h"
#include "common/select.h"
#include "common/simd.h"
#include "scan/candidates.h"

#include <math.h>

namespace lutra {
namespace LUTRA_NS {

// acc + 1 where x > y, or x >= y.
LUTRA_INLINE vi count_above(vi acc, vf x, vf y) {
#if defined(LUTRA_LEVEL_v4)
  const __mmask16 m = _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GT_OQ);
  return (vi)_mm512_mask_sub_epi32((__m512i)acc, m, (__m512i)acc, _mm512_set1_epi32(-1));
#else
  return acc - (vi)(x > y);
#endif
}
LUTRA_INLINE vi count_not_below(vi acc, vf x, vf y) {
#if defined(LUTRA_LEVEL_v4)
  const __mmask16 m = _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GE_OQ);
  return (vi)_mm512_mask_sub_epi32((__m512i)acc, m, (__m512i)acc, _mm512_set1_epi32(-1));
#else
  return acc - (vi)(x >= y);
#endif
}

// A value that at least k of the `vectors` vectors at x exceed, and few more; NaN (all pass) where there is none.
static inline float exceeded_by(const float* x, int64_t vectors, int64_t k) {
  vf least = load(x), most = least;
  for (int64_t v = 1; v < vectors; ++v) {
    const vf y = load(x + v * W);
    least = y < least ? y : least;
    most = y > most ? y : most;
  }
  float low = least[0], high = most[0];
  for (int i = 1; i < W; ++i) {
    low = least[i] < low ? least[i] : low;
    high = most[i] > high ? most[i] : high;
  }
  const auto above = [&](float t) {
    const vf s = splat(t);
    int64_t count = 0;
    for (int64_t v = 0; v < vectors; ++v) count += __builtin_popcount(bits_not_le(load(x + v * W), s));
    return count;
  };
  if (above(low) < k) return low > -3e38f ? nextafterf(low, -__builtin_inff()) : __builtin_nanf("");
  for (int step = 0; step < 10; ++step) {
    const float middle = 0.5f * low + 0.5f * high;
    const int64_t count = above(middle);
    if (count >= k) {
      low = middle;
      if (count <= k + k / 4) break;
    } else {
      high = middle;
    }
  }
  return low;
}

// Some keys with their numbers.
struct Found {
  float* keys;
  uint32_t* ids;
  int64_t count;
};

// What exceeds t among `vectors` vectors, with its places; NaN passes.
static inline void collect(const float* x, int64_t vectors, float t, Found* out) {
  const vf threshold = splat(t);
  int64_t count = 0;
#if defined(LUTRA_LEVEL_v4)
  __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t v = 0; v < vectors; ++v, place = _mm512_add_epi32(place, _mm512_set1_epi32(W))) {
    const vf y = load(x + v * W);
    const __mmask16 m = static_cast<__mmask16>(bits_not_le(y, threshold));
    _mm512_storeu_ps(out->keys + count, _mm512_maskz_compress_ps(m, (__m512)y));  // into memory it would be slow
    _mm512_storeu_si512(out->ids + count, _mm512_maskz_compress_epi32(m, place));
    count += __builtin_popcount(m);
  }
#else
  for (int64_t v = 0; v < vectors; ++v)
    for (uint32_t m = bits_not_le(load(x + v * W), threshold); m; m &= m - 1) {
      const int64_t i = v * W + __builtin_ctz(m);
      out->keys[count] = x[i];
      out->ids[count++] = static_cast<uint32_t>(i);
    }
#endif
  out->count = count;
}

// All of `in` (fewer than 2^31), greater keys first, equal keys by number. `in` can be read a vector further.
static inline void order(const Found& in, Found* out) {
  const int64_t count = in.count;
  for (int64_t i = 0; i < count; i += W) {
    const vf mine = load(in.keys + i);
    const int64_t end = i + W < count ? i + W : count;
    vi rank = {};
    for (int64_t j = 0; j < i; ++j) rank = count_not_below(rank, splat(in.keys[j]), mine);
    for (int64_t j = i; j < end; ++j) rank = count_above(rank, splat(in.keys[j]), mine);
    for (int64_t j = end; j < count; ++j) rank = count_above(rank, splat(in.keys[j]), mine);
    for (int64_t j = i; j < end; ++j) {
      int64_t at = rank[j - i];
      for (int64_t e = i; e < j; ++e) at += in.keys[e] == in.keys[j];
      out->keys[at] = in.keys[j];
      out->ids[at] = in.ids[j];
    }
  }
  out->count = count;
  for (int64_t i = 1; i < count; ++i) {  // equal keys came in any order of numbers
    const uint32_t id = out->ids[i];
    int64_t at = i;
    for (; at > 0 && out->keys[at - 1] == out->keys[i] && out->ids[at - 1] > id; --at) out->ids[at] = out->ids[at - 1];
    out->ids[at] = id;
  }
}

// The `want` first in that order. packed: scratch for as many as there are, and a vector.
static inline void best_first(const Found& in, int64_t want, uint64_t* packed, Found* out) {
  if (in.count <= want + want / 2 + 64 && in.count <= 512) return order(in, out);
  for (int64_t i = 0; i < in.count; ++i) packed[i] = pack_candidate(in.keys[i] + 0.0f, in.ids[i]);  // no -0
  Candidates all{packed, in.count, want, in.count, 0, 0};
  cut(&all);
  candidates_sort(&all, false);
  for (int64_t i = 0; i < want; ++i) {
    out->keys[i] = candidate_key(packed[i]);
    out->ids[i] = static_cast<uint32_t>(candidate_id(packed[i]));
  }
  out->count = want;
}

// Scratch of one thread, for rows of n scores and k of them.
class ProductSelection {
 public:
  ProductSelection(int64_t n, int64_t k)
      : n_(n), k_(k), vectors_((n + W - 1) / W), groups_((2 * k + W - 1) / W), room_(room(n, k)), keys_(4 * room_),
        ids_(4 * room_), packed_(room_) {
    if (groups_ < 2) groups_ = 2;
    if (groups_ > vectors_) groups_ = vectors_;
    for (int i = 0; i < 4; ++i) lists_[i] = {keys_.data + i * room_, ids_.data + i * room_, 0};
  }

  // The k best of the row at x, whose last vector is filled up with -infinity, become those of a half. False: a NaN.
  bool half(int which, const float* x) {
    Found* found = &lists_[2];
    float* most = lists_[3].keys;
    for (int64_t v = 0; v < groups_; ++v) store(most + v * W, load(x + v * W));
    for (int64_t v = groups_, g = 0; v < vectors_; ++v) {
      const vf y = load(x + v * W), before = load(most + g * W);
      store(most + g * W, (y > before) | (before != before) ? y : before);
      g = g + 1 == groups_ ? 0 : g + 1;
    }
    collect(x, vectors_, exceeded_by(most, groups_, k_), found);
    bool good = true;
    for (int64_t i = 0; i < found->count; ++i) good &= found->keys[i] == found->keys[i];
    if (good) best_first(*found, k_, packed_.data, &lists_[which]);
    return good;
  }

  // The k best sums of the two halves.
  bool sums(float* scores, int64_t* ids) {
    const float *s1 = lists_[0].keys, *s2 = lists_[1].keys;
    const float first = s1[0] + s2[k_ - 1], last = s1[k_ - 1] + s2[0];
    if (first != first || last != last) return false;  // infinities of both signs
    float t = -__builtin_inff();                       // of x rows and y columns, the first x y >= k are no worse
    for (int64_t x = 1; x * x <= k_; ++x) {
      const int64_t y = (k_ + x - 1) / x;
      const float a = s1[x - 1] + s2[y - 1], b = s1[y - 1] + s2[x - 1];
      t = a > t ? a : t;
      t = b > t ? b : t;
    }
    Found *found = &lists_[2], *best = &lists_[3];
    int64_t count = 0;
    for (int64_t a = 0; a < k_ && s1[a] + s2[0] >= t; ++a) {
      const uint32_t row = lists_[0].ids[a] * static_cast<uint32_t>(n_);
      const int64_t end = k_ / (a + 1);
      for (int64_t b = 0; b < end; b += W) {  // sums fall: those that count are the first
        const vf sum = load(s2 + b) + s1[a];
        store(found->keys + count, sum);
        *reinterpret_cast<vi_unaligned*>(found->ids + count) =
            *reinterpret_cast<const vi_unaligned*>(lists_[1].ids + b) + static_cast<int32_t>(row);
        const int left = end - b < W ? static_cast<int>(end - b) : W;
        const uint32_t below = bits_not_le(splat(t), sum) | (left < W ? ~0u << left : 0u) | 1u << W;
        const int passed = __builtin_ctz(below);
        count += passed;
        if (passed < W) break;
      }
    }
    found->count = count;
    best_first(*found, k_, packed_.data, best);
    for (int64_t i = 0; i < k_; ++i) {
      scores[i] = best->keys[i];
      ids[i] = best->ids[i];
    }
    return true;
  }

 private:
  static int64_t room(int64_t n, int64_t k) {  // for all n, or all pairs, and a vector behind them
    int64_t pairs = 0;
    for (int64_t a = 1; a <= k; ++a) pairs += k / a;
    return ((n > pairs ? n : pairs) + 2 * W) / W * W + W;
  }

  int64_t n_, k_, vectors_, groups_, room_;
  Buffer<float> keys_;
  Buffer<uint32_t> ids_;
  Buffer<uint64_t> packed_;
  Found lists_[4];  // the halves' best; what passed; what is best of it
};

}  // namespace LUTRA_NS
}  // namespace lutra
