// The documents' rows are taken in pieces that stay in a cache, each piece by all panels of query tokens
// (maxsim_tile.h); threads share out the pieces. A document that is larger than a piece carries its maxima from one
// piece to the next.
#include "scan/maxsim.h"

#include "common/features.h"
#include "common/parallel.h"
#include "scan/maxsim_pack.h"
#include "scan/maxsim_rows.h"
#include "scan/maxsim_tile.h"
#include "scan/selection.h"

namespace lutra {
namespace LUTRA_NS {
namespace late {
namespace {

constexpr int64_t kItems = 128;             // documents of a piece
constexpr int64_t kPackedBytes = 64 << 20;  // of the queries of a pass

struct Item {
  int64_t document, column;
  int64_t begin, end;  // its rows, without masked ones at the ends
};

// What one thread needs, and what it finds wrong.
struct Worker {
  Scratch scratch;
  float* carry;           // of each item: the sum of a query whose tokens lie in several panels
  Lanes* lanes;           // of each panel of a group, for documents of several pieces
  TopK* best;             // of each query of the pass, or null
  int64_t nan, centroid;  // the lowest document, row of x; or -1
};

struct Call {
  const MaxsimArgs& a;
  const Source& source;
  const Tokens& tokens;
  const Packed& packed;
  const int64_t* group;  // (groups + 1): the first query of each
  int64_t query0;        // of the pass
  int64_t columns, piece_rows;
};

Item item_of(const MaxsimArgs& a, int64_t document, int64_t column) {
  Item it{document, column, a.x_ptr[document], a.x_ptr[document + 1]};
  if (a.x_mask) {
    while (it.begin < it.end && !a.x_mask[it.begin]) ++it.begin;
    while (it.begin < it.end && !a.x_mask[it.end - 1]) --it.end;
  }
  return it;
}

void emit(const Call& c, Worker* w, int64_t query, const Item& it, float score) {
  if (score != score) {
    if (w->nan < 0 || it.document < w->nan) w->nan = it.document;
    return;
  }
  if (w->best) {
    topk_push(w->best + query, score, it.document);
  } else {
    c.a.scores[(c.query0 + query) * c.columns + it.column] = score;
  }
}

void begin_lanes(const Item& it, Lanes* lanes) {
  const int32_t row = it.begin < it.end ? static_cast<int32_t>(it.begin) : -1;
  for (int i = 0; i < kMostVectors * W; ++i) {
    lanes->best[i] = -__builtin_inff();
    lanes->where[i] = row;
  }
  for (int v = 0; v < kMostVectors; ++v) lanes->nan[v] = 0;
}

// A document's maxima in one panel go to the scores of the queries in it, in the order of their tokens.
void finish_lanes(const Call& c, Worker* w, const Panel& p, const Item& it, Lanes* lanes, float* carry) {
  for (int v = 0; v < p.vectors; ++v) {
    const int64_t lanes_used = p.count - v * W < W ? p.count - v * W : W;
    if (lanes->nan[v] & static_cast<uint32_t>((uint64_t{1} << lanes_used) - 1)) {
      if (w->nan < 0 || it.document < w->nan) w->nan = it.document;
      return;
    }
  }
  if (c.source.integers)  // apart from the sums: a compiler would fuse some of the products and not others
    for (int v = 0; v < p.vectors; ++v)
      store(lanes->best + v * W, load(lanes->best + v * W) * load(c.packed.unit.data + p.token + v * W));
  const int64_t end = p.token + p.count;
  for (int64_t t = p.token, q = p.query; t < end; ++q) {
    const int64_t last = c.tokens.ptr[q + 1] < end ? c.tokens.ptr[q + 1] : end;
    if (t == last) continue;  // a query without tokens
    float sum = t == c.tokens.ptr[q] ? 0.0f : *carry;
    for (; t < last; ++t) sum += lanes->best[t - p.token];
    if (last == c.tokens.ptr[q + 1])
      emit(c, w, q, it, sum);
    else
      *carry = sum;
  }
  if (c.a.argmax) {
    int32_t* out = c.a.argmax + it.column * c.a.q_rows;
    for (int64_t i = 0; i < p.count; ++i) out[c.tokens.row[p.token + i]] = lanes->where[i];
  }
}

template <class Dot>
void run_panel(const Rows& rows, const Panel& p, const char* words, bool arg, Lanes* lanes) {
  constexpr int D = Dot::kDigits;
  const char* panel = words + p.at;
  switch (p.vectors * D + (arg && !Dot::kInteger ? 8 : 0)) {
    case 1:
      if constexpr (D == 1) run_rows<Dot, 1, false>(rows, panel, lanes);
      break;
    case 2: run_rows<Dot, 2, false>(rows, panel, lanes); break;
#if defined(LUTRA_LEVEL_v4)
    case 3:
      if constexpr (D == 1) run_rows<Dot, 3, false>(rows, panel, lanes);
      break;
    case 4: run_rows<Dot, 4, false>(rows, panel, lanes); break;
#endif
    default:
      if constexpr (!Dot::kInteger) {
        switch (p.vectors) {
          case 1: run_rows<Dot, 1, true>(rows, panel, lanes); break;
#if defined(LUTRA_LEVEL_v4)
          case 3: run_rows<Dot, 3, true>(rows, panel, lanes); break;
          case 4: run_rows<Dot, 4, true>(rows, panel, lanes); break;
#endif
          default: run_rows<Dot, 2, true>(rows, panel, lanes);
        }
      }
  }
}

// Some documents with the queries of a group: several that make one piece, or one of any size.
template <class Dot>
void run_items(const Call& c, Worker* w, const Item* items, int64_t count, int64_t group) {
  for (int64_t q = c.group[group]; q < c.group[group + 1]; ++q)
    if (c.tokens.ptr[q] == c.tokens.ptr[q + 1])
      for (int64_t i = 0; i < count; ++i) emit(c, w, q, items[i], 0.0f);
  const int64_t first = c.packed.panel_of[group], last = c.packed.panel_of[group + 1];
  const bool arg = c.a.argmax != nullptr;
  if (count == 1 && items->end - items->begin > c.piece_rows) {
    for (int64_t p = first; p < last; ++p) begin_lanes(*items, w->lanes + (p - first));
    for (int64_t r = items->begin; r < items->end; r += c.piece_rows) {
      const int64_t n = items->end - r < c.piece_rows ? items->end - r : c.piece_rows;
      const Rows rows = c.source.prepare(r, n, w->scratch, 0, &w->centroid);
      for (int64_t p = first; p < last; ++p)
        run_panel<Dot>(rows, c.packed.panels[p], c.packed.words.data, arg, w->lanes + (p - first));
    }
    for (int64_t p = first; p < last; ++p)
      finish_lanes(c, w, c.packed.panels[p], *items, w->lanes + (p - first), w->carry);
    return;
  }
  Rows rows[kItems];
  for (int64_t i = 0, at = 0; i < count; ++i) {
    const int64_t n = items[i].end - items[i].begin;
    rows[i] = c.source.prepare(items[i].begin, n, w->scratch, at, &w->centroid);
    at += n;
  }
  for (int64_t p = first; p < last; ++p) {
    const Panel& panel = c.packed.panels[p];
    for (int64_t i = 0; i < count; ++i) {
      Lanes lanes;
      begin_lanes(items[i], &lanes);
      run_panel<Dot>(rows[i], panel, c.packed.words.data, arg, &lanes);
      finish_lanes(c, w, panel, items[i], &lanes, w->carry + i);
    }
  }
}

// Threads, their scratch memory, and what they found wrong.
class Workers {
 public:
  int threads;
  Buffer<Worker> each;

  Workers(const Source& source, int64_t rows, int64_t panels, double nanoseconds)
      : threads(nanoseconds < 40e3 ? 1 : num_threads()), each(threads),
        memory_(threads * ((source.scratch_bytes(rows) + 63) / 64 * 64)), factor_(threads * rows),
        total_(threads * rows), carry_(threads * kItems), lanes_(threads * panels) {
    const int64_t bytes = (source.scratch_bytes(rows) + 63) / 64 * 64;
    for (int t = 0; t < threads; ++t)
      each[t] = Worker{Scratch{memory_.data + t * bytes, factor_.data + t * rows, total_.data + t * rows},
                       carry_.data + t * kItems,
                       lanes_.data + t * panels,
                       nullptr,
                       -1,
                       -1};
  }
  // fn(worker, unit); each worker takes its units in increasing order.
  template <class Fn>
  void share(int64_t units, const Fn& fn) {
    if (threads <= 1 || units <= 1) {
      for (int64_t i = 0; i < units; ++i) fn(&each[0], i);
    } else {
      parallel_slots(units, threads, [&](int slot, int64_t i) { fn(&each[slot], i); });
    }
  }
  void report(int64_t* bad) const {
    int64_t nan = -1, centroid = -1;
    for (int t = 0; t < threads; ++t) {
      const Worker& w = each[t];
      if (w.nan >= 0 && (nan < 0 || w.nan < nan)) nan = w.nan;
      if (w.centroid >= 0 && (centroid < 0 || w.centroid < centroid)) centroid = w.centroid;
    }
    if (bad[0] != static_cast<int64_t>(MaxsimBad::none)) return;
    if (centroid >= 0) {
      bad[0] = static_cast<int64_t>(MaxsimBad::centroid);
      bad[1] = centroid;
    } else if (nan >= 0) {
      bad[0] = static_cast<int64_t>(MaxsimBad::nan);
      bad[1] = nan;
    }
  }

 private:
  Buffer<char> memory_;
  Buffer<float> factor_;
  Buffer<int32_t> total_;
  Buffer<float> carry_;
  Buffer<Lanes> lanes_;
};

struct Ways {
  Pack pack;
  int digits;
};

int64_t most_panels(const Packed& p, int64_t groups) {
  int64_t most = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t n = p.panel_of[g + 1] - p.panel_of[g];
    most = n > most ? n : most;
  }
  return most;
}

// Rows of a piece: as many as stay in the second-level cache, or of converted ones in the first.
int64_t rows_of_piece(const Source& s) {
  const int64_t fit = (s.how == Read::where_they_lie ? 256 << 10 : 48 << 10) / s.stride / 48 * 48;
  return fit < 48 ? 48 : fit;
}

// All documents with queries [first, last). False: a query has no digits.
template <class Dot>
bool all_pairs(const MaxsimArgs& a, const Ways& ways, const int64_t* chunk, int64_t chunks, const Source& source,
               int64_t piece_rows, int64_t first, int64_t last) {
  const Tokens tokens(a, first, last);
  const int64_t queries = last - first;
  const double work =
      static_cast<double>(tokens.count()) * static_cast<double>(a.x_rows) * static_cast<double>(a.d) * 0.01;
  // Few pieces and many queries: the queries are shared out too.
  int64_t groups = 1;
  const int64_t wanted = 8 * num_threads();
  if (chunks < wanted && work > 1e6) {
    groups = (wanted + chunks - 1) / (chunks > 0 ? chunks : 1);
    const int64_t most = tokens.count() / (4 * W) + 1;
    groups = groups > most ? most : groups;
    groups = groups > queries ? queries : groups;
  }
  Buffer<int64_t> group(groups + 1);
  for (int64_t g = 0, q = 0; g <= groups; ++g) {
    while (q < queries && tokens.ptr[q] < tokens.count() * g / groups) ++q;
    group[g] = g == 0 ? 0 : g == groups ? queries : q;
  }
  const Packed packed(a, tokens, group.data, groups, ways.pack, ways.digits);
  if (!packed.exact) return false;
  bool large = false;  // a document of several pieces
  for (int64_t c = 0; c < chunks; ++c) large = large || a.x_ptr[chunk[c] + 1] - a.x_ptr[chunk[c]] > piece_rows;
  Workers workers(source, piece_rows, large ? most_panels(packed, groups) : 0, work);
  Selections selections(a.k ? workers.threads : 0, a.k ? queries : 0, a.k, a.documents, Metric::ip);
  if (a.k)
    for (int t = 0; t < workers.threads; ++t) workers.each[t].best = selections.of_thread(t)->best;
  const Call call{a, source, tokens, packed, group.data, first, a.documents, piece_rows};
  workers.share(chunks * groups, [&](Worker* w, int64_t unit) {
    const int64_t c = unit % chunks;
    Item items[kItems];
    int64_t count = 0;
    for (int64_t j = chunk[c]; j < chunk[c + 1]; ++j) items[count++] = item_of(a, j, j);
    run_items<Dot>(call, w, items, count, unit / chunks);
  });
  workers.report(a.bad);
  int64_t unused = -1;
  if (a.k) selections.finish(first, a.scores, a.ids, &unused);
  return true;
}

// Each query with its own candidates.
template <class Dot>
bool candidates(const MaxsimArgs& a, const Ways& ways, const Source& source, int64_t piece_rows, float* scores) {
  const Tokens tokens(a, 0, a.nq);
  Buffer<int64_t> group(a.nq + 1);
  for (int64_t i = 0; i <= a.nq; ++i) group[i] = i;
  const Packed packed(a, tokens, group.data, a.nq, ways.pack, ways.digits);
  if (!packed.exact) return false;
  const double rows = static_cast<double>(a.x_rows) / static_cast<double>(a.documents > 0 ? a.documents : 1);
  const double work =
      static_cast<double>(tokens.count()) * static_cast<double>(a.c) * rows * static_cast<double>(a.d) * 0.01;
  Workers workers(source, piece_rows, most_panels(packed, a.nq), work);
  MaxsimArgs to = a;
  to.scores = scores;
  const Call call{to, source, tokens, packed, group.data, 0, a.c, piece_rows};
  int64_t slice = a.c * a.nq / (16 * workers.threads);
  slice = slice < 1 ? 1 : slice > 64 ? 64 : slice;
  const int64_t slices = (a.c + slice - 1) / slice;
  workers.share(a.nq * slices, [&](Worker* w, int64_t unit) {
    const int64_t i = unit / slices, begin = unit % slices * slice;
    for (int64_t j = begin; j < begin + slice && j < a.c; ++j) {
      const int64_t id = a.cand[i * a.c + j];
      if (id < 0) {
        scores[i * a.c + j] = -__builtin_inff();
        continue;
      }
      if (j + 1 < begin + slice && j + 1 < a.c && a.cand[i * a.c + j + 1] >= 0)
        source.fetch(a.x_ptr[a.cand[i * a.c + j + 1]]);
      const Item item = item_of(a, id, j);
      run_items<Dot>(call, w, &item, 1, i);
    }
  });
  workers.report(a.bad);
  return true;
}

// The k best of each query's candidates, an id once.
void select_candidates(const MaxsimArgs& a, const float* scores) {
  parallel_for(a.nq, static_cast<double>(a.nq) * static_cast<double>(a.c) * 30, [&](int64_t i) {
    Buffer<uint64_t> memory(candidates_capacity(a.c));
    Candidates best;
    candidates_start(&best, memory.data, a.c);
    for (int64_t j = 0; j < a.c; ++j)
      if (a.cand[i * a.c + j] >= 0)
        best.packed[best.count++] = pack_candidate(scores[i * a.c + j], a.cand[i * a.c + j]);
    const int64_t found = candidates_sort(&best, true);
    for (int64_t j = 0; j < a.k; ++j) {
      a.scores[i * a.k + j] = j < found ? candidate_key(best.packed[j]) : -__builtin_inff();
      a.ids[i * a.k + j] = j < found ? candidate_id(best.packed[j]) : -1;
    }
  });
}

template <class Dot>
bool run(const MaxsimArgs& a, const Ways& ways) {
  const Source source(a, steps_of(ways.pack, a.d), ways.pack == Pack::bfloats, ways.pack == Pack::digits);
  const int64_t piece_rows = rows_of_piece(source);
  if (a.cand) {
    Buffer<float> work(a.k ? a.nq * a.c : 0);
    float* scores = a.k ? work.data : a.scores;
    if (!candidates<Dot>(a, ways, source, piece_rows, scores)) return false;
    if (a.k && a.bad[0] == 0) select_candidates(a, scores);
    return true;
  }
  Buffer<int64_t> chunk(a.documents + 1);
  int64_t chunks = 0;
  for (int64_t j = 0; j < a.documents;) {
    chunk[chunks++] = j;
    const int64_t begin = j;
    do {
      ++j;
    } while (j < a.documents && j - begin < kItems && a.x_ptr[j + 1] - a.x_ptr[begin] <= piece_rows);
  }
  chunk[chunks] = a.documents;
  const int64_t pass = a.k ? pass_queries(a.k, a.documents, num_threads(), 1) : a.nq;
  const int64_t tokens = kPackedBytes / (source.stride * ways.digits);
  for (int64_t first = 0, last; first < a.nq; first = last) {
    last = first + 1;
    while (last < a.nq && last - first < pass && a.q_ptr[last + 1] - a.q_ptr[first] <= tokens) ++last;
    if (!all_pairs<Dot>(a, ways, chunk.data, chunks, source, piece_rows, first, last)) return false;
  }
  return true;
}

bool set_bad(const MaxsimArgs& a, MaxsimBad what, int64_t where) {
  a.bad[0] = static_cast<int64_t>(what);
  a.bad[1] = where;
  return false;
}

bool rises(const int64_t* ptr, int64_t n, int64_t end, int64_t* where) {
  if (ptr[0] != 0 || ptr[n] != end) return *where = 0, false;
  for (int64_t i = 0; i < n; ++i)
    if (ptr[i + 1] < ptr[i]) return *where = i + 1, false;
  return true;
}

// Offsets and ids, before anything is read by them. With candidates only those documents' offsets.
bool check(const MaxsimArgs& a) {
  int64_t where = 0;
  if (!rises(a.q_ptr, a.nq, a.q_rows, &where)) return set_bad(a, MaxsimBad::query_ptr, where);
  if (!a.cand) {
    if (!rises(a.x_ptr, a.documents, a.x_rows, &where)) return set_bad(a, MaxsimBad::doc_ptr, where);
    return true;
  }
  for (int64_t i = 0; i < a.nq * a.c; ++i) {
    const int64_t id = a.cand[i];
    if (id < -1 || id >= a.documents) return set_bad(a, MaxsimBad::candidate, i);
    if (id >= 0 && (a.x_ptr[id] < 0 || a.x_ptr[id + 1] < a.x_ptr[id] || a.x_ptr[id + 1] > a.x_rows))
      return set_bad(a, MaxsimBad::doc_ptr, id + 1);
  }
  return true;
}

}  // namespace
}  // namespace late

void maxsim(const MaxsimArgs& a) {
  using namespace late;
  a.bad[0] = 0;
  a.bad[1] = -1;
  if (!check(a)) return;
  if (a.argmax) {
    const int64_t n = (a.cand ? a.c : a.documents) * a.q_rows;
    for (int64_t i = 0; i < n; ++i) a.argmax[i] = -1;
  }
#if defined(LUTRA_LEVEL_v4)
  if (a.x_type == DType::i8 && g_features.vnni && a.d <= 65536 && !a.argmax) {
    const bool whole = a.q_type == DType::i8;
    if (whole ? run<ByteDot<1>>(a, {Pack::digits, 1}) : run<ByteDot<2>>(a, {Pack::digits, 2})) return;
  }
  if (a.x_type == DType::bf16 && a.q_type == DType::bf16 && g_features.bf16) {
    run<Bf16Dot>(a, {Pack::bfloats, 1});
    return;
  }
#endif
  run<FloatDot>(a, {Pack::floats, 1});
}

}  // namespace LUTRA_NS
}  // namespace lutra
