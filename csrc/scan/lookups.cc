// Rows are taken in blocks. For a block, the codes of kColumns look-ups are put column by column (or, in fp32, a byte
// each row by row), then every token's sums go on over them: the columns are in the L1, the sums in the L1 or L2.
#include "scan/lookups.h"

#include "common/features.h"
#include "common/parallel.h"
#include "common/team.h"
#include "scan/emit.h"
#include "scan/lookups_codes.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int kVectors = 8;  // of 64 rows, in a block
constexpr int64_t kBlock = kVectors * 64;
constexpr int64_t kColumns = 32;        // look-ups at a time
constexpr int64_t kStretch = 256;       // look-ups whose sums of bytes fit 16 bits
constexpr int64_t kPass = 32;           // tokens at a time
constexpr int64_t kChunk = 8 * kBlock;  // rows of a task

// ------------------------------------------------------------------------------------------ in fp32
// One token at a time: four rows, whose chains of additions overlap. bytes: (rows, columns).
LUTRA_INLINE void single_sums(const float* table, int64_t sj, const uint8_t* bytes, int64_t columns, int64_t rows,
                              float* sums) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const uint8_t* c = bytes + r * columns;
    float s0 = sums[r], s1 = sums[r + 1], s2 = sums[r + 2], s3 = sums[r + 3];
    for (int64_t j = 0; j < columns; ++j) {
      const float* entry = table + j * sj;
      s0 += entry[c[j]], s1 += entry[c[columns + j]];
      s2 += entry[c[2 * columns + j]], s3 += entry[c[3 * columns + j]];
    }
    sums[r] = s0, sums[r + 1] = s1, sums[r + 2] = s2, sums[r + 3] = s3;
  }
  for (; r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j) sums[r] += table[j * sj + bytes[r * columns + j]];
}

// W tokens in lanes; table: (columns, entries, W), sums: (rows, W).
template <int R>
LUTRA_INLINE void lane_sums(const float* table, int64_t entries, const uint8_t* bytes, int64_t columns, float* sums) {
  vf sum[R];
  for (int r = 0; r < R; ++r) sum[r] = load(sums + r * W);
  for (int64_t j = 0; j < columns; ++j) {
    const float* t = table + j * entries * W;
    for (int r = 0; r < R; ++r) sum[r] += load(t + bytes[r * columns + j] * static_cast<int64_t>(W));
  }
  for (int r = 0; r < R; ++r) store(sums + r * W, sum[r]);
}

struct Floats {          // what the fp32 way needs: tokens by number, in lanes of W where there are enough
  const int32_t* token;  // (count,)
  int64_t count, groups;
  const float* lanes;  // (groups, m, entries, W)
};

void float_block(const LookupsArgs& a, const Floats& f, Selection* s, int64_t first, int64_t i0, int64_t rows,
                 uint8_t* bytes, float* sums) {
  const int64_t entries = int64_t{1} << a.bits, in_lanes = f.groups * W < f.count ? f.groups * W : f.count;
  float* singles = sums + f.groups * kBlock * W;
  memset(sums, 0, static_cast<size_t>((f.groups * kBlock * W + (f.count - in_lanes) * kBlock) * 4));
  for (int64_t j0 = 0; j0 < a.m; j0 += kColumns) {
    const int64_t j1 = j0 + kColumns < a.m ? j0 + kColumns : a.m, columns = j1 - j0;
    for (int64_t r = 0; r < rows; ++r)
      unpack_codes(a.codes + (i0 + r) * a.row_bytes, a.bits, j0, j1, bytes + r * columns);
    for (int64_t g = 0; g < f.groups; ++g) {
      const float* table = f.lanes + (g * a.m + j0) * entries * W;
      float* to = sums + g * kBlock * W;
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) lane_sums<4>(table, entries, bytes + r * columns, columns, to + r * W);
      for (; r < rows; ++r) lane_sums<1>(table, entries, bytes + r * columns, columns, to + r * W);
    }
    for (int64_t q = in_lanes; q < f.count; ++q)
      single_sums(a.tables + (first + f.token[q]) * a.st + j0 * a.sj, a.sj, bytes, columns, rows,
                  singles + (q - in_lanes) * kBlock);
  }
  alignas(64) float row[kBlock];
  for (int64_t q = 0; q < in_lanes; ++q) {
    const float* from = sums + q / W * kBlock * W + q % W;
    for (int64_t r = 0; r < rows; ++r) row[r] = from[r * W];
    emit(Emit{a.bias, a.out, a.dtype, a.ldo}, s, first, f.token[q], i0, rows, row);
  }
  for (int64_t q = in_lanes; q < f.count; ++q)
    emit(Emit{a.bias, a.out, a.dtype, a.ldo}, s, first, f.token[q], i0, rows, singles + (q - in_lanes) * kBlock);
}

#if defined(LUTRA_LEVEL_v4)
// ------------------------------------------------------------------------------------------ in integers
#define LUTRA_VBMI_LOOKUPS __attribute__((target("avx512vbmi")))

// Bytes of the table of one look-up: the entries, rounded up to a register.
LUTRA_INLINE int64_t table_bytes(int bits) { return bits < 6 ? 64 : int64_t{1} << bits; }

struct Rounded {     // one token's tables
  uint8_t* bytes;    // (planes, m, table_bytes): the lowest byte of each entry first
  float step, base;  // sum = base + step (sum of entries - m 2^(8 planes - 1))
};

// False where an entry is not finite.
bool round_tables(const float* tables, int64_t sj, int64_t m, int bits, int planes, Rounded* out) {
  const int64_t entries = int64_t{1} << bits, size = table_bytes(bits);
  float widest = 0;
  double base = 0;
  vf wrong = {};
  for (int64_t j = 0; j < m; ++j) {
    const float* t = tables + j * sj;
    float low = t[0], high = t[0];
    int64_t c = 0;
    if (entries >= W) {
      vf l = load(t), h = l;
      for (; c < entries; c += W) {
        const vf x = load(t + c);
        l = x < l ? x : l, h = x > h ? x : h;
        wrong += x * 0.0f;
      }
      for (int i = 0; i < W; ++i) low = l[i] < low ? l[i] : low, high = h[i] > high ? h[i] : high;
    }
    for (; c < entries; ++c) {
      low = t[c] < low ? t[c] : low, high = t[c] > high ? t[c] : high;
      wrong[0] += t[c] * 0.0f;
    }
    const float middle = low + (high - low) * 0.5f;
    base += middle;
    // where the offset is large against the range, the middle is rounded by more than a step
    const float reach = high - middle > middle - low ? high - middle : middle - low;
    widest = reach > widest ? reach : widest;
  }
  const float all = reduce_add(wrong);
  const float half = planes == 3 ? 8388600.0f : 32766.0f;  // short of 2^23 by what rounding may add
  const float step = widest / half;
  if (all != 0 || !(widest < __builtin_inff()) || (widest > 0 && !(1 / step < __builtin_inff()))) return false;
  out->step = widest > 0 ? step : 1.0f;
  out->base = static_cast<float>(base);
  const vf per = splat(1 / out->step);
  const int64_t plane = m * size;
  for (int64_t j = 0; j < m; ++j) {
    const float* t = tables + j * sj;
    uint8_t* to = out->bytes + j * size;
    float low = t[0], high = t[0];
    for (int64_t c = 0; c < entries; ++c) low = t[c] < low ? t[c] : low, high = t[c] > high ? t[c] : high;
    const vf middle = splat(low + (high - low) * 0.5f);
    for (int64_t c = 0; c < size; c += W) {
      const int64_t left = entries - c;
      const vf x = left >= W ? load(t + c) : left > 0 ? load_first(t + c, static_cast<int>(left)) : middle;
      const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32((__m512)((x - middle) * per)),
                                         _mm512_set1_epi32(planes == 3 ? 1 << 23 : 1 << 15));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c), _mm512_cvtepi32_epi8(q));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + plane + c), _mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 8)));
      if (planes == 3)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * plane + c),
                         _mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 16)));
    }
  }
  return true;
}

// sums[0][v]: of the looked-up bytes with their neighbours, as 16 bits; sums[1][v]: of the odd ones. (The sum of the
// even ones is the first less 256 times the second, modulo 2^16, which it does not reach.)
typedef uint16_t Pairs[2][kVectors][32];

template <int B>  // registers of a table: 1, 2 or 4
LUTRA_VBMI_LOOKUPS void look_up(const uint8_t* table, const uint8_t* columns, int64_t count, bool begin, Pairs* sums) {
  __m512i all[kVectors], odd[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    all[v] = begin ? _mm512_setzero_si512() : _mm512_load_si512((*sums)[0][v]);
    odd[v] = begin ? _mm512_setzero_si512() : _mm512_load_si512((*sums)[1][v]);
  }
  for (int64_t j = 0; j < count; ++j, table += 64 * B, columns += kBlock) {
    const __m512i t0 = _mm512_load_si512(table), t1 = B > 1 ? _mm512_load_si512(table + 64) : t0;
    const __m512i t2 = B > 2 ? _mm512_load_si512(table + 128) : t0, t3 = B > 2 ? _mm512_load_si512(table + 192) : t0;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const __m512i c = _mm512_load_si512(columns + v * 64);
      __m512i x;
      if (B == 1) {
        x = _mm512_permutexvar_epi8(c, t0);
      } else {
        x = _mm512_permutex2var_epi8(t0, c, t1);
        if (B > 2) x = _mm512_mask_mov_epi8(x, _mm512_movepi8_mask(c), _mm512_permutex2var_epi8(t2, c, t3));
      }
      all[v] = _mm512_add_epi16(all[v], x);
      odd[v] = _mm512_add_epi16(odd[v], _mm512_srli_epi16(x, 8));
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    _mm512_store_si512((*sums)[0][v], all[v]);
    _mm512_store_si512((*sums)[1][v], odd[v]);
  }
}

// Sums of bytes to scores, added to what `scores` holds unless `begin`.
void put_together(const Pairs* sums, int planes, int64_t looked_up, const Rounded& table, bool begin, float* scores) {
  const __m512i low = _mm512_set1_epi32(0xffff);
  const __m512i middle = _mm512_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(looked_up) << (8 * planes - 1)));
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const vf step = splat(table.step), base = splat(begin ? table.base : 0.0f);
  for (int v = 0; v < kVectors; ++v) {
    __m512i even_rows[2] = {}, odd_rows[2] = {};  // 16 pairs of rows each: the low half of a pair is the even row
    for (int p = 0; p < planes; ++p) {
      const __m512i odd = _mm512_load_si512(sums[p][1][v]);
      const __m512i even = _mm512_sub_epi16(_mm512_load_si512(sums[p][0][v]), _mm512_slli_epi16(odd, 8));
      // a 32-bit lane holds two 16-bit sums: of rows 4 l and 4 l + 2 (even), 4 l + 1 and 4 l + 3 (odd)
      const __m512i e0 = _mm512_and_si512(even, low), e1 = _mm512_srli_epi32(even, 16);
      const __m512i o0 = _mm512_and_si512(odd, low), o1 = _mm512_srli_epi32(odd, 16);
      const int shift = 8 * p;
      even_rows[0] = _mm512_add_epi32(even_rows[0], _mm512_slli_epi32(e0, shift));
      even_rows[1] = _mm512_add_epi32(even_rows[1], _mm512_slli_epi32(e1, shift));
      odd_rows[0] = _mm512_add_epi32(odd_rows[0], _mm512_slli_epi32(o0, shift));
      odd_rows[1] = _mm512_add_epi32(odd_rows[1], _mm512_slli_epi32(o1, shift));
    }
    // rows 4 l, 4 l + 1, 4 l + 2, 4 l + 3 lie in lane l of four registers: to the order of rows
    float* to = scores + v * 64;
    const auto score = [&](__m512i q) {
      return __builtin_convertvector((vi)_mm512_sub_epi32(q, middle), vf) * step + base;
    };
    const __m512i r0 = (__m512i)score(even_rows[0]), r1 = (__m512i)score(odd_rows[0]);
    const __m512i r2 = (__m512i)score(even_rows[1]), r3 = (__m512i)score(odd_rows[1]);
    for (int half = 0; half < 2; ++half) {
      const __m512i order = half ? second : first;
      const __m512i a = _mm512_permutex2var_epi32(r0, order, r1);  // pairs of rows 4 l, 4 l + 1
      const __m512i b = _mm512_permutex2var_epi32(r2, order, r3);
      const __m512i pick0 = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                    pick1 = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
      vf x = (vf)_mm512_permutex2var_epi64(a, pick0, b), y = (vf)_mm512_permutex2var_epi64(a, pick1, b);
      float* at = to + half * 32;
      store(at, begin ? x : load(at) + x);
      store(at + W, begin ? y : load(at + W) + y);
    }
  }
}

// The codes of look-ups [j0, j1) of the rows of a block, column by column.
void columns_of(const LookupsArgs& a, int64_t i0, int64_t rows, int64_t j0, int64_t j1, uint8_t* bytes, uint8_t* out) {
  const int64_t count = j1 - j0, padded = (count + 15) / 16 * 16;
  const uint8_t* end = a.codes + a.n * a.row_bytes;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t r0 = v * 64, left = rows - r0;
    if (left <= 0) {
      for (int64_t j = 0; j < count; ++j) memset(out + j * kBlock + r0, 0, 64);
      continue;
    }
    const uint8_t* from = a.codes + (i0 + r0) * a.row_bytes;
    const uint8_t* ahead = from + kBlock * a.row_bytes + j0 * a.bits / 8;  // the same of the next block
    for (int r = 0; r < 64; ++r) __builtin_prefetch(ahead + r * a.row_bytes);
    if (a.bits == 4 && left >= 64 && j0 % 32 == 0 && end - from >= 63 * a.row_bytes + j0 / 2 + 16) {
      alignas(64) uint8_t nibbles[16 * 64];
      transpose_64x16(from + j0 / 2, a.row_bytes, nibbles, 64);
      const __m512i low = _mm512_set1_epi8(15);
      for (int64_t j = 0; j < count; ++j) {
        const __m512i x = _mm512_load_si512(nibbles + j / 2 * 64);
        _mm512_store_si512(out + j * kBlock + r0, _mm512_and_si512(j & 1 ? _mm512_srli_epi16(x, 4) : x, low));
      }
      continue;
    }
    int64_t stride = a.row_bytes;
    const uint8_t* source = from + j0;
    if (a.bits != 8 || left < 64 || end - from < 63 * stride + j0 + padded) {
      stride = kColumns;
      source = bytes;
      for (int64_t r = 0; r < 64; ++r) {
        if (r < left)
          unpack_codes(from + r * a.row_bytes, a.bits, j0, j1, bytes + r * kColumns);
        else
          memset(bytes + r * kColumns, 0, kColumns);
      }
    }
    for (int64_t j = 0; j < padded; j += 16) transpose_64x16(source + j, stride, out + j * kBlock + r0, kBlock);
  }
}

void rounded_block(const LookupsArgs& a, const Rounded* tables, const int32_t* token, int64_t count, int planes,
                   Selection* s, int64_t first, int64_t i0, int64_t rows, uint8_t* bytes, uint8_t* columns, Pairs* sums,
                   float* scores) {
  const int64_t size = table_bytes(a.bits), plane = a.m * size;
  for (int64_t j0 = 0; j0 < a.m; j0 += kColumns) {
    const int64_t j1 = j0 + kColumns < a.m ? j0 + kColumns : a.m, begun = j0 % kStretch;
    columns_of(a, i0, rows, j0, j1, bytes, columns);
    const bool ends = j1 == a.m || j1 % kStretch == 0;
    for (int64_t t = 0; t < count; ++t) {
      for (int p = 0; p < planes; ++p) {
        const uint8_t* table = tables[t].bytes + p * plane + j0 * size;
        Pairs* to = sums + t * planes + p;
        if (a.bits == 8)
          look_up<4>(table, columns, j1 - j0, begun == 0, to);
        else if (a.bits == 7)
          look_up<2>(table, columns, j1 - j0, begun == 0, to);
        else
          look_up<1>(table, columns, j1 - j0, begun == 0, to);
      }
      if (!ends) continue;
      float* row = scores + (a.m > kStretch ? t * kBlock : 0);
      put_together(sums + t * planes, planes, j1 - (j0 - begun), tables[t], j1 <= kStretch, row);
      if (j1 == a.m) emit(Emit{a.bias, a.out, a.dtype, a.ldo}, s, first, token[t], i0, rows, row);
    }
  }
}
#endif

// ------------------------------------------------------------------------------------------ a pass over the codes
struct Scratch {  // of a thread
  Buffer<uint8_t> bytes, columns;
  Buffer<float> scores;
  Buffer<uint16_t> sums;
  Scratch(int64_t floats, int64_t pairs)
      : bytes(kBlock * kColumns), columns(kBlock * kColumns), scores(floats), sums(pairs) {}
};

// Tokens [first, first + tokens), at most kPass.
void pass(const LookupsArgs& a, int64_t first, int64_t tokens, Selections* selections, int threads) {
  const int64_t entries = int64_t{1} << a.bits;
  int32_t exact[kPass];
  int64_t exact_count = 0, rounded_count = 0;
#if defined(LUTRA_LEVEL_v4)
  int32_t rounded[kPass];
  const int planes = a.k > 0 || a.dtype == DType::f32 ? 3 : 2;
  const int64_t size = planes * a.m * table_bytes(a.bits);
  const bool integers = g_features.vbmi;
  Rounded tables[kPass];
  Buffer<uint8_t> table_memory(integers ? tokens * size : 0);
  if (integers) {
    bool good[kPass];
    team_for(tokens, tokens * a.m * entries * 0.5, [&](int64_t t) {
      Rounded r = {table_memory.data + t * size, 1, 0};
      good[t] = round_tables(a.tables + (first + t) * a.st, a.sj, a.m, a.bits, planes, &r);
      tables[t] = r;
    });
    for (int64_t t = 0; t < tokens; ++t) {
      if (good[t]) {
        tables[rounded_count] = tables[t];
        rounded[rounded_count++] = static_cast<int32_t>(t);
      } else {
        exact[exact_count++] = static_cast<int32_t>(t);
      }
    }
  } else {
    for (int64_t t = 0; t < tokens; ++t) exact[exact_count++] = static_cast<int32_t>(t);
  }
#else
  for (int64_t t = 0; t < tokens; ++t) exact[exact_count++] = static_cast<int32_t>(t);
#endif
  const int64_t groups = exact_count / W + (exact_count % W > W / 4 ? 1 : 0);
  Buffer<float> lanes(groups * a.m * entries * W);
  if (groups)
    team_for(groups * a.m, groups * a.m * entries * 4.0, [&](int64_t x) {
      const int64_t g = x / a.m, j = x % a.m;
      float* to = lanes.data + x * entries * W;
      for (int w = 0; w < W; ++w) {
        const int64_t q = g * W + w;
        const float* from = q < exact_count ? a.tables + (first + exact[q]) * a.st + j * a.sj : nullptr;
        for (int64_t c = 0; c < entries; ++c) to[c * W + w] = from ? from[c] : 0.0f;
      }
    });
  const Floats floats{exact, exact_count, groups, lanes.data};
  const int64_t many = (groups * W + exact_count) * kBlock;
  const int64_t chunks = (a.n + kChunk - 1) / kChunk;
  const auto rows_of = [&](Scratch* scratch, Selection* s, int64_t begin, int64_t end) {
    for (int64_t i0 = begin; i0 < end; i0 += kBlock) {
      const int64_t rows = end - i0 < kBlock ? end - i0 : kBlock;
#if defined(LUTRA_LEVEL_v4)
      if (rounded_count)
        rounded_block(a, tables, rounded, rounded_count, planes, s, first, i0, rows, scratch->bytes.data,
                      scratch->columns.data, reinterpret_cast<Pairs*>(scratch->sums.data), scratch->scores.data);
#endif
      if (exact_count) float_block(a, floats, s, first, i0, rows, scratch->bytes.data, scratch->scores.data);
    }
  };
  const int64_t own = rounded_count * kBlock > many ? rounded_count * kBlock : many;
  const int64_t pairs = rounded_count * 3 * 2 * kBlock / 2;  // of Pairs, in 16 bits
  const double cost = static_cast<double>(a.n) * a.m * (rounded_count * 0.06 + exact_count * 0.3 + 0.1);
  if (selections) {
    scan_blocks(a.n, kChunk, threads, [&](int slot, int64_t begin, int64_t end) {
      Scratch scratch(own, pairs);
      rows_of(&scratch, selections->of_thread(slot), begin, end);
    });
    return;
  }
  team_for(chunks, cost, [&](int64_t c) {
    Scratch scratch(own, pairs);
    rows_of(&scratch, nullptr, c * kChunk, (c + 1) * kChunk < a.n ? (c + 1) * kChunk : a.n);
  });
}

}  // namespace

void lookups(const LookupsArgs& a) {
  const double cost = static_cast<double>(a.tokens) * a.n * a.m * 0.1;
  const int threads = cost < 60e3 ? 1 : num_threads();
  int64_t most = kPass;
  if (a.k > 0) {
    const int64_t fit = pass_queries(a.k, a.n, threads, 1);
    most = fit < most ? fit : most;
  }
  for (int64_t first = 0; first < a.tokens; first += most) {
    const int64_t tokens = a.tokens - first < most ? a.tokens - first : most;
    if (a.k > 0) {
      Selections selections(threads, tokens, a.k, a.n, Metric::ip);
      pass(a, first, tokens, &selections, threads);
      selections.finish(first, a.scores, a.ids, a.bad);
    } else {
      pass(a, first, tokens, nullptr, threads);
    }
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
