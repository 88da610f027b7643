// Full scores of rows whose codes lie in bit planes (fast_scan.h), at a SIMD level.
#pragma once
#include <math.h>

#include "common/select.h"
#include "common/simd.h"
#include "scan/fast_scan.h"

namespace lutra {
namespace LUTRA_NS {
namespace fast_scan_planes {

constexpr int kPart = 16;  // dimensions whose bits are taken together

LUTRA_INLINE int64_t parts_of(int64_t d) { return (d + kPart - 1) / kPart; }

// Four bits of each byte, the low or the high ones, side by side.
LUTRA_INLINE uint32_t nibbles(uint32_t word, bool high) {
  const uint32_t x = (high ? word >> 4 : word) & 0x0f0f0f0fu, y = x | x >> 4;
  return (y & 0xff) | (y >> 8 & 0xff00);
}

// The bits of the highest plane for dimensions 16 part .. 16 part + 15.
LUTRA_INLINE uint32_t high_bits(const uint8_t* row_in_block, int64_t part) {
  uint32_t word;
  __builtin_memcpy(&word, row_in_block + part / 2 * 64, 4);
  return nibbles(word, part % 2 != 0);
}

LUTRA_INLINE uint32_t low_bits(const uint8_t* plane, int64_t part) {
  uint16_t bits;
  __builtin_memcpy(&bits, plane + 2 * part, 2);
  return bits;
}

LUTRA_INLINE const uint8_t* block_row(const FastScanArgs& a, int64_t row) {
  return a.codes + row / 16 * ((a.m + 7) / 8) * 64 + row % 16 * 4;
}

// sum_j rotated[j] * value(row, j)
LUTRA_INLINE float plane_sum(const FastScanArgs& a, const float* rotated, int64_t row) {
  const int64_t parts = parts_of(a.d), stride = 2 * parts;
  const uint8_t *block = block_row(a, row), *low = a.low + row * (a.planes - 1) * stride;
#if defined(LUTRA_LEVEL_v4)
  const __m512i one = _mm512_set1_epi32(1);
  const __m512 center = _mm512_set1_ps(static_cast<float>((1 << a.planes) - 1) / 2);
  const __mmask16 some = static_cast<__mmask16>(a.planes >= 4 ? 0xffff : (1u << (1 << a.planes)) - 1);
  const __m512 levels = a.levels ? _mm512_maskz_loadu_ps(some, a.levels) : _mm512_setzero_ps();
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t part = 0; part < parts; ++part) {
    __m512i u = _mm512_maskz_mov_epi32(static_cast<__mmask16>(high_bits(block, part)), one);
    for (int64_t p = 0; p < a.planes - 1; ++p) {
      u = _mm512_add_epi32(u, u);
      u = _mm512_mask_add_epi32(u, static_cast<__mmask16>(low_bits(low + p * stride, part)), u, one);
    }
    const __m512 value = a.levels ? _mm512_permutexvar_ps(u, levels) : _mm512_sub_ps(_mm512_cvtepi32_ps(u), center);
    sum[part & 1] = _mm512_fmadd_ps(_mm512_loadu_ps(rotated + part * kPart), value, sum[part & 1]);
  }
  return reduce_add((vf)_mm512_add_ps(sum[0], sum[1]));
#else
  const float center = static_cast<float>((1 << a.planes) - 1) / 2;
  float sum[kPart] = {};
  for (int64_t part = 0; part < parts; ++part) {
    uint32_t u[kPart];
    const uint32_t top = high_bits(block, part);
    for (int j = 0; j < kPart; ++j) u[j] = top >> j & 1;
    for (int64_t p = 0; p < a.planes - 1; ++p) {
      const uint32_t bits = low_bits(low + p * stride, part);
      for (int j = 0; j < kPart; ++j) u[j] = 2 * u[j] + (bits >> j & 1);
    }
    const float* q = rotated + part * kPart;
    for (int j = 0; j < kPart; ++j) sum[j] += q[j] * (a.levels ? a.levels[u[j]] : static_cast<float>(u[j]) - center);
  }
  for (int step = kPart / 2; step > 0; step /= 2)
    for (int j = 0; j < step; ++j) sum[j] += sum[j + step];
  return sum[0];
#endif
}

LUTRA_INLINE void fetch_planes(const FastScanArgs& a, int64_t row) {
  const int64_t parts = parts_of(a.d), bytes = (a.planes - 1) * 2 * parts;
  const uint8_t *block = block_row(a, row), *low = a.low + row * bytes;
  for (int64_t g = 0; g < (parts + 1) / 2; ++g) __builtin_prefetch(block + g * 64);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(low + at);
  __builtin_prefetch(low + bytes - 1);
  if (a.mul) __builtin_prefetch(a.mul + row);
  if (a.add) __builtin_prefetch(a.add + row);
}

// `base` and `sign` as of keys: greater is better.
LUTRA_INLINE float full_key(const FastScanArgs& a, const float* rotated, float base, float sign, int64_t row) {
  float score = plane_sum(a, rotated, row);
  if (a.mul) score *= a.mul[row];
  if (a.add) score += a.add[row];
  return base + sign * score;
}

// Full keys of candidates, in their places of `to`; `off` has room for their number. False where a row that is none of
// them could be among the `k` best. The answer must not depend on the order of the candidates, which the threads
// decide: so differences are summed as integers.
static bool full_keys(const FastScanArgs& a, const float* rotated, float base, float sign, const Candidates& from,
                      float* off, Candidates* to, int64_t* bad) {
  constexpr int64_t kFetched = 8;
  float worst = __builtin_inff(), largest = 0;
  for (int64_t c = 0; c < from.count + kFetched; ++c) {
    if (c < from.count) fetch_planes(a, candidate_id(from.packed[c]));
    if (c < kFetched) continue;
    const uint64_t packed = from.packed[c - kFetched];
    const int64_t row = candidate_id(packed);
    const float coarse = candidate_key(packed), key = full_key(a, rotated, base, sign, row);
    if (key - key != 0 && (*bad < 0 || row < *bad)) *bad = row;  // NaN or infinite
    off[c - kFetched] = key - coarse;
    largest = fabsf(key - coarse) > largest ? fabsf(key - coarse) : largest;
    worst = coarse < worst ? coarse : worst;
    to->packed[c - kFetched] = pack_candidate(key, row);
  }
  to->count = from.count;
  if (*bad >= 0 || from.count < from.want) return true;  // every row that there is was a candidate
  int64_t sum = 0, squares = 0;
  const float scale = largest > 0 ? 32767 / largest : 0;
  for (int64_t c = 0; c < from.count; ++c) {
    const auto unit = static_cast<int64_t>(off[c] * scale);
    sum += unit, squares += unit * unit;
  }
  const double count = static_cast<double>(from.count), mean = static_cast<double>(sum) / count;
  const double variance = static_cast<double>(squares) / count - mean * mean;
  // Those that the screen left out are off by as much as these on average, or more: it chose what it overrates.
  const double deviations = (mean > 0 ? mean : 0) + 3 * sqrt(variance > 0 ? variance : 0);
  const double reach = worst + (scale > 0 ? deviations / scale : 0);
  int64_t better = 0;  // of the candidates, those beyond what the others reach
  for (int64_t c = 0; c < to->count; ++c) better += candidate_key(to->packed[c]) >= reach;
  return better >= a.k;
}

}  // namespace fast_scan_planes
}  // namespace LUTRA_NS
}  // namespace lutra
