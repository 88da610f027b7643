// Flat: with many queries the threads share them, and groups of four queries go over a piece of the codes that stays
// in the L1; with few the threads share the rows, and their candidates are merged.
// Lists: the threads share the queries; a single one is shared out by its lists where that pays.
#include "scan/fast_scan.h"

#include "common/parallel.h"
#include "common/select.h"
#include "scan/exact_row.h"
#include "scan/fast_scan_planes.h"
#include "scan/fast_scan_rows.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

using namespace fast_scan_rows;

constexpr int64_t kPiece = 16 << 10;  // bytes of codes that groups of queries go over in turn
constexpr int kShare = 64;            // queries of one piece of work
constexpr int64_t kWidest = 64;       // times as many candidates as at first, before all rows are scored in full

int64_t wanted(const FastScanArgs& a) {
  const int64_t count = a.planes ? a.screen : a.candidates > 0 ? a.candidates : a.k;
  const int64_t most = a.repeated ? 2 * count : count;
  return most < a.n ? most : (a.n > 0 ? a.n : 1);
}

// ------------------------------------------------------------------------------------------ scanning
void scan_group(const FastScanArgs& a, Query* q, const float* base, int queries, int64_t begin, int64_t rows,
                const Bounds* bounds) {
  Query* each[kQueries];
  for (int i = 0; i < queries; ++i) each[i] = q + i;
  switch (queries) {
    case 1: return scan_rows<1>(a, each, base, begin, rows, bounds);
    case 2: return scan_rows<2>(a, each, base, begin, rows, bounds);
    case 3: return scan_rows<3>(a, each, base, begin, rows, bounds);
    default: return scan_rows<4>(a, each, base, begin, rows, bounds);
  }
}

int64_t piece_rows(int64_t m) {
  const int64_t rows = kPiece / (groups_of(m) * 4) / kTile * kTile;
  return rows < kTile ? kTile : rows;
}

void scan_all(const FastScanArgs& a, Query* q, const float* base, int64_t queries, int64_t begin, int64_t end,
              const Bounds* bounds) {
  const int64_t piece = piece_rows(a.m);
  for (int64_t row = begin; row < end; row += piece) {
    const int64_t rows = end - row < piece ? end - row : piece;
    const Bounds here = bounds ? bounds->from(row / kTile) : Bounds{};
    for (int64_t i = 0; i < queries; i += kQueries)
      scan_group(a, q + i, base + i, static_cast<int>(queries - i < kQueries ? queries - i : kQueries), row, rows,
                 bounds ? &here : nullptr);
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
      scan_group(a, q + i, base + i, static_cast<int>(queries - i < kQueries ? queries - i : kQueries), row, rows,
                 nullptr);
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
  scan_rows<1>(a, &q, &base, a.list_begin[list], a.list_rows[list], nullptr);
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

const float* rotated_of(const FastScanArgs& a, int64_t i) {
  return a.rotated + i * fast_scan_planes::parts_of(a.d) * fast_scan_planes::kPart;
}

// False where more candidates are needed (planes).
bool finish_planes(const FastScanArgs& a, int64_t i, Candidates* best, int64_t* bad) {
  cut(best);
  Candidates full = *best;
  full.want = a.k;
  Buffer<float> off(best->count);
  const float sign = order_of(a);
  if (!fast_scan_planes::full_keys(a, rotated_of(a, i), base_of(a, i, -1), sign, *best, off.data, &full, bad))
    return false;
  write(a, i, sign, full.packed, candidates_sort(&full, false));
  return true;
}

bool finish(const FastScanArgs& a, int64_t i, Candidates* best, int64_t* bad) {
  if (a.planes) return finish_planes(a, i, best, bad);
  if (a.candidates <= 0) {
    const int64_t count = candidates_sort(best, a.repeated);
    write(a, i, order_of(a), best->packed, count);
    return true;
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
  return true;
}

// ------------------------------------------------------------------------------------------ a call
// The bounds of all tiles, for as many queries as make them pay.
struct TileBounds {
  Buffer<float> per_least, per_most, most_add;
  Bounds all;
  bool there;

  explicit TileBounds(const FastScanArgs& a)
      : per_least(size(a)), per_most(size(a)), most_add(size(a)), all{per_least.data, per_most.data, most_add.data},
        there(wanted(a)) {
    if (!there) return;
    const int64_t tiles = (a.n + kTile - 1) / kTile;
    parallel_ranges(tiles, 1024, static_cast<double>(a.n) * 0.3, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) bounds_of(a, t, &per_least[t], &per_most[t], &most_add[t]);
    });
    for (int i = 0; i < W; ++i) per_least[tiles + i] = per_most[tiles + i] = 1, most_add[tiles + i] = 0;
  }
  const Bounds* get() const { return there ? &all : nullptr; }

 private:
  static bool wanted(const FastScanArgs& a) { return !a.probes && (a.mul || a.add) && a.nq >= 2 * kQueries && a.n > 0; }
  static int64_t size(const FastScanArgs& a) { return wanted(a) ? (a.n + kTile - 1) / kTile + W : 0; }
};

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

// Each query by one thread. `wider` marks the queries that need more candidates.
void by_queries(const FastScanArgs& a, int64_t share, double nanoseconds, int64_t* bad, uint8_t* wider) {
  const int64_t shares = (a.nq + share - 1) / share;
  const TileBounds bounds(a);
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
      scan_all(a, work.queries.data, work.base.data, n, 0, a.n, bounds.get());
      for (int64_t i = 0; guessed && i < n; ++i)
        if (guessed_badly(a, &work.queries[i])) scan_all(a, &work.queries[i], &work.base[i], 1, 0, a.n, nullptr);
    }
    for (int64_t i = 0; i < n; ++i)
      if (!finish(a, first + i, &work.queries[i].best, &worst[s])) wider[first + i] = 1;
  });
  for (int64_t s = 0; s < shares; ++s)
    if (worst[s] != -1 && *bad == -1) *bad = worst[s];
}

// Each thread takes pieces of the rows, or lists, for all queries, which are few.
void by_rows(const FastScanArgs& a, int threads, int64_t* bad, uint8_t* wider) {
  Work work(a, 0, a.nq);
  if (!work.good) {
    *bad = -2;
    return;
  }
  const TileBounds bounds(a);
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
      scan_all(a, &each[t * a.nq], work.base.data, a.nq, begin, end, bounds.get());
    });
  }
  Buffer<Candidates*> parts(threads);
  for (int64_t i = 0; i < a.nq; ++i) {
    for (int t = 0; t < threads; ++t) parts[t] = &each[t * a.nq + i].best;
    candidates_merge(parts.data, threads);
    if (!finish(a, i, parts[0], bad)) wider[i] = 1;
  }
}

// Planes: full scores of all rows for one query.
void score_all(const FastScanArgs& a, int64_t* bad) {
  constexpr int64_t kRowsOfPiece = 1024;
  const int threads = num_threads();
  const int64_t capacity = candidates_capacity(a.k < a.n ? a.k : a.n), pieces = (a.n + kRowsOfPiece - 1) / kRowsOfPiece;
  Buffer<Candidates> each(threads);
  Buffer<uint64_t> memory(threads * capacity);
  Buffer<int64_t> worst(threads);
  for (int t = 0; t < threads; ++t) {
    candidates_start(&each[t], memory.data + t * capacity, a.k < a.n ? a.k : a.n);
    worst[t] = -1;
  }
  const float base = base_of(a, 0, -1), sign = order_of(a);
  parallel_slots(pieces, threads, [&](int t, int64_t p) {
    const int64_t end = (p + 1) * kRowsOfPiece < a.n ? (p + 1) * kRowsOfPiece : a.n;
    for (int64_t row = p * kRowsOfPiece; row < end; ++row) {
      const float key = fast_scan_planes::full_key(a, a.rotated, base, sign, row);
      if (key - key != 0 && worst[t] < 0) worst[t] = row;
      if (key >= each[t].threshold) offer(a, &each[t], key, row);
    }
  });
  Buffer<Candidates*> parts(threads);
  for (int t = 0; t < threads; ++t) {
    parts[t] = &each[t];
    if (worst[t] >= 0 && (*bad < 0 || worst[t] < *bad)) *bad = worst[t];
  }
  candidates_merge(parts.data, threads);
  write(a, 0, sign, parts[0]->packed, candidates_sort(parts[0], false));
}

void pass(const FastScanArgs& a, uint8_t* wider);

// Planes: a query that needs more candidates, by itself.
void widen(const FastScanArgs& a, int64_t i) {
  FastScanArgs one = a;
  int64_t bad = -1;
  one.nq = 1;
  one.bias = a.bias ? a.bias + i : nullptr;
  one.rotated = rotated_of(a, i);
  one.scores = a.scores + i * a.k;
  one.ids = a.ids + i * a.k;
  one.bad = &bad;
  uint8_t again = 1;
  while (again && bad == -1) {
    again = 0;
    one.screen *= 4;
    if (one.screen > kWidest * a.screen || one.screen > a.n / 8)
      score_all(one, &bad);
    else
      pass(one, &again);
  }
  if (*a.bad == -1) *a.bad = bad;
}

void pass(const FastScanArgs& a, uint8_t* wider) {
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
    by_queries(a, share < 1 ? 1 : share > kShare ? kShare : share, nanoseconds, a.bad, wider);
  } else {
    by_rows(a, threads, a.bad, wider);
  }
}

}  // namespace

void fast_scan(const FastScanArgs& a) {
  if (!a.planes) return pass(a, nullptr);
  Buffer<uint8_t> wider(a.nq);
  for (int64_t i = 0; i < a.nq; ++i) wider[i] = 0;
  pass(a, wider.data);
  for (int64_t i = 0; i < a.nq && *a.bad == -1; ++i)
    if (wider[i]) widen(a, i);
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
