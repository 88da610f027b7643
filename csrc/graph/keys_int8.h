// Sums of products of unsigned bytes (rows, 128 added) and signed bytes (a query): exact in int32 up to
// 255 * 127 * 65536 values. Four rows at a time, so that their sums are four chains.
#pragma once
#include "common/features.h"
#include "common/simd.h"

#include <math.h>

namespace lutra {
namespace LUTRA_NS {

// Codes of factor * x, round(x / s), s = max |x| / 127, which is returned.
static inline float int8_codes(const float* x, int64_t d, float factor, int8_t* out) {
  float largest = 0;
  for (int64_t j = 0; j < d; ++j) {
    const float v = fabsf(x[j] * factor);
    if (v > largest) largest = v;
  }
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  if (!(inverse < __builtin_inff())) {  // all so small that 127 / largest overflows: as good as zero
    for (int64_t j = 0; j < d; ++j) out[j] = 0;
    return 0;
  }
  for (int64_t j = 0; j < d; ++j) out[j] = static_cast<int8_t>(rintf(x[j] * factor * inverse));
  return largest / 127.0f;
}

#if defined(LUTRA_LEVEL_v4)
#define LUTRA_VNNI __attribute__((target("avx512vnni")))

template <int R>
LUTRA_VNNI static inline void int8_block_vnni(const uint8_t* rows, int64_t stride, const int8_t* q, const int32_t* ids,
                                              int32_t* sums) {
  const uint8_t* x[R];
  __m512i s[R];
  for (int r = 0; r < R; ++r) {
    x[r] = rows + ids[r] * stride;
    s[r] = _mm512_setzero_si512();
  }
  for (int64_t j = 0; j < stride; j += 64) {
    const __m512i a = _mm512_loadu_si512(q + j);
    for (int r = 0; r < R; ++r) s[r] = _mm512_dpbusd_epi32(s[r], _mm512_loadu_si512(x[r] + j), a);
  }
  for (int r = 0; r < R; ++r) sums[r] = _mm512_reduce_add_epi32(s[r]);
}
#endif

template <int R>
LUTRA_INLINE void int8_block(const uint8_t* rows, int64_t stride, const int8_t* q, const int32_t* ids, int32_t* sums) {
  const uint8_t* x[R];
  for (int r = 0; r < R; ++r) x[r] = rows + ids[r] * stride;
#if defined(LUTRA_LEVEL_v4)
  __m512i s[R];
  for (int r = 0; r < R; ++r) s[r] = _mm512_setzero_si512();
  for (int64_t j = 0; j < stride; j += 32) {
    const __m512i a = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + j)));
    for (int r = 0; r < R; ++r) {
      const __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[r] + j)));
      s[r] = _mm512_add_epi32(s[r], _mm512_madd_epi16(a, b));
    }
  }
  for (int r = 0; r < R; ++r) sums[r] = _mm512_reduce_add_epi32(s[r]);
#elif defined(LUTRA_LEVEL_v3)
  __m256i s[R];
  for (int r = 0; r < R; ++r) s[r] = _mm256_setzero_si256();
  for (int64_t j = 0; j < stride; j += 16) {
    const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + j)));
    for (int r = 0; r < R; ++r) {
      const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x[r] + j)));
      s[r] = _mm256_add_epi32(s[r], _mm256_madd_epi16(a, b));
    }
  }
  for (int r = 0; r < R; ++r) {
    const vi t = (vi)s[r];
    sums[r] = ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
  }
#elif defined(__SSE4_1__)
  __m128i s[R];
  for (int r = 0; r < R; ++r) s[r] = _mm_setzero_si128();
  for (int64_t j = 0; j < stride; j += 8) {
    const __m128i a = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + j)));
    for (int r = 0; r < R; ++r) {
      const __m128i b = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x[r] + j)));
      s[r] = _mm_add_epi32(s[r], _mm_madd_epi16(a, b));
    }
  }
  for (int r = 0; r < R; ++r) {
    const vi t = (vi)s[r];
    sums[r] = (t[0] + t[1]) + (t[2] + t[3]);
  }
#else
  for (int r = 0; r < R; ++r) {
    int32_t sum = 0;
    for (int64_t j = 0; j < stride; ++j) sum += q[j] * x[r][j];
    sums[r] = sum;
  }
#endif
}

}  // namespace LUTRA_NS
}  // namespace lutra
