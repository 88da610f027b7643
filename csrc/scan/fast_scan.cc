// Flat: with many queries the threads share them, and groups of four queries go over a piece of the codes that stays
// in the L1; with few the threads share the rows, and their candidates are merged.
// Lists: the threads share the queries; a single one is shared out by its lists where that pays.
#include "scan/fast_scan.h"

#include <string.h>

#include "common/parallel.h"
#include "common/select.h"
#include "scan/exact_row.h"
#include "scan/fast_scan_rows.h"
#include "scan/fast_scan_screen.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

using namespace fast_scan_rows;

constexpr int64_t kPiece = 16 << 10;  // bytes of codes that groups of queries go over in turn
constexpr int kShare = 64;            // queries of one piece of work

// One pass over the rows. With a screen, `whole` are the caller's arguments, and those of the pass are either of the
// highest bits or, where these did not do, of whole codes.
struct Job : FastScanArgs {
  const FastScanArgs* whole = nullptr;
  const float* rotated = nullptr;  // (nq, 16 * parts)
  explicit Job(const FastScanArgs& a) : FastScanArgs(a) {}
  bool screens() const { return whole && whole->m != m; }
};

int64_t wanted(const FastScanArgs& a) {
  const int64_t count = a.screen > 0 ? a.screen : a.candidates > 0 ? a.candidates : a.k;
  const int64_t most = a.repeated ? 2 * count : count;
  return most < a.n ? most : (a.n > 0 ? a.n : 1);
}

// ------------------------------------------------------------------------------------------ scanning
void scan_group(const FastScanArgs& a, const uint8_t* codes, Query* q, const float* base, int queries, int64_t begin,
                int64_t rows, const Bounds* bounds) {
  Query* each[kQueries];
  for (int i = 0; i < queries; ++i) each[i] = q + i;
  switch (queries) {
    case 1: return scan_rows<1>(a, codes, each, base, begin, rows, bounds);
    case 2: return scan_rows<2>(a, codes, each, base, begin, rows, bounds);
    case 3: return scan_rows<3>(a, codes, each, base, begin, rows, bounds);
    default: return scan_rows<4>(a, codes, each, base, begin, rows, bounds);
  }
}

int64_t piece_rows(int64_t m) {
  const int64_t rows = kPiece / (groups_of(m) * 4) / kTile * kTile;
  return rows < kTile ? kTile : rows;
}

const uint8_t* codes_at(const FastScanArgs& a, int64_t row) { return a.codes + row / kRows * groups_of(a.m) * 64; }

// Codes of rows from `row` on: as they lie, or their highest bits, brought to `room`.
const uint8_t* source(const Job& a, int64_t row, int64_t rows, uint8_t* room) {
  if (!a.screens()) return codes_at(a, row);
  const int64_t blocks = (rows + kRows - 1) / kRows;
  fast_scan_screen::highest_bits(codes_at(*a.whole, row), a.whole->m, a.bits, blocks, room);
  return room;
}

int64_t room_of(const Job& a, int64_t rows) { return a.screens() ? rows * groups_of(a.m) * 4 + kAhead : 0; }

void scan_all(const Job& a, Query* q, const float* base, int64_t queries, int64_t begin, int64_t end,
              const Bounds* bounds) {
  // Few queries wait for the memory, which goes on while a tile is scanned if tiles are taken one by one.
  const int64_t piece = a.screens() && queries < 2 * kQueries ? kTile : piece_rows(a.m);
  Buffer<uint8_t> room(room_of(a, piece));
  for (int64_t row = begin; row < end; row += piece) {
    const int64_t rows = end - row < piece ? end - row : piece;
    const Bounds here = bounds ? bounds->from(row / kTile) : Bounds{};
    const uint8_t* codes = source(a, row, rows, room.data);
    for (int64_t i = 0; i < queries; i += kQueries)
      scan_group(a, codes, q + i, base + i, static_cast<int>(queries - i < kQueries ? queries - i : kQueries), row,
                 rows, bounds ? &here : nullptr);
  }
}

// A threshold from every 32nd tile, for one pass over all rows: so low that with near certainty `want` rows reach it,
// and so high that few more do. Without one, a row that will not last is offered for each of the want * ln(n / want)
// that once were among the best. A guess too high is noticed at the end, when fewer than `want` were found.
constexpr int64_t kStride = 32;

bool guess_thresholds(const Job& a, Query* q, const float* base, int64_t queries) {
  const int64_t want = wanted(a);
  const float share = static_cast<float>(want) / kStride;
  const int64_t rank = static_cast<int64_t>(share + 3 * sqrtf(share)) + 3;
  // Few queries wait for the memory, and a few wanted rows cost less than the sample.
  if (queries < kQueries || want < 64 || a.n < 64 * kStride * kTile || a.n < 64 * want) return false;
  for (int64_t i = 0; i < queries; ++i) q[i].best.want = rank;
  Buffer<uint8_t> room(room_of(a, kTile));
  for (int64_t row = 0; row < a.n; row += kStride * kTile) {
    const int64_t rows = a.n - row < kTile ? a.n - row : kTile;
    const uint8_t* codes = source(a, row, rows, room.data);
    for (int64_t i = 0; i < queries; i += kQueries)
      scan_group(a, codes, q + i, base + i, static_cast<int>(queries - i < kQueries ? queries - i : kQueries), row,
                 rows, nullptr);
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
  const int64_t begin = a.list_begin[list];
  scan_rows<1>(a, codes_at(a, begin), &q, &base, begin, a.list_rows[list], nullptr);
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

// The best candidates by full scores. False where more are needed.
bool finish_screen(const Job& a, int64_t i, Candidates* best, int64_t* bad) {
  cut(best);
  Candidates full = *best;
  full.want = a.k;
  const float* rotated = a.rotated + i * fast_scan_screen::padded(a.whole->m);
  const float base = base_of(a, i, -1), sign = order_of(a);
  if (!fast_scan_screen::full_keys(*a.whole, rotated, base, sign, a.screens(), *best, &full, bad)) return false;
  write(a, i, sign, full.packed, candidates_sort(&full, false));
  return true;
}

bool finish(const Job& a, int64_t i, Candidates* best, int64_t* bad) {
  if (a.whole) return finish_screen(a, i, best, bad);
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
        there(pay(a)) {
    if (!there) return;
    const int64_t tiles = (a.n + kTile - 1) / kTile;
    parallel_ranges(tiles, 1024, static_cast<double>(a.n) * 0.3, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) bounds_of(a, t, &per_least[t], &per_most[t], &most_add[t]);
    });
    for (int i = 0; i < W; ++i) per_least[tiles + i] = per_most[tiles + i] = 1, most_add[tiles + i] = 0;
  }
  const Bounds* get() const { return there ? &all : nullptr; }

 private:
  static bool pay(const FastScanArgs& a) { return !a.probes && (a.mul || a.add) && a.nq >= 2 * kQueries && a.n > 0; }
  static int64_t size(const FastScanArgs& a) { return pay(a) ? (a.n + kTile - 1) / kTile + W : 0; }
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
void by_queries(const Job& a, int64_t share, double nanoseconds, int64_t* bad, uint8_t* wider) {
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
void by_rows(const Job& a, int threads, int64_t* bad, uint8_t* wider) {
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

void pass(const Job& a, uint8_t* wider) {
  *a.bad = -1;
  double rows = static_cast<double>(a.n);
  if (a.probes && a.lists > 0) rows = rows / static_cast<double>(a.lists) * static_cast<double>(a.nprobe);
  const double each = rows * (static_cast<double>(a.m) * 0.008 + 0.1) + static_cast<double>(a.candidates) * 50 + 2000;
  const double nanoseconds = each * static_cast<double>(a.nq);
  const int threads = num_threads();
  // With few queries a pass costs the reading of the codes: then all of them share one, and the threads the rows.
  const int64_t enough = a.probes ? 1 : 32;
  if (a.nq >= enough * threads || threads == 1 || nanoseconds < 40e3) {
    // Enough shares for the threads to end together; half as many where each takes the highest bits out of all codes.
    const int64_t most = a.screens() ? 2 * kShare : kShare;
    int64_t share = a.nq / ((a.screens() ? 4 : 8) * threads);
    if (!a.probes) share = share < kShare / 2 ? kShare / 2 : share / kQueries * kQueries;
    by_queries(a, share < 1 ? 1 : share > most ? most : share, nanoseconds, a.bad, wider);
  } else {
    by_rows(a, threads, a.bad, wider);
  }
}

// The queries of `some` by look-ups of whole codes, in parts, each with its tables together.
void scan_whole(const FastScanArgs& a, const float* rotated, const int64_t* some, int64_t count) {
  constexpr int64_t kTogether = 256;
  const int64_t ld = fast_scan_screen::padded(a.m), most = count < kTogether ? count : kTogether;
  Buffer<float> tables(most * a.m * 16), turned(most * ld), bias(most), scores(most * a.k);
  Buffer<int64_t> ids(most * a.k);
  for (int64_t first = 0; first < count && *a.bad == -1; first += most) {
    Job part(a);
    part.nq = count - first < most ? count - first : most;
    for (int64_t i = 0; i < part.nq; ++i) {
      const int64_t query = some[first + i];
      memcpy(tables.data + i * a.m * 16, a.tables + query * a.m * 16, a.m * 16 * sizeof(float));
      memcpy(turned.data + i * ld, rotated + query * ld, ld * sizeof(float));
      bias[i] = a.bias ? a.bias[query] : 0;
    }
    part.tables = tables.data, part.rotated = turned.data, part.bias = bias.data;
    part.scores = scores.data, part.ids = ids.data;
    part.whole = &a;
    part.screen = 2 * a.k + 32;  // tables are rounded
    pass(part, nullptr);
    for (int64_t i = 0; i < part.nq; ++i) {
      memcpy(a.scores + some[first + i] * a.k, scores.data + i * a.k, a.k * sizeof(float));
      memcpy(a.ids + some[first + i] * a.k, ids.data + i * a.k, a.k * sizeof(int64_t));
    }
  }
}

void scan_screened(const FastScanArgs& a) {
  const int64_t ld = fast_scan_screen::padded(a.m), groups = (groups_of(a.m) + 3) / 4;
  Job first(a);
  first.m = groups * 8;
  Buffer<float> rotated(a.nq * ld), tables(a.nq * first.m * 16);
  parallel_for(a.nq, static_cast<double>(a.nq) * a.m * 10, [&](int64_t i) {
    fast_scan_screen::rotated_of(a, i, rotated.data + i * ld);
    fast_scan_screen::screen_tables(a, rotated.data + i * ld, first.m, tables.data + i * first.m * 16);
  });
  first.whole = &a;
  first.tables = tables.data, first.rotated = rotated.data;
  Buffer<uint8_t> wider(a.nq);
  Buffer<int64_t> some(a.nq);
  for (int64_t i = 0; i < a.nq; ++i) wider[i] = 0;
  pass(first, wider.data);
  int64_t count = 0;
  for (int64_t i = 0; i < a.nq; ++i)
    if (wider[i]) some[count++] = i;
  if (count && *a.bad == -1) scan_whole(a, rotated.data, some.data, count);
}

}  // namespace

void fast_scan(const FastScanArgs& a) {
  if (a.levels) return scan_screened(a);
  Job all(a);
  all.screen = 0;
  pass(all, nullptr);
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
