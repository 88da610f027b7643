// Screened: a panel's 512 codes of a sub-space are eight registers, and the 256 entries of its table four, so that two
// permutations of two registers each and a choice by the code's highest bit look 64 codes up. Sums are kept in 16 bits
// for 256 look-ups (256 * 255 < 2^16), in registers, then added to 32. A panel is taken by all queries of a pass, one
// after another, while its codes are in the L2; a query's rounded tables are a quarter of a kilobyte a look-up.
#include "scan/blocks_pq.h"

#include "common/features.h"
#include "scan/candidates.h"
#include "scan/panels.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kLanes = 512;
constexpr int64_t kEntries = 256;
constexpr int64_t kTableBytes = 48 << 20;  // of the queries of a pass
constexpr int64_t kAhead = 32;             // look-ups whose codes are fetched ahead

struct Query {
  const float* tables;     // (count, 256)
  uint8_t* rounded;        // likewise
  const int64_t* offsets;  // of the codes of each look-up in a panel
  int64_t count;
};

// The tables of the queries of a pass.
class Tables {
 public:
  Tables(const BlocksPqArgs& a, int64_t q0, int64_t queries, bool round)
      : all(queries), tables_(count_of(a, q0, queries) * kEntries),
        rounded_(round ? count_of(a, q0, queries) * kEntries : 0), offsets_(count_of(a, q0, queries)) {
    const int64_t e0 = a.q.ptr[q0], e1 = a.q.ptr[q0 + queries], depth = a.depth, dsub = a.q.width / depth;
    parallel_ranges(e1 - e0, 32, static_cast<double>(e1 - e0) * depth * dsub * 15, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e)
        for (int64_t s = 0; s < depth; ++s) {
          const int64_t j = a.q.blocks[e0 + e] * depth + s;
          offsets_[e * depth + s] = j * kLanes;
          fill(a.q.values + (e0 + e) * a.q.width + s * dsub, a.books + j * dsub * kEntries, dsub,
               tables_.data + (e * depth + s) * kEntries);
        }
    });
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t from = (a.q.ptr[q0 + i] - e0) * depth;
      all[i] = {tables_.data + from * kEntries, rounded_.data + (round ? from * kEntries : 0), offsets_.data + from,
                (a.q.ptr[q0 + i + 1] - a.q.ptr[q0 + i]) * depth};
    }
  }

  Buffer<Query> all;

 private:
  static int64_t count_of(const BlocksPqArgs& a, int64_t q0, int64_t queries) {
    return (a.q.ptr[q0 + queries] - a.q.ptr[q0]) * a.depth;
  }
  static void fill(const float* q, const float* book, int64_t dsub, float* table) {
    for (int64_t c = 0; c < kEntries; c += 4 * W) {
      vf sum[4] = {};
      for (int64_t d = 0; d < dsub; ++d)
        for (int v = 0; v < 4; ++v) sum[v] += splat(q[d]) * load(book + d * kEntries + c + v * W);
      for (int v = 0; v < 4; ++v) store(table + c + v * W, sum[v]);
    }
  }

  Buffer<float> tables_;
  Buffer<uint8_t> rounded_;
  Buffer<int64_t> offsets_;
};

// ------------------------------------------------------------------------------------------ fp32 tables
// Sums of `rows` vectors of a panel; four look-ups of a vector at a time, in their order.
void exact_sums(const Query& q, const uint8_t* panel, int64_t rows, float* sums) {
  memset(sums, 0, sizeof(float) * kLanes);
  int64_t j = 0;
  for (; j + 4 <= q.count; j += 4) {
    const float* t = q.tables + j * kEntries;
    const uint8_t* codes[4];
    for (int i = 0; i < 4; ++i) codes[i] = panel + q.offsets[j + i];
    const uint8_t* ahead = panel + q.offsets[j + kAhead < q.count ? j + kAhead : q.count - 1];
    for (int64_t r = 0; r < rows; r += 8) {
      uint64_t word[4];
      for (int i = 0; i < 4; ++i) memcpy(&word[i], codes[i] + r, 8);
      if (r % 64 == 0)
        for (int i = 0; i < 4; ++i) __builtin_prefetch(ahead + i * kLanes + r);
#pragma GCC unroll 8
      for (int l = 0; l < 8; ++l) {
        float sum = sums[r + l];
        for (int i = 0; i < 4; ++i) {
          sum += t[i * kEntries + (word[i] & 255)];
          word[i] >>= 8;
        }
        sums[r + l] = sum;
      }
    }
  }
  for (; j < q.count; ++j) {
    const float* t = q.tables + j * kEntries;
    const uint8_t* codes = panel + q.offsets[j];
    for (int64_t r = 0; r < rows; ++r) sums[r] += t[codes[r]];
  }
}

void exact_pass(const BlocksPqArgs& a, int64_t q0, int64_t queries, int threads) {
  const Tables tables(a, q0, queries, false);
  Selections selections(threads, queries, a.k, a.n, Metric::ip);
  Buffer<float> memory(threads * kLanes);
  scan_blocks(a.n, kLanes, threads, [&](int t, int64_t begin, int64_t end) {
    if (!any_kept(a.keep, begin, end - begin)) return;
    const auto* panel = reinterpret_cast<const uint8_t*>(a.panels[begin / kLanes]);
    float* sums = memory.data + t * kLanes;
    for (int64_t i = 0; i < queries; ++i) {
      exact_sums(tables.all[i], panel, end - begin, sums);
      offer_lanes(selections.of_thread(t), i, sums, begin, end - begin, a.keep);
    }
  });
  selections.finish(q0, a.scores, a.ids, a.bad);
}

// ------------------------------------------------------------------------------------------ rounded tables
#if defined(LUTRA_LEVEL_v4)
#define LUTRA_VBMI_BLOCKS __attribute__((target("avx512vbmi")))

// Of four vectors at a time, each a code of a line of its own: what takes long is to fetch them.
void exact_of(const Query& q, const uint8_t* const* codes, int count, float* out) {
  const uint8_t* at[4];
  for (int i = 0; i < 4; ++i) at[i] = codes[i < count ? i : 0];
  float sum[4] = {};
  for (int64_t j = 0; j < q.count; ++j) {
    const float* t = q.tables + j * kEntries;
    const int64_t offset = q.offsets[j];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] += t[at[i][offset]];
  }
  for (int i = 0; i < count; ++i) out[i] = sum[i];
}

void range_of(const float* table, float* low, float* high) {
  __m512 least = _mm512_loadu_ps(table), most = least;
  for (int64_t c = 16; c < kEntries; c += 16) {
    const __m512 x = _mm512_loadu_ps(table + c);
    least = _mm512_min_ps(least, x), most = _mm512_max_ps(most, x);
  }
  *low = _mm512_reduce_min_ps(least), *high = _mm512_reduce_max_ps(most);
}

// Each table from its own minimum on, in steps that are the same for all of a query.
void round_tables(const Query& q, uint8_t* out) {
  float range = 0, low, high;
  for (int64_t j = 0; j < q.count; ++j) {
    range_of(q.tables + j * kEntries, &low, &high);
    range = high - low > range ? high - low : range;
  }
  const float per = range > 0 && 255 / range < __builtin_inff() ? 255 / range : 0.0f;
  for (int64_t j = 0; j < q.count; ++j) {
    const float* t = q.tables + j * kEntries;
    range_of(t, &low, &high);
    for (int64_t c = 0; c < kEntries; c += 16) {
      const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(t + c), _mm512_set1_ps(low)), _mm512_set1_ps(per));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j * kEntries + c),
                       _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x)));
    }
  }
}

// Sums of all 512 vectors of a panel. Of the 64 of a register those with an even number come first.
LUTRA_VBMI_BLOCKS void rounded_sums(const Query& q, const uint8_t* panel, int32_t* sums) {
  constexpr int kParts = kLanes / 64;
  memset(sums, 0, sizeof(int32_t) * kLanes);
  for (int64_t from = 0; from < q.count; from += 256) {
    const int64_t to = from + 256 < q.count ? from + 256 : q.count;
    __m512i both[kParts], odd[kParts];  // 16 bits, modulo 2^16: odd bytes times 256, and even ones; odd bytes alone
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) both[p] = odd[p] = _mm512_setzero_si512();
    for (int64_t j = from; j < to; ++j) {
      const uint8_t* codes = panel + q.offsets[j];
      const uint8_t* ahead = panel + q.offsets[j + kAhead < q.count ? j + kAhead : q.count - 1];
      const uint8_t* t = q.rounded + j * kEntries;
      const __m512i t0 = _mm512_load_si512(t), t1 = _mm512_load_si512(t + 64);
      const __m512i t2 = _mm512_load_si512(t + 128), t3 = _mm512_load_si512(t + 192);
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p) {
        __builtin_prefetch(ahead + p * 64, 0, 2);
        const __m512i code = _mm512_loadu_si512(codes + p * 64);
        const __m512i low = _mm512_permutex2var_epi8(t0, code, t1), high = _mm512_permutex2var_epi8(t2, code, t3);
        const __m512i entry = _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
        both[p] = _mm512_add_epi16(both[p], entry);
        odd[p] = _mm512_add_epi16(odd[p], _mm512_srli_epi16(entry, 8));
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) {
      const __m512i half[2] = {_mm512_sub_epi16(both[p], _mm512_slli_epi16(odd[p], 8)), odd[p]};
      for (int h = 0; h < 2; ++h) {
        int32_t* at = sums + p * 64 + h * 32;
        const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(half[h]));
        const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(half[h], 1));
        _mm512_storeu_si512(at, _mm512_add_epi32(_mm512_loadu_si512(at), first));
        _mm512_storeu_si512(at + 16, _mm512_add_epi32(_mm512_loadu_si512(at + 16), second));
      }
    }
  }
}

void offer_rounded(Candidates* best, const int32_t* sums, int64_t first, int64_t rows, const uint8_t* keep) {
  for (int64_t i = 0; i < kLanes; i += W) {
    const vf score = __builtin_convertvector(*reinterpret_cast<const vi_unaligned*>(sums + i), vf);
    for (uint32_t m = mask_bits((vi)(score >= splat(best->threshold))); m; m &= m - 1) {
      const int64_t at = i + __builtin_ctz(m), row = at / 64 * 64 + at % 32 * 2 + at % 64 / 32;
      if (row >= rows || !kept(keep, first + row)) continue;
      const uint64_t packed = pack_candidate(static_cast<float>(sums[at]), first + row);
      if (packed <= best->worst) continue;
      if (best->count >= best->capacity) cut(best);
      best->packed[best->count++] = packed;
    }
  }
}

void screened_pass(const BlocksPqArgs& a, int64_t q0, int64_t queries, int threads) {
  const Tables tables(a, q0, queries, true);
  parallel_for(queries, static_cast<double>(a.q.ptr[q0 + queries] - a.q.ptr[q0]) * a.depth * 50,
               [&](int64_t i) { round_tables(tables.all[i], tables.all[i].rounded); });
  const int64_t screen = a.screen < a.n ? a.screen : a.n, capacity = candidates_capacity(screen);
  Buffer<Candidates> best(threads * queries);
  Buffer<uint64_t> memory(threads * queries * capacity);
  for (int64_t i = 0; i < threads * queries; ++i) candidates_start(&best[i], memory.data + i * capacity, screen);
  scan_blocks(a.n, kLanes, threads, [&](int t, int64_t begin, int64_t end) {
    if (!any_kept(a.keep, begin, end - begin)) return;
    const auto* panel = reinterpret_cast<const uint8_t*>(a.panels[begin / kLanes]);
    alignas(64) int32_t sums[kLanes];
    for (int64_t i = 0; i < queries; ++i) {
      rounded_sums(tables.all[i], panel, sums);
      offer_rounded(&best[t * queries + i], sums, begin, end - begin, a.keep);
    }
  });
  Buffer<int64_t> wrong(queries);
  parallel_for(queries, static_cast<double>(a.q.ptr[q0 + queries] - a.q.ptr[q0]) * a.depth * screen, [&](int64_t i) {
    Buffer<Candidates*> parts(threads);
    for (int t = 0; t < threads; ++t) parts[t] = &best[t * queries + i];
    candidates_merge(parts.data, threads);
    const int64_t found = candidates_sort(parts[0], false);
    const int64_t room = topk_capacity(a.k, a.n);
    Buffer<float> keys(room);
    Buffer<int64_t> ids(room);
    TopK top;
    topk_start(&top, a.k, room, keys.data, ids.data);
    wrong[i] = -1;
    for (int64_t c = 0; c < found; c += 4) {
      const int count = static_cast<int>(found - c < 4 ? found - c : 4);
      int64_t row[4];
      const uint8_t* codes[4];
      float score[4];
      for (int l = 0; l < count; ++l) {
        row[l] = candidate_id(parts[0]->packed[c + l]);
        codes[l] = reinterpret_cast<const uint8_t*>(a.panels[row[l] / kLanes]) + row[l] % kLanes;
      }
      exact_of(tables.all[i], codes, count, score);
      for (int l = 0; l < count; ++l)
        if (score[l] != score[l])
          wrong[i] = wrong[i] < 0 || row[l] < wrong[i] ? row[l] : wrong[i];
        else
          topk_offer(&top, score[l], row[l]);
    }
    TopK* const all[] = {&top};
    topk_finish(all, 1, a.k, 1.0f, a.scores + (q0 + i) * a.k, a.ids + (q0 + i) * a.k);
  });
  for (int64_t i = 0; i < queries; ++i)
    if (wrong[i] >= 0 && (*a.bad < 0 || wrong[i] < *a.bad)) *a.bad = wrong[i];
}
#endif

}  // namespace

void blocks_pq(const BlocksPqArgs& a) {
  const double lookups = static_cast<double>(a.q.ptr[a.q.nq]) * a.depth * a.n;
  const int threads = lookups * 0.05 < 40e3 ? 1 : num_threads();
  const int64_t within = pass_queries(a.k > a.screen ? a.k : a.screen, a.n, threads, 1);
  for (int64_t q0 = 0, count; q0 < a.q.nq; q0 += count) {
    for (count = 1; q0 + count < a.q.nq && count < within; ++count)
      if ((a.q.ptr[q0 + count + 1] - a.q.ptr[q0]) * a.depth * kEntries * 5 > kTableBytes) break;
#if defined(LUTRA_LEVEL_v4)
    if (g_features.vbmi) {
      screened_pass(a, q0, count, threads);
      continue;
    }
#endif
    exact_pass(a, q0, count, threads);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
