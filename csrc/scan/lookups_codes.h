// Packed codes, taken apart: a byte each, row by row, or column by column for 64 rows at a time.
#pragma once
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {

// Codes [j0, j1) of a row into bytes; reads nothing behind the row.
LUTRA_INLINE void unpack_codes(const uint8_t* row, int bits, int64_t j0, int64_t j1, uint8_t* out) {
  if (bits == 8) {
    memcpy(out, row + j0, static_cast<size_t>(j1 - j0));
    return;
  }
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t j = j0; j < j1; ++j) {
    const int64_t bit = j * bits, byte = bit >> 3;
    uint32_t word = row[byte];
    if ((bit & 7) + bits > 8) word |= static_cast<uint32_t>(row[byte + 1]) << 8;
    *out++ = static_cast<uint8_t>(word >> (bit & 7) & mask);
  }
}

#if defined(LUTRA_LEVEL_v4)
// 64 rows of 16 bytes, `stride` apart, to 16 columns of 64 bytes, `pitch` apart: a 16 x 16 transposition in each of the
// four quarters of a register. Interleaving register i with i + 8 moves a bit of the register's number into the
// byte's; four times, and they have changed places.
LUTRA_INLINE void transpose_64x16(const uint8_t* in, int64_t stride, uint8_t* out, int64_t pitch) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const uint8_t* p = in + i * stride;
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    x = _mm512_inserti32x4(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * stride)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 32 * stride)), 2);
    a[i] = _mm512_inserti32x4(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 48 * stride)), 3);
  }
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm512_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm512_unpackhi_epi8(a[i], a[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(out + i * pitch, a[i]);
}
#endif

}  // namespace LUTRA_NS
}  // namespace lutra
