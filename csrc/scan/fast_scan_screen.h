// Screen of scalar codes (fast_scan.h) by the highest bit of each entry, at a SIMD level.
#pragma once
#include <math.h>

#include "common/parallel.h"
#include "common/select.h"
#include "common/simd.h"
#include "scan/candidates.h"
#include "scan/fast_scan.h"
#include "scan/fast_scan_tables.h"

namespace lutra {
namespace LUTRA_NS {
namespace fast_scan_screen {

constexpr int kPart = 16;  // dimensions that are decoded together: two groups of eight

using fast_scan_tables::groups_of;

LUTRA_INLINE int64_t parts_of(int64_t m) { return (m + kPart - 1) / kPart; }
LUTRA_INLINE int64_t padded(int64_t m) { return parts_of(m) * kPart; }  // values of a rotated query

// ---- the highest bits as entries of four dimensions
// Four groups of a row (32 dimensions) become one: byte i has, from its lowest bit on, the bits of dimensions i and i +
// 4 of the first group, then of the second, third and fourth. So this is bitwise work in each 32-bit word.
LUTRA_INLINE int64_t dimension_of(int64_t entry, int bit) {
  const int64_t group = entry / 8 * 4 + entry % 8 / 4 * 2 + bit / 2;
  return group * 8 + bit % 2 * 4 + entry % 4;
}

// `blocks` blocks of whole codes to blocks of highest bits, (m + 31) / 32 groups each.
static inline void highest_bits(const uint8_t* codes, int64_t m, int64_t bits, int64_t blocks, uint8_t* to) {
  const int64_t groups = groups_of(m), screened = (groups + 3) / 4;
  const int low = static_cast<int>(bits) - 1, high = low + 4;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t s = 0; s < screened; ++s) {
      const uint8_t* from = codes + (b * groups + 4 * s) * 64;
      const int some = static_cast<int>(groups - 4 * s < 4 ? groups - 4 * s : 4);
      for (int64_t at = 0; at < 64; at += 4 * W) {  // bytes: W rows
        vi out = {};
        for (int h = 0; h < some; ++h) {
          const vi word = *reinterpret_cast<const vi_unaligned*>(from + h * 64 + at);
          out |= ((word >> low & 0x01010101) | (word >> high & 0x01010101) << 1) << (2 * h);
        }
        *reinterpret_cast<vi_unaligned*>(to + (b * screened + s) * 64 + at) = out;
      }
    }
}

// ---- a query
// What the tables are made of: table[j][c] = rotated[j] * levels[c].
static inline void rotated_of(const FastScanArgs& a, int64_t i, float* rotated) {
  const int last = (1 << a.bits) - 1;
  const float per = 1 / (a.levels[last] - a.levels[0]);
  const float* t = a.tables + i * a.m * 16;
  for (int64_t j = 0; j < padded(a.m); ++j) rotated[j] = j < a.m ? (t[j * 16 + last] - t[j * 16]) * per : 0.0f;
}

// Tables of the highest bits, +-high for each: (m', 16).
static inline void screen_tables(const FastScanArgs& a, const float* rotated, int64_t entries, float* tables) {
  for (int64_t e = 0; e < entries; ++e) {
    float part[4];
    for (int b = 0; b < 4; ++b) {
      const int64_t j = dimension_of(e, b);
      part[b] = j < a.m ? a.high * rotated[j] : 0.0f;
    }
    for (int c = 0; c < 16; ++c) {
      float sum = 0;
      for (int b = 0; b < 4; ++b) sum += c >> b & 1 ? part[b] : -part[b];
      tables[e * 16 + c] = sum;
    }
  }
}

// ---- full scores
LUTRA_INLINE const uint8_t* block_row(const uint8_t* codes, int64_t m, int64_t row) {
  return codes + row / 16 * groups_of(m) * 64 + row % 16 * 4;
}

// sum_j rotated[j] * levels[entry j]
LUTRA_INLINE float whole_sum(const FastScanArgs& a, const float* rotated, int64_t row) {
  const uint8_t* block = block_row(a.codes, a.m, row);
  const int64_t groups = groups_of(a.m), parts = parts_of(a.m);
#if defined(LUTRA_LEVEL_v4)
  const auto some = static_cast<__mmask16>(a.bits >= 4 ? 0xffff : (1u << (1 << a.bits)) - 1);
  const __m512 levels = _mm512_maskz_loadu_ps(some, a.levels);
  const __m128i low = _mm_set1_epi8(15);
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t part = 0; part < parts; ++part) {
    uint32_t first, second = 0;
    __builtin_memcpy(&first, block + 2 * part * 64, 4);
    if (2 * part + 1 < groups) __builtin_memcpy(&second, block + (2 * part + 1) * 64, 4);
    const __m128i words = _mm_cvtsi64_si128(static_cast<int64_t>(first | static_cast<uint64_t>(second) << 32));
    const __m128i entries = _mm_unpacklo_epi32(_mm_and_si128(words, low), _mm_and_si128(_mm_srli_epi16(words, 4), low));
    const __m512 value = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(entries), levels);
    sum[part & 1] = _mm512_fmadd_ps(_mm512_loadu_ps(rotated + part * kPart), value, sum[part & 1]);
  }
  return reduce_add((vf)_mm512_add_ps(sum[0], sum[1]));
#else
  const int most = (1 << a.bits) - 1;
  float sum[kPart] = {};
  for (int64_t part = 0; part < parts; ++part)
    for (int h = 0; h < 2 && 2 * part + h < groups; ++h) {
      const uint8_t* bytes = block + (2 * part + h) * 64;
      const float* q = rotated + part * kPart + h * 8;
      for (int i = 0; i < 4; ++i) {
        sum[h * 8 + i] += q[i] * a.levels[bytes[i] & 15 & most];
        sum[h * 8 + 4 + i] += q[4 + i] * a.levels[bytes[i] >> 4 & most];
      }
    }
  for (int step = kPart / 2; step > 0; step /= 2)
    for (int j = 0; j < step; ++j) sum[j] += sum[j + step];
  return sum[0];
#endif
}

LUTRA_INLINE void fetch_row(const FastScanArgs& a, int64_t row) {
  const uint8_t* block = block_row(a.codes, a.m, row);
  for (int64_t g = 0; g < groups_of(a.m); ++g) __builtin_prefetch(block + g * 64);
  if (a.mul) __builtin_prefetch(a.mul + row);
  if (a.add) __builtin_prefetch(a.add + row);
}

// How many of the k best are likely to be missing where `count` candidates were taken by their coarse keys, the worst
// of which is `worst`. Below it the number of rows is taken to grow as it does above, exponentially (by the mean
// excess); what a full key is off from the coarse one to be normal, with a mean that depends on the coarse key
// linearly. Then
//   missing = count (exp(a^2 / 2 - a z) Q(z - a) - Q(z)),  Q(z) = erfc(z / sqrt 2) / 2,
// with a the standard deviation over the mean excess and z how many deviations the worst would need to reach the k-th
// best. In trials (Gaussian, clustered, sentence embeddings; k 10 to 1000) within a factor of 3 where it matters.
// Sums are of integers: the order of the candidates, which the threads decide, must not matter.
static double missing(const float* coarse, const float* off, int64_t count, float worst, float kth) {
  float far = 0, largest = 0;
  for (int64_t c = 0; c < count; ++c) {
    far = coarse[c] - worst > far ? coarse[c] - worst : far;
    largest = fabsf(off[c]) > largest ? fabsf(off[c]) : largest;
  }
  if (!(far > 0)) return 1e30;  // nothing to go by
  const float per_x = 32767 / far, per_y = largest > 0 ? 32767 / largest : 0;
  int64_t sum_x = 0, sum_y = 0, sum_xx = 0, sum_xy = 0, sum_yy = 0;
  for (int64_t c = 0; c < count; ++c) {
    const auto x = static_cast<int64_t>((coarse[c] - worst) * per_x), y = static_cast<int64_t>(off[c] * per_y);
    sum_x += x, sum_y += y, sum_xx += x * x, sum_xy += x * y, sum_yy += y * y;
  }
  const double n = static_cast<double>(count), unit_x = 1 / static_cast<double>(per_x);
  const double unit_y = per_y > 0 ? 1 / static_cast<double>(per_y) : 0;
  const double mean_x = sum_x / n * unit_x, mean_y = sum_y / n * unit_y;
  const double xx = sum_xx / n * unit_x * unit_x - mean_x * mean_x, yy = sum_yy / n * unit_y * unit_y - mean_y * mean_y;
  const double xy = sum_xy / n * unit_x * unit_y - mean_x * mean_y, slope = xx > 0 ? xy / xx : 0;
  const double variance = yy - slope * slope * xx, deviation = variance > 0 ? sqrt(variance) : 0;
  const double at_worst = mean_y - slope * mean_x, falls = slope < -0.9 ? 0.1 : slope > 0 ? 1 : 1 + slope;
  if (!(mean_x > 0)) return 1e30;
  const double gap = static_cast<double>(kth) - worst - at_worst;
  if (!(deviation > 0)) return gap > 0 ? 0 : 1e30;
  const double a = deviation / (mean_x * falls), z = gap / deviation, root = 0.70710678118654752;
  const double power = a * a / 2 - a * z;
  if (power > 50) return 1e30;
  return n * (exp(power) * erfc((z - a) * root) - erfc(z * root)) / 2;
}

// Candidates in the order of their full keys, in their places of `to`. False where `sure` is asked for and so few
// candidates are likely to miss more than a five-hundredth of the k best.
static bool full_keys(const FastScanArgs& a, const float* rotated, float base, float sign, bool sure,
                      const Candidates& from, Candidates* to, int64_t* bad) {
  constexpr int64_t kFetched = 4;
  Buffer<float> coarse(from.count), off(from.count);
  float worst = __builtin_inff();
  for (int64_t c = 0; c < from.count + kFetched; ++c) {
    if (c < from.count) fetch_row(a, candidate_id(from.packed[c]));
    if (c < kFetched) continue;
    const int64_t at = c - kFetched, row = candidate_id(from.packed[at]);
    float score = whole_sum(a, rotated, row);
    if (a.mul) score *= a.mul[row];
    if (a.add) score += a.add[row];
    const float key = base + sign * score;
    if (key - key != 0 && (*bad < 0 || row < *bad)) *bad = row;  // NaN or infinite
    coarse[at] = candidate_key(from.packed[at]);
    off[at] = key - coarse[at];
    worst = coarse[at] < worst ? coarse[at] : worst;
    to->packed[at] = pack_candidate(key, row);
  }
  to->count = from.count;
  if (!sure || *bad >= 0 || from.count < from.want) return true;  // every row that there is was a candidate
  to->want = a.k;
  cut(to);
  return missing(coarse.data, off.data, from.count, worst, candidate_key(to->worst)) <=
         0.002 * static_cast<double>(a.k);
}

}  // namespace fast_scan_screen
}  // namespace LUTRA_NS
}  // namespace lutra
