// Parts of vectors, for the last columns of a row: nothing is read or written behind them.
#pragma once
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {

// n < W values of type T and zeros behind them.
template <class T>
LUTRA_INLINE vf load_part(const typename T::type* p, int n) {
#if defined(LUTRA_LEVEL_v4)
  // By masks, no wider than needed: a load that reaches into the next line waits for it, masked out or not.
  if constexpr (sizeof(*p) == 4) {
    const unsigned mask = (1u << n) - 1;
    if (n <= 4) return (vf)_mm512_zextps128_ps512(_mm_maskz_loadu_ps(static_cast<__mmask8>(mask), p));
    if (n <= 8) return (vf)_mm512_zextps256_ps512(_mm256_maskz_loadu_ps(static_cast<__mmask8>(mask), p));
    return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  }
#endif
  typename T::type part[W] = {};
  memcpy(part, p, static_cast<size_t>(n) * sizeof(*p));
  return T::load(part);
}

// The first n < W lanes.
template <class T>
LUTRA_INLINE void store_part(typename T::type* p, vf v, int n) {
#if defined(LUTRA_LEVEL_v4)
  if constexpr (sizeof(*p) == 4) {
    const unsigned mask = (1u << n) - 1;
    if (n <= 4) return _mm_mask_storeu_ps(p, static_cast<__mmask8>(mask), _mm512_castps512_ps128((__m512)v));
    if (n <= 8) return _mm256_mask_storeu_ps(p, static_cast<__mmask8>(mask), _mm512_castps512_ps256((__m512)v));
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  }
#endif
  typename T::type part[W];
  T::store(part, v);
  memcpy(p, part, static_cast<size_t>(n) * sizeof(*p));
}

}  // namespace LUTRA_NS
}  // namespace lutra
