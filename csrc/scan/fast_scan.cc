// Flat: with many queries the threads share them, and groups of four queries go over a piece of the codes that stays
// in the L1; with few the threads share the rows, and their candidates are merged.
// Lists: the threads share the queries; a single one is shared out by its lists where that pays.
#include "scan/fast_scan.h"

#include "common/parallel.h"
#include "common/select.h"
#include "scan/candidates.h"
#include "scan/exact_row.h"
#include "scan/fast_scan_tiles.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

using namespace fast_scan_tiles;

constexpr int64_t kPiece = 16 << 10;  // bytes of codes that groups of queries go over in turn
constexpr int kShare = 64;            // queries of one piece of work

struct Query {
  const uint8_t* table;
  float step, least;  // sum = least + step * (sum of entries), in keys
  Candidates best;
};

float order_of(const FastScanArgs& a) { return a.metric == Metric::l2 ? -1.0f : 1.0f; }
int64_t groups_of(int64_t m) { return (m + 7) / 8; }
int64_t wanted(const FastScanArgs& a) {
  const int64_t count = a.candidates > 0 ? a.candidates : a.k;
  const int64_t most = a.repeated ? 2 * count : count;
  return most < a.n ? most : (a.n > 0 ? a.n : 1);
}

// ------------------------------------------------------------------------------------------ tables
void float_tables(const FastScanArgs& a, int64_t i, float* out) {
  const float sign = order_of(a);
  if (a.tables) {
    const float* t = a.tables + i * a.m * 16;
    for (int64_t e = 0; e < a.m * 16; ++e) out[e] = sign * t[e];
    return;
  }
  const float* q = a.queries + i * a.ldq;
  for (int64_t j = 0; j < a.m; ++j)
    for (int c = 0; c < 16; ++c) {
      const float *book = a.codebooks + (j * 16 + c) * a.dsub, *qj = q + j * a.dsub;
      float sum = 0;
      if (a.metric == Metric::l2)
        for (int64_t s = 0; s < a.dsub; ++s) sum -= (qj[s] - book[s]) * (qj[s] - book[s]);
      else
        for (int64_t s = 0; s < a.dsub; ++s) sum += qj[s] * book[s];
      out[j * 16 + c] = sum;
    }
}

// Place of entry 0 of look-up j.
int64_t place(int64_t j) { return j / 8 * kGroupTables + j % 8 * 16; }

// False where a table is not finite.
bool round_tables(const float* t, int64_t m, uint8_t* out, Query* query) {
  const int64_t padded = groups_of(m) * 8;
  float widest = 0, least = 0, range[8];
  for (int64_t j0 = 0; j0 < padded; j0 += 8) {
    for (int i = 0; i < 8; ++i) {
      range[i] = 0;
      if (j0 + i >= m) continue;
      const float* tj = t + (j0 + i) * 16;
      float low = tj[0], high = tj[0];
      for (int c = 1; c < 16; ++c) {
        low = tj[c] < low ? tj[c] : low;
        high = tj[c] > high ? tj[c] : high;
      }
      range[i] = high - low;
      least += low;
    }
    for (int i = 0; i < 4; ++i) widest = range[i] + range[i + 4] > widest ? range[i] + range[i + 4] : widest;
  }
  float all = 0;  // a NaN fails every comparison above: it is looked for by itself
  for (int64_t e = 0; e < m * 16; ++e) all += t[e] * 0.0f;
  if (all != 0 || !(widest < __builtin_inff()) || least * 0.0f != 0) return false;
  const float step = widest > 0 ? widest / 254 : 1.0f, per = 1 / step;
  for (int64_t j = 0; j < padded; ++j) {
    uint8_t* to = out + place(j);
    if (j >= m) {
      for (int c = 0; c < 16; ++c) to[c] = 0;
      continue;
    }
    const float* tj = t + j * 16;
    float low = tj[0];
    for (int c = 1; c < 16; ++c) low = tj[c] < low ? tj[c] : low;
    for (int c = 0; c < 16; ++c) to[c] = static_cast<uint8_t>((tj[c] - low) * per + 0.5f);
  }
  query->table = out;
  query->step = step;
  query->least = least;
  return true;
}

// ------------------------------------------------------------------------------------------ scanning
__attribute__((noinline)) void offer(const FastScanArgs& a, Candidates* best, float key, int64_t row) {
  const int64_t position = a.positions ? a.positions[row] : row;
  if (position < 0 || (a.keep && !(a.keep[position >> 3] >> (position & 7) & 1))) return;
  const uint64_t packed = pack_candidate(key, position);
  if (packed <= best->worst) return;
  best->packed[best->count++] = packed;
  if (best->count >= best->capacity) cut(best);
}

#if defined(LUTRA_LEVEL_v4)
// Sixteen rows at once, those of `pass`: without a branch for each, which would be guessed wrongly again and again.
// Nothing is compared with `worst`: what is too low goes with the next cut. Buffers have room for 16 beyond capacity.
LUTRA_INLINE void offer_block(const FastScanArgs& a, Candidates* best, __m512 keys, __mmask16 pass, int64_t row) {
  __m512i who = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(row)),
                                 _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  if (a.positions) {
    who = _mm512_maskz_loadu_epi32(pass, a.positions + row);
    pass = _mm512_mask_cmpge_epi32_mask(pass, who, _mm512_setzero_si512());
  }
  const __m512i bits = _mm512_castps_si512(keys), sign = _mm512_srai_epi32(bits, 31);
  const __m512i order = _mm512_xor_si512(bits, _mm512_or_si512(sign, _mm512_set1_epi32(INT32_MIN)));
  const __m512i high = _mm512_maskz_compress_epi32(pass, order);
  const __m512i low = _mm512_maskz_compress_epi32(pass, _mm512_andnot_si512(who, _mm512_set1_epi32(-1)));
  uint64_t* to = best->packed + best->count;
  const auto pair = [](__m256i h, __m256i l) {
    return _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(h), 32), _mm512_cvtepu32_epi64(l));
  };
  _mm512_storeu_si512(to, pair(_mm512_castsi512_si256(high), _mm512_castsi512_si256(low)));
  _mm512_storeu_si512(to + 8, pair(_mm512_extracti32x8_epi32(high, 1), _mm512_extracti32x8_epi32(low, 1)));
  best->count += __builtin_popcount(pass);
  if (best->count >= best->capacity) cut(best);
}
#endif

// The sum from which on a key of threshold or more is possible. Some below it may pass: keys are rounded.
int32_t least_sum(float threshold, float constant, float step) {
  const float s = (threshold - constant) / step;
  const float slack = 2 + 5e-7f * (fabsf(s) + fabsf(constant / step));
  if (!(s - slack > 0)) return 0;  // -inf, NaN
  return s - slack > 2e9f ? 2000000000 : static_cast<int32_t>(s - slack);
}

// A bit for each row of the tile whose sum is `least` or more.
LUTRA_INLINE uint64_t passing(const int32_t* sums, int rows, int32_t least) {
  uint64_t pass = 0;
#if defined(LUTRA_LEVEL_v4)
  for (int r = 0; r < rows; r += 16)
    pass |= static_cast<uint64_t>(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(sums + r), _mm512_set1_epi32(least))) << r;
#else
  for (int r = 0; r < rows; r += W) {
    const vi s = *reinterpret_cast<const vi_unaligned*>(sums + r);
    pass |= static_cast<uint64_t>(mask_bits(s >= least)) << r;
  }
#endif
  return pass;
}

// W terms of rows from `row` on, of which a.n exist.
LUTRA_INLINE vf row_terms(const float* terms, int64_t row, int64_t n) {
  if (n - row >= W) return load(terms + row);
  return n > row ? load_first(terms + row, static_cast<int>(n - row)) : (vf){};
}

// Keys of a tile with terms of their rows; `rows` of them exist, `keys` has room for whole vectors.
void keys_with_terms(const FastScanArgs& a, const Query& q, float base, int64_t row, int rows, const int32_t* sums,
                     float* keys) {
  const float sign = order_of(a);
  for (int r = 0; r < rows; r += W) {
    vf key = q.least + q.step * __builtin_convertvector(*reinterpret_cast<const vi_unaligned*>(sums + r), vf_unaligned);
    if (a.mul) key *= row_terms(a.mul, row + r, a.n);
    key += base;
    if (a.add) key += sign * row_terms(a.add, row + r, a.n);
    store(keys + r, key);
  }
}

// Rows [begin, begin + rows) for Q queries; begin is a multiple of 16. `base` in keys: with least where no row has a
// factor of its own.
template <int Q>
void scan_rows(const FastScanArgs& a, Query* const* q, const float* base, int64_t begin, int64_t rows) {
  const int64_t groups = groups_of(a.m);
  const bool terms = a.add || a.mul;
  const uint8_t* tables[Q];
  for (int i = 0; i < Q; ++i) tables[i] = q[i]->table;
  alignas(64) Sums sum[Q];
  for (int64_t at = 0; at < rows; at += kTile) {
    const int count = static_cast<int>(rows - at < kTile ? rows - at : kTile);
    const uint64_t exist = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    sums<Q>(a.codes + (begin + at) / kRows * groups * 64, groups, (count + kRows - 1) / kRows, tables, sum);
    for (int i = 0; i < Q; ++i) {
      Candidates* best = &q[i]->best;
      if (terms) {
        alignas(64) float keys[kTile];
        keys_with_terms(a, *q[i], base[i], begin + at, count, sum[i], keys);
#if defined(LUTRA_LEVEL_v4)
        if (!a.keep) {
          for (int r = 0; r < count; r += 16) {
            const vf keys16 = load(keys + r);
            const auto pass = static_cast<__mmask16>(mask_bits(keys16 >= splat(best->threshold)) & (exist >> r));
            if (pass) offer_block(a, best, (__m512)keys16, pass, begin + at + r);
          }
          continue;
        }
#endif
        for (int r = 0; r < count; r += W)
          for (uint32_t pass = mask_bits(load(keys + r) >= splat(best->threshold)); pass; pass &= pass - 1) {
            const int row = r + __builtin_ctz(pass);
            if (row < count) offer(a, best, keys[row], begin + at + row);
          }
        continue;
      }
      const float constant = base[i] + q[i]->least;
      uint64_t pass = passing(sum[i], count, least_sum(best->threshold, constant, q[i]->step)) & exist;
      if (!pass) continue;
#if defined(LUTRA_LEVEL_v4)
      if (!a.keep) {
        for (int r = 0; r < count; r += 16) {
          const auto block = static_cast<__mmask16>(pass >> r);
          const vf sums16 = __builtin_convertvector(*reinterpret_cast<const vi*>(sum[i] + r), vf);
          if (block) offer_block(a, best, (__m512)(constant + q[i]->step * sums16), block, begin + at + r);
        }
        continue;
      }
#endif
      for (; pass; pass &= pass - 1) {
        const int row = __builtin_ctzll(pass);
        offer(a, best, constant + q[i]->step * static_cast<float>(sum[i][row]), begin + at + row);
      }
    }
  }
}

void scan_group(const FastScanArgs& a, Query* q, const float* base, int queries, int64_t begin, int64_t rows) {
  Query* each[kQueries];
  for (int i = 0; i < queries; ++i) each[i] = q + i;
  switch (queries) {
    case 1: return scan_rows<1>(a, each, base, begin, rows);
    case 2: return scan_rows<2>(a, each, base, begin, rows);
    case 3: return scan_rows<3>(a, each, base, begin, rows);
    default: return scan_rows<4>(a, each, base, begin, rows);
  }
}

int64_t piece_rows(int64_t m) {
  const int64_t rows = kPiece / (groups_of(m) * 4) / kTile * kTile;
  return rows < kTile ? kTile : rows;
}

void scan_all(const FastScanArgs& a, Query* q, const float* base, int64_t queries, int64_t begin, int64_t end) {
  const int64_t piece = piece_rows(a.m);
  for (int64_t row = begin; row < end; row += piece) {
    const int64_t rows = end - row < piece ? end - row : piece;
    for (int64_t i = 0; i < queries; i += kQueries)
      scan_group(a, q + i, base + i, static_cast<int>(queries - i < kQueries ? queries - i : kQueries), row, rows);
  }
}

// A threshold from every 32nd tile, for one pass over all rows: so low that with near certainty `want` rows reach it,
// and so high that few more do. Without one, a row that will not last is offered for each of the want * ln(n / want)
// that once were among the best. A guess too high is noticed at the end, when fewer than `want` were found.
constexpr int64_t kStride = 32;

bool guess_thresholds(const FastScanArgs& a, Query* q, const float* base, int64_t queries) {
  const int64_t want = wanted(a);
  const float share = static_cast<float>(want) / kStride;
  const int64_t rank = static_cast<int64_t>(share + 3 * sqrtf(share)) + 3;
  // Few queries wait for the memory, and a few wanted rows cost less than the sample.
  if (queries < kQueries || want < 64 || a.n < 64 * kStride * kTile || a.n < 64 * want) return false;
  for (int64_t i = 0; i < queries; ++i) q[i].best.want = rank;
  for (int64_t row = 0; row < a.n; row += kStride * kTile) {
    const int64_t rows = a.n - row < kTile ? a.n - row : kTile;
    for (int64_t i = 0; i < queries; i += kQueries)
      scan_group(a, q + i, base + i, static_cast<int>(queries - i < kQueries ? queries - i : kQueries), row, rows);
  }
  for (int64_t i = 0; i < queries; ++i) {
    Candidates* best = &q[i].best;
    cut(best);
    const bool enough = best->count >= rank;
    const uint64_t worst = best->worst >> 32 << 32;  // every row with this key may pass
    candidates_start(best, best->packed, want);
    if (!enough) continue;
    best->worst = worst > 0 ? worst - 1 : 0;
    best->threshold = candidate_key(worst);
  }
  return true;
}

// Whether a guess let fewer than `want` pass, so that the rows must be scanned again.
bool guessed_badly(const FastScanArgs& a, Query* q) {
  if (q->best.count >= wanted(a) || q->best.threshold == -__builtin_inff()) return false;
  candidates_start(&q->best, q->best.packed, wanted(a));
  return true;
}

float base_of(const FastScanArgs& a, int64_t i, int64_t probe) {
  float base = a.bias ? a.bias[i] : 0.0f;
  if (a.base && probe >= 0) base += a.base[i * a.nprobe + probe];
  return order_of(a) * base;
}

void scan_probe(const FastScanArgs& a, Query* q, int64_t i, int64_t probe) {
  const int64_t list = a.probes[i * a.nprobe + probe];
  if (list < 0 || list >= a.lists || a.list_rows[list] <= 0) return;
  const float base = base_of(a, i, probe);
  scan_rows<1>(a, &q, &base, a.list_begin[list], a.list_rows[list]);
}

// ------------------------------------------------------------------------------------------ results
template <Metric M, class T>
void exact_keys(const FastScanArgs& a, const float* q, const uint64_t* from, int64_t count, uint64_t* to,
                int64_t* bad) {
  const auto* x = static_cast<const typename T::type*>(a.vectors);
  constexpr int64_t kAhead = 8;
  const int64_t line = 64 / static_cast<int64_t>(sizeof(typename T::type));
  for (int64_t c = 0; c < count + kAhead; ++c) {
    if (c < count) {
      const auto* row = x + candidate_id(from[c]) * a.ldx;
      for (int64_t j = 0; j < a.d; j += line) __builtin_prefetch(row + j);
    }
    if (c < kAhead) continue;
    const int64_t id = candidate_id(from[c - kAhead]);
    const float key = exact_key<M, T>(q, x + id * a.ldx, a.d, a.vector_scale ? a.vector_scale[id] : 1.0f);
    if (key != key && (*bad < 0 || id < *bad)) *bad = id;
    to[c - kAhead] = pack_candidate(key, id);
  }
}

template <Metric M>
void exact_keys(const FastScanArgs& a, const float* q, const uint64_t* from, int64_t count, uint64_t* to,
                int64_t* bad) {
  switch (a.vector_type) {
    case DType::f16: return exact_keys<M, F16>(a, q, from, count, to, bad);
    case DType::bf16: return exact_keys<M, BF16>(a, q, from, count, to, bad);
    case DType::i8: return exact_keys<M, I8>(a, q, from, count, to, bad);
    default: return exact_keys<M, F32>(a, q, from, count, to, bad);
  }
}

void write(const FastScanArgs& a, int64_t i, float sign, const uint64_t* sorted, int64_t count) {
  for (int64_t c = 0; c < a.k; ++c) {
    a.scores[i * a.k + c] = c < count ? sign * candidate_key(sorted[c]) : -sign * __builtin_inff();
    a.ids[i * a.k + c] = c < count ? candidate_id(sorted[c]) : -1;
  }
}

void finish(const FastScanArgs& a, int64_t i, Candidates* best, int64_t* bad) {
  if (a.candidates <= 0) {
    const int64_t count = candidates_sort(best, a.repeated);
    return write(a, i, order_of(a), best->packed, count);
  }
  cut(best);
  const float* q = a.queries + i * a.ldq;
  Buffer<float> unit(a.d);
  if (a.exact == Metric::cosine) {
    const float scale = inverse_norm(q, a.d);
    for (int64_t j = 0; j < a.d; ++j) unit[j] = q[j] * scale;
    q = unit.data;
  }
  Candidates exact = *best;
  exact.want = a.k;
  switch (a.exact) {
    case Metric::l2: exact_keys<Metric::l2>(a, q, best->packed, best->count, exact.packed, bad); break;
    case Metric::cosine: exact_keys<Metric::cosine>(a, q, best->packed, best->count, exact.packed, bad); break;
    default: exact_keys<Metric::ip>(a, q, best->packed, best->count, exact.packed, bad);
  }
  const int64_t count = candidates_sort(&exact, a.repeated);
  write(a, i, a.exact == Metric::l2 ? -1.0f : 1.0f, exact.packed, count);
}

// ------------------------------------------------------------------------------------------ a call
struct Work {  // queries and their tables, for one thread's share
  Buffer<Query> queries;
  Buffer<uint8_t> tables;
  Buffer<uint64_t> memory;
  Buffer<float> base;
  int64_t count, capacity, table_bytes;
  bool good = true;

  Work(const FastScanArgs& a, int64_t first, int64_t n)
      : queries(n), tables(n * groups_of(a.m) * kGroupTables), memory(n * candidates_capacity(wanted(a))), base(n),
        count(n), capacity(candidates_capacity(wanted(a))), table_bytes(groups_of(a.m) * kGroupTables) {
    Buffer<float> exact(a.m * 16);
    for (int64_t i = 0; i < n; ++i) {
      float_tables(a, first + i, exact.data);
      good &= round_tables(exact.data, a.m, tables.data + i * table_bytes, &queries[i]);
      candidates_start(&queries[i].best, memory.data + i * capacity, wanted(a));
      base[i] = base_of(a, first + i, -1);
    }
  }
};

// Each query by one thread.
void by_queries(const FastScanArgs& a, int64_t share, double nanoseconds, int64_t* bad) {
  const int64_t shares = (a.nq + share - 1) / share;
  Buffer<int64_t> worst(shares);
  parallel_for(shares, nanoseconds, [&](int64_t s) {
    const int64_t first = s * share, n = a.nq - first < share ? a.nq - first : share;
    Work work(a, first, n);
    worst[s] = work.good ? -1 : -2;
    if (!work.good) return;
    if (a.probes) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t p = 0; p < a.nprobe; ++p) scan_probe(a, &work.queries[i], first + i, p);
    } else {
      const bool guessed = guess_thresholds(a, work.queries.data, work.base.data, n);
      scan_all(a, work.queries.data, work.base.data, n, 0, a.n);
      for (int64_t i = 0; guessed && i < n; ++i)
        if (guessed_badly(a, &work.queries[i])) scan_all(a, &work.queries[i], &work.base[i], 1, 0, a.n);
    }
    for (int64_t i = 0; i < n; ++i) finish(a, first + i, &work.queries[i].best, &worst[s]);
  });
  for (int64_t s = 0; s < shares; ++s)
    if (worst[s] != -1 && *bad == -1) *bad = worst[s];
}

// Each thread takes pieces of the rows, or lists, for all queries, which are few.
void by_rows(const FastScanArgs& a, int threads, int64_t* bad) {
  Work work(a, 0, a.nq);
  if (!work.good) {
    *bad = -2;
    return;
  }
  Buffer<Query> each(threads * a.nq);
  Buffer<uint64_t> memory(threads * a.nq * work.capacity);
  for (int t = 0; t < threads; ++t)
    for (int64_t i = 0; i < a.nq; ++i) {
      Query* q = &each[t * a.nq + i];
      *q = work.queries[i];
      candidates_start(&q->best, memory.data + (t * a.nq + i) * work.capacity, wanted(a));
    }
  if (a.probes) {
    parallel_slots(a.nq * a.nprobe, threads, [&](int t, int64_t c) {
      const int64_t i = c / a.nprobe;
      scan_probe(a, &each[t * a.nq + i], i, c % a.nprobe);
    });
  } else {
    const int64_t piece = 4 * piece_rows(a.m), pieces = (a.n + piece - 1) / piece;
    parallel_slots(pieces, threads, [&](int t, int64_t p) {
      const int64_t begin = p * piece, end = begin + piece < a.n ? begin + piece : a.n;
      scan_all(a, &each[t * a.nq], work.base.data, a.nq, begin, end);
    });
  }
  Buffer<Candidates*> parts(threads);
  for (int64_t i = 0; i < a.nq; ++i) {
    for (int t = 0; t < threads; ++t) parts[t] = &each[t * a.nq + i].best;
    candidates_merge(parts.data, threads);
    finish(a, i, parts[0], bad);
  }
}

}  // namespace

void fast_scan(const FastScanArgs& a) {
  *a.bad = -1;
  double rows = static_cast<double>(a.n);
  if (a.probes && a.lists > 0) rows = rows / static_cast<double>(a.lists) * static_cast<double>(a.nprobe);
  const double each = rows * (static_cast<double>(a.m) * 0.008 + 0.1) + static_cast<double>(a.candidates) * 50 + 2000;
  const double nanoseconds = each * static_cast<double>(a.nq);
  const int threads = num_threads();
  // With few queries a pass costs the reading of the codes: then all of them share one, and the threads the rows.
  const int64_t enough = a.probes ? 1 : 32;
  if (a.nq >= enough * threads || threads == 1 || nanoseconds < 40e3) {
    int64_t share = a.nq / (8 * threads);  // enough shares for the threads to end together
    if (!a.probes) share = share < kShare / 2 ? kShare / 2 : share / kQueries * kQueries;
    by_queries(a, share < 1 ? 1 : share > kShare ? kShare : share, nanoseconds, a.bad);
  } else {
    by_rows(a, threads, a.bad);
  }
}

void pack4(const Pack4Args& a) {
  const int64_t groups = groups_of(a.m);
  const auto put = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = a.first + i;
      uint8_t* block = a.codes + row / kRows * groups * 64 + row % kRows * 4;
      const uint8_t* from = a.entries + i * a.m;
      for (int64_t g = 0; g < groups; ++g)
        for (int b = 0; b < 4; ++b) {
          const int64_t j = g * 8 + b;
          const uint8_t lo = j < a.m ? from[j] & 15 : 0, hi = j + 4 < a.m ? from[j + 4] & 15 : 0;
          block[g * 64 + b] = static_cast<uint8_t>(lo | hi << 4);
        }
    }
  };
  // Pieces end with blocks, so that no two threads write to one.
  const int64_t head = a.first % kRows ? kRows - a.first % kRows : 0, start = head < a.n ? head : a.n;
  put(0, start);
  parallel_ranges(a.n - start, 4096, static_cast<double>(a.n) * a.m * 0.6,
                  [&](int64_t begin, int64_t end) { put(start + begin, start + end); });
}

void unpack4(const Unpack4Args& a) {
  const int64_t groups = groups_of(a.m);
  parallel_ranges(a.n, 4096, static_cast<double>(a.n) * a.m * 0.6, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = a.rows ? a.rows[i] : a.first + i;
      const uint8_t* block = a.codes + row / kRows * groups * 64 + row % kRows * 4;
      for (int64_t j = 0; j < a.m; ++j) {
        const uint8_t byte = block[j / 8 * 64 + j % 4];
        a.entries[i * a.m + j] = j % 8 < 4 ? byte & 15 : byte >> 4;
      }
    }
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
