// W sums in one vector: all lanes of W vectors are added up together, W - 1 additions and twice as many shuffles, in
// the order in which reduce_add would take each.
#pragma once
#include "scan/exact.h"

namespace lutra {
namespace LUTRA_NS {

// Lane l of the result is the reduction of v[place(l)].
constexpr int place(int l) { return W == 16 ? (l % 4) * 4 + l / 4 : W == 8 ? (l < 4 ? 2 * l : 2 * (l - 4) + 1) : l; }

#if defined(LUTRA_LEVEL_v4)
template <Kind K>
LUTRA_INLINE vf reduce_all(const vf* v) {
  __m512 a[8];
  for (int i = 0; i < 4; ++i) {  // 16 vectors, two to one: lanes w and w + 8
    __m512 half[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 x = (__m512)v[4 * i + 2 * j], y = (__m512)v[4 * i + 2 * j + 1];
      half[j] = (__m512)join<K>((vf)_mm512_shuffle_f32x4(x, y, 0x44), (vf)_mm512_shuffle_f32x4(x, y, 0xee));
    }
    a[i] = (__m512)join<K>((vf)_mm512_shuffle_f32x4(half[0], half[1], 0x88),
                           (vf)_mm512_shuffle_f32x4(half[0], half[1], 0xdd));
  }
  const auto low = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const __m512 e = (__m512)join<K>((vf)low(a[0], a[1]), (vf)high(a[0], a[1]));
  const __m512 f = (__m512)join<K>((vf)low(a[2], a[3]), (vf)high(a[2], a[3]));
  return join<K>((vf)_mm512_shuffle_ps(e, f, 0x88), (vf)_mm512_shuffle_ps(e, f, 0xdd));
}
#elif defined(LUTRA_LEVEL_v3)
template <Kind K>
LUTRA_INLINE vf reduce_all(const vf* v) {
  __m256 a[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 x = (__m256)v[2 * i], y = (__m256)v[2 * i + 1];
    a[i] = (__m256)join<K>((vf)_mm256_permute2f128_ps(x, y, 0x20), (vf)_mm256_permute2f128_ps(x, y, 0x31));
  }
  __m256 e[2];
  for (int i = 0; i < 2; ++i) {
    const __m256d x = _mm256_castps_pd(a[2 * i]), y = _mm256_castps_pd(a[2 * i + 1]);
    e[i] = (__m256)join<K>((vf)_mm256_unpacklo_pd(x, y), (vf)_mm256_unpackhi_pd(x, y));
  }
  return join<K>((vf)_mm256_shuffle_ps(e[0], e[1], 0x88), (vf)_mm256_shuffle_ps(e[0], e[1], 0xdd));
}
#else
template <Kind K>
LUTRA_INLINE vf reduce_all(const vf* v) {
  const vf a = join<K>(vf{v[0][0], v[0][1], v[1][0], v[1][1]}, vf{v[0][2], v[0][3], v[1][2], v[1][3]});
  const vf b = join<K>(vf{v[2][0], v[2][1], v[3][0], v[3][1]}, vf{v[2][2], v[2][3], v[3][2], v[3][3]});
  return join<K>(vf{a[0], a[2], b[0], b[2]}, vf{a[1], a[3], b[1], b[3]});
}
#endif

}  // namespace LUTRA_NS
}  // namespace lutra
