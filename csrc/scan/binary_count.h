// Bits of one query with a group of rows, along the bytes of a row.
#pragma once
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// out[r] = bits of q ^ x_r (or q & x_r). q is padded with zeros to whole vectors and, for rows of 8, 16 and 32 bytes,
// repeated.
template <bool And, int B>
LUTRA_INLINE void count_scalar(const uint8_t* q, const uint8_t* x, int64_t b, int rows, int32_t* out) {
  if (B) b = B;
  for (int r = 0; r < rows; ++r, x += b) {
    int64_t sum = 0, j = 0;
    uint64_t u, v;
    for (; j + 8 <= b; j += 8) {
      memcpy(&u, q + j, 8);
      memcpy(&v, x + j, 8);
      sum += __builtin_popcountll(And ? u & v : u ^ v);
    }
    for (; j < b; ++j) sum += __builtin_popcount(And ? q[j] & x[j] : q[j] ^ x[j]);
    out[r] = static_cast<int32_t>(sum);
  }
}

template <bool And>
void count_rows(const uint8_t* q, const uint8_t* x, int64_t b, int rows, int32_t* out) {
  switch (b) {
    case 16: return count_scalar<And, 16>(q, x, b, rows, out);
    case 32: return count_scalar<And, 32>(q, x, b, rows, out);
    case 64: return count_scalar<And, 64>(q, x, b, rows, out);
    default: return count_scalar<And, 0>(q, x, b, rows, out);
  }
}

#if defined(LUTRA_LEVEL_v4)
namespace vpopcnt {
#define LUTRA_VPOPCNT __attribute__((target("avx512vpopcntdq")))
// Neighbouring lanes added: of two vectors of pairs, fours, eights of lanes, one with half as many sums of each.
LUTRA_INLINE __m512i add_pairs(__m512i a, __m512i b) {
  return _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
LUTRA_INLINE __m512i add_blocks(__m512i a, __m512i b) {
  return _mm512_add_epi64(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xDD));
}
LUTRA_INLINE void put_counts(__m512i counts, __m512i order, int32_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, counts)));
}
template <bool And>
LUTRA_VPOPCNT LUTRA_INLINE __m512i bits(__m512i q, __m512i x) {
  return _mm512_popcnt_epi64(And ? _mm512_and_si512(q, x) : _mm512_xor_si512(q, x));
}
LUTRA_INLINE __m512i at(const uint8_t* p) { return _mm512_loadu_si512(p); }
LUTRA_INLINE __m512i dwords(int a, int b, int c, int d, int e, int f, int g, int h) {
  return _mm512_castsi256_si512(_mm256_setr_epi32(a, b, c, d, e, f, g, h));
}

template <bool And>
LUTRA_VPOPCNT void count_rows(const uint8_t* q, const uint8_t* x, int64_t b, int rows, int32_t* out) {
  constexpr int64_t kAhead = 6144;  // the hardware follows the stream; this only reaches over the ends of pages
  int r = 0;
  if (b == 32) {
    const __m512i order = dwords(0, 4, 2, 6, 8, 12, 10, 14), v = at(q);
    for (; r + 8 <= rows; r += 8, x += 256) {
      for (int j = 0; j < 256; j += 64) __builtin_prefetch(x + kAhead + j);
      const __m512i low = add_pairs(bits<And>(v, at(x)), bits<And>(v, at(x + 64)));
      const __m512i high = add_pairs(bits<And>(v, at(x + 128)), bits<And>(v, at(x + 192)));
      put_counts(add_blocks(low, high), order, out + r);
    }
  } else if (b == 16) {
    const __m512i order = dwords(0, 4, 8, 12, 2, 6, 10, 14), v = at(q);
    for (; r + 8 <= rows; r += 8, x += 128) {
      for (int j = 0; j < 128; j += 64) __builtin_prefetch(x + kAhead + j);
      put_counts(add_pairs(bits<And>(v, at(x)), bits<And>(v, at(x + 64))), order, out + r);
    }
  } else if (b == 8) {
    const __m512i order = dwords(0, 2, 4, 6, 8, 10, 12, 14), v = at(q);
    for (; r + 8 <= rows; r += 8, x += 64) {
      __builtin_prefetch(x + kAhead);
      put_counts(bits<And>(v, at(x)), order, out + r);
    }
  } else {
    const __m512i order = dwords(0, 2, 4, 6, 8, 10, 12, 14);
    const int64_t whole = b / 64 * 64;
    const __mmask64 rest = (uint64_t{1} << (b - whole)) - 1;
    for (; r + 8 <= rows; r += 8, x += 8 * b) {
      __m512i sum[8];
      for (int i = 0; i < 8; ++i) sum[i] = _mm512_setzero_si512();
      for (int64_t j = 0; j < whole; j += 64) {
        const __m512i v = at(q + j);
        for (int i = 0; i < 8; ++i) sum[i] = _mm512_add_epi64(sum[i], bits<And>(v, at(x + i * b + j)));
      }
      if (rest) {
        const __m512i v = at(q + whole);
        for (int i = 0; i < 8; ++i)
          sum[i] = _mm512_add_epi64(sum[i], bits<And>(v, _mm512_maskz_loadu_epi8(rest, x + i * b + whole)));
      }
      for (int64_t j = 0; j < 8 * b; j += 64) __builtin_prefetch(x + kAhead + j);
      const __m512i low = add_blocks(add_pairs(sum[0], sum[1]), add_pairs(sum[2], sum[3]));
      const __m512i high = add_blocks(add_pairs(sum[4], sum[5]), add_pairs(sum[6], sum[7]));
      put_counts(add_blocks(low, high), order, out + r);
    }
  }
  count_scalar<And, 0>(q, x, b, rows - r, out + r);
}
}  // namespace vpopcnt
#endif

template <bool And>
LUTRA_INLINE void count(bool vpopcnt, const uint8_t* q, const uint8_t* x, int64_t b, int rows, int32_t* out) {
#if defined(LUTRA_LEVEL_v4)
  if (vpopcnt) return vpopcnt::count_rows<And>(q, x, b, rows, out);
#endif
  (void)vpopcnt;
  count_rows<And>(q, x, b, rows, out);
}

}  // namespace
}  // namespace LUTRA_NS
}  // namespace lutra
