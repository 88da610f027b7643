// Sums of 4-bit look-ups for a tile of blocks and queries, at a SIMD level: exact integers, the same at every level.
//
// The tables of a query: for each group g of eight look-ups 128 bytes, [4][16] for the low four bits of the four bytes
// of a row, then [4][16] for the high. Two entries that share a byte sum up to at most 255.
#pragma once
#include "common/features.h"
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {
namespace fast_scan_tiles {

constexpr int kRows = 16;               // of a block
constexpr int kBlocks = 4;              // of a tile
constexpr int kTile = kRows * kBlocks;  // rows
constexpr int kQueries = 4;             // at most, of a tile
constexpr int64_t kGroupTables = 128;   // bytes
constexpr int64_t kAhead = 4096;        // bytes of codes that are fetched ahead

typedef int32_t Sums[kTile];

#if defined(LUTRA_LEVEL_v4)
#define LUTRA_VBMI __attribute__((target("avx512vnni,avx512vbmi")))

// Low four bits of each byte and the number of its table, as an index into 64 bytes: one VPTERNLOG.
#define LUTRA_INDEX(x, low, table) _mm512_ternarylogic_epi32(x, low, table, 0xEA)

// Q queries and B blocks. The codes of a group are taken apart once for all queries; a look-up is one VPERMB in four
// tables at once; entries that share a byte are added as bytes, then four bytes of a row to its sum by VPDPBUSD.
// Sums leave the registers only where one of them reaches its query's least. For several queries the addition is
// written as an instruction, because gcc 12 copies the sums for the intrinsic and stores nine of the sixteen in every
// turn.
template <int Q, int B>
LUTRA_VBMI static uint32_t sums_vbmi(const uint8_t* codes, int64_t groups, const uint8_t* const* tables,
                                     const int32_t* least, Sums* out) {
  const __m512i low = _mm512_set1_epi32(0x0f0f0f0f), table = _mm512_set1_epi32(0x30201000);
  const __m512i ones = _mm512_set1_epi32(0x01010101);
  __m512i sum[Q][B];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sum[q][b] = _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i lo[B], hi[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const __m512i x = _mm512_loadu_si512(codes + (b * groups + g) * 64);
      // In the order of addresses, which the loads are not: they would not start the processor's own prefetcher.
      __builtin_prefetch(codes + kAhead + (g * B + b) * 64);
      lo[b] = LUTRA_INDEX(x, low, table);
      hi[b] = LUTRA_INDEX(_mm512_srli_epi32(x, 4), low, table);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const __m512i first = _mm512_load_si512(tables[q] + g * kGroupTables);
      const __m512i second = _mm512_load_si512(tables[q] + g * kGroupTables + 64);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const __m512i pair =
            _mm512_add_epi8(_mm512_permutexvar_epi8(lo[b], first), _mm512_permutexvar_epi8(hi[b], second));
        if (Q == 1)
          sum[q][b] = _mm512_dpbusd_epi32(sum[q][b], pair, ones);
        else
          __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[q][b]) : "v"(pair), "v"(ones));
      }
    }
  }
  uint32_t some = 0;
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) {
    __m512i most = sum[q][0];
#pragma GCC unroll 4
    for (int b = 1; b < B; ++b) most = _mm512_max_epi32(most, sum[q][b]);
    some |= (_mm512_cmpge_epi32_mask(most, _mm512_set1_epi32(least[q])) != 0 ? 1u : 0u) << q;
  }
  if (__builtin_expect(some == 0, 1)) return 0;
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
    if (some >> q & 1) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) _mm512_storeu_si512(out[q] + b * kRows, sum[q][b]);
    }
  return some;
}
#undef LUTRA_INDEX
#endif

#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
// Two blocks at a time: the bytes of 32 rows are sorted by their place in the row, so that all bytes of a register
// look into one table of 16 (VPSHUFB). Sums of even and odd bytes are kept in 16 bits, enough for 64 groups.
template <int Q>
static void sums_avx2(const uint8_t* codes, const uint8_t* more, int64_t groups, const uint8_t* const* tables,
                      int32_t* const* out, int32_t* const* out_more) {
  const __m256i together = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                            0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i low = _mm256_set1_epi8(15), bytes = _mm256_set1_epi16(255);
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < kRows; ++r) out[q][r] = out_more[q][r] = 0;
  for (int64_t from = 0; from < groups; from += 64) {
    const int64_t to = from + 64 < groups ? from + 64 : groups;
    __m256i even[Q], odd[Q];
    for (int q = 0; q < Q; ++q) even[q] = odd[q] = _mm256_setzero_si256();
    for (int64_t g = from; g < to; ++g) {
      const __m256i* a = reinterpret_cast<const __m256i*>(codes + g * 64);
      const __m256i* b = reinterpret_cast<const __m256i*>(more + g * 64);
      const __m256i y0 = _mm256_shuffle_epi8(_mm256_loadu_si256(a), together);
      const __m256i y1 = _mm256_shuffle_epi8(_mm256_loadu_si256(a + 1), together);
      const __m256i y2 = _mm256_shuffle_epi8(_mm256_loadu_si256(b), together);
      const __m256i y3 = _mm256_shuffle_epi8(_mm256_loadu_si256(b + 1), together);
      const __m256i t0 = _mm256_unpacklo_epi32(y0, y1), t1 = _mm256_unpackhi_epi32(y0, y1);
      const __m256i t2 = _mm256_unpacklo_epi32(y2, y3), t3 = _mm256_unpackhi_epi32(y2, y3);
      const __m256i z[4] = {_mm256_unpacklo_epi64(t0, t2), _mm256_unpackhi_epi64(t0, t2), _mm256_unpacklo_epi64(t1, t3),
                            _mm256_unpackhi_epi64(t1, t3)};
      for (int i = 0; i < 4; ++i) {
        const __m256i lo = _mm256_and_si256(z[i], low), hi = _mm256_and_si256(_mm256_srli_epi16(z[i], 4), low);
        for (int q = 0; q < Q; ++q) {
          const uint8_t* t = tables[q] + g * kGroupTables + i * 16;
          const __m256i first = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t)));
          const __m256i second = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t + 64)));
          const __m256i pair = _mm256_add_epi8(_mm256_shuffle_epi8(first, lo), _mm256_shuffle_epi8(second, hi));
          even[q] = _mm256_add_epi16(even[q], _mm256_and_si256(pair, bytes));
          odd[q] = _mm256_add_epi16(odd[q], _mm256_srli_epi16(pair, 8));
        }
      }
    }
    for (int q = 0; q < Q; ++q) {
      alignas(32) uint16_t half[2][16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(half[0]), even[q]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(half[1]), odd[q]);
      for (int lane = 0; lane < 2; ++lane)
        for (int p = 0; p < 16; ++p) {  // byte p of a lane is row 8 (p / 4) + 4 lane + p % 4 of the 32
          const int row = 8 * (p / 4) + 4 * lane + p % 4, value = half[p & 1][lane * 8 + p / 2];
          (row < kRows ? out[q][row] : out_more[q][row - kRows]) += value;
        }
    }
  }
}

template <int Q, int B>
static void sums_shuffled(const uint8_t* codes, int64_t groups, const uint8_t* const* tables, Sums* out) {
  int32_t unused[Q][kRows];
  for (int b = 0; b < B; b += 2) {
    int32_t *first[Q], *second[Q];
    for (int q = 0; q < Q; ++q) {
      first[q] = out[q] + b * kRows;
      second[q] = b + 1 < B ? out[q] + (b + 1) * kRows : unused[q];
    }
    const uint8_t* at = codes + b * groups * 64;
    sums_avx2<Q>(at, b + 1 < B ? at + groups * 64 : at, groups, tables, first, second);
  }
}
#endif

template <int Q, int B>
static void sums_plain(const uint8_t* codes, int64_t groups, const uint8_t* const* tables, Sums* out) {
  for (int b = 0; b < B; ++b)
    for (int q = 0; q < Q; ++q) {
      int32_t* sum = out[q] + b * kRows;
      for (int r = 0; r < kRows; ++r) sum[r] = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const uint8_t *x = codes + (b * groups + g) * 64, *t = tables[q] + g * kGroupTables;
        for (int r = 0; r < kRows; ++r)
          for (int i = 0; i < 4; ++i) sum[r] += t[i * 16 + (x[r * 4 + i] & 15)] + t[64 + i * 16 + (x[r * 4 + i] >> 4)];
      }
    }
}

// A bit for each query that has a sum of `least` or more among these.
template <int Q, int B>
static uint32_t reached(const int32_t* least, const Sums* out) {
  uint32_t some = 0;
  for (int q = 0; q < Q; ++q) {
    int32_t most = out[q][0];
    for (int r = 1; r < B * kRows; ++r) most = out[q][r] > most ? out[q][r] : most;
    some |= static_cast<uint32_t>(most >= least[q]) << q;
  }
  return some;
}

template <int Q, int B>
LUTRA_INLINE uint32_t sums_of(const uint8_t* codes, int64_t groups, const uint8_t* const* tables, const int32_t* least,
                              Sums* out) {
#if defined(LUTRA_LEVEL_v4)
  if (g_features.vnni && g_features.vbmi) return sums_vbmi<Q, B>(codes, groups, tables, least, out);
#endif
#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
  sums_shuffled<Q, B>(codes, groups, tables, out);
#else
  sums_plain<Q, B>(codes, groups, tables, out);
#endif
  return reached<Q, B>(least, out);
}

// Sums of `blocks` <= kBlocks blocks, which lie one after another: out[q][row], for the queries whose bit is set in the
// result. Those are the ones of which a sum reaches least[q].
template <int Q>
LUTRA_INLINE uint32_t sums(const uint8_t* codes, int64_t groups, int blocks, const uint8_t* const* tables,
                           const int32_t* least, Sums* out) {
  switch (blocks) {
    case 1: return sums_of<Q, 1>(codes, groups, tables, least, out);
    case 2: return sums_of<Q, 2>(codes, groups, tables, least, out);
    case 3: return sums_of<Q, 3>(codes, groups, tables, least, out);
    default: return sums_of<Q, 4>(codes, groups, tables, least, out);
  }
}

}  // namespace fast_scan_tiles
}  // namespace LUTRA_NS
}  // namespace lutra
