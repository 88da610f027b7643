// Cutting a buffer of candidates (common/select.h) back to the best, at a SIMD level.
#pragma once
#include "common/select.h"
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {

#if defined(LUTRA_LEVEL_v4)
// How many are `least` or greater.
static inline int64_t count_from(const uint64_t* a, int64_t n, uint64_t least) {
  const __m512i t = _mm512_set1_epi64(static_cast<int64_t>(least));
  int64_t count = 0, i = 0;
  for (; i + 8 <= n; i += 8) count += __builtin_popcount(_mm512_cmpge_epu64_mask(_mm512_loadu_si512(a + i), t));
  for (; i < n; ++i) count += a[i] >= least;
  return count;
}

// The numbers are bisected by value, which only counts, until few are left between the bounds; nothing moves before
// the last pass. A count of 600 takes 30 ns here, nth_element 6 us.
static void cut(Candidates* c) {
  constexpr int kFew = 16;
  const int64_t n = c->count, want = c->want;
  uint64_t* a = c->packed;
  if (n < want || want < 1) return;
  uint64_t low = a[0], high = a[0];
  for (int64_t i = 1; i < n; ++i) {
    low = a[i] < low ? a[i] : low;
    high = a[i] > high ? a[i] : high;
  }
  high += 1;  // [low, high): `from_low` are low or greater, which is enough; `from_high` high or greater, too few
  int64_t from_low = n, from_high = 0;
  while (from_low > want && from_low - from_high > kFew && high - low > 1) {
    const uint64_t middle = low + (high - low) / 2;
    const int64_t from_middle = count_from(a, n, middle);
    if (from_middle >= want) {
      low = middle;
      from_low = from_middle;
    } else {
      high = middle;
      from_high = from_middle;
    }
  }
  uint64_t least = low;
  if (from_low > want && high - low > 1) {
    uint64_t few[kFew];
    int count = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (a[i] < low || a[i] >= high) continue;
      int at = count++;
      for (; at > 0 && few[at - 1] < a[i]; --at) few[at] = few[at - 1];
      few[at] = a[i];
    }
    least = few[want - from_high - 1];
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += 8) {
    const __mmask8 exist = n - i < 8 ? static_cast<__mmask8>((1u << (n - i)) - 1) : 0xff;
    const __m512i x = _mm512_maskz_loadu_epi64(exist, a + i);
    const __mmask8 stay = _mm512_mask_cmpge_epu64_mask(exist, x, _mm512_set1_epi64(static_cast<int64_t>(least)));
    const __mmask8 room = static_cast<__mmask8>((1u << __builtin_popcount(stay)) - 1);
    _mm512_mask_storeu_epi64(a + kept, room, _mm512_maskz_compress_epi64(stay, x));
    kept += __builtin_popcount(stay);
  }
  c->count = kept < want ? kept : want;  // more only where equal numbers were offered twice
  c->worst = least;
  c->threshold = candidate_key(least);
}
#else
static inline void cut(Candidates* c) { candidates_cut(c); }
#endif

}  // namespace LUTRA_NS
}  // namespace lutra
