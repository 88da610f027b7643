// Exact k nearest neighbours on CUDA; formula and conventions are in knn.h.
//
// Few queries (8 at most) and the metrics l1, linf and poincare: one pass over the collection for 8 queries at a time
// (exact_pass.cuh), whose limit is reading it. More queries: tensor cores give an upper bound of every score and the
// rows of the largest bounds are kept (knn_screen.cuh), some more than k, or for k > 128 all above a bar that a sample
// gives; their exact scores are computed, and a query whose k-th exact score is not better than the least bound that
// was kept, or than the bar, goes through the exact pass after all. That is decided on the device: the launches of the
// exact pass return at once where no query needs them. So scores have the same bits whatever the way (exact_score.cuh),
// and the result is exact whatever the data.
//
// k > 512 without a screen (2048 with one): the exact pass writes all scores of some queries, which are selected by
// radix (any_k.cuh). A NaN score comes first, as in torch.topk. Overflow: row offsets are 64-bit, ids have 32 bits (n <
// 2^32 - 1, checked); a score that overflows fp32 becomes infinite, as in the reference.
#include "scan/knn.h"

#include <cmath>

#include "common/select.cuh"
#include "scan/any_k.cuh"
#include "scan/exact_pass.h"
#include "scan/knn_nearest.h"
#include "scan/knn_screen.h"

namespace lutra {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kListBytes = int64_t{256} << 20;  // of the workspace, about
constexpr int kSampleStep = 32, kScreenK = 128, kListK = 512, kPassQueries = 8;
constexpr int64_t kManyValues = int64_t{1} << 29;
constexpr int kMostRank = 128;  // seed_bars has 256 places

// Below so many rows the exact pass is as fast as the screen.
constexpr int64_t kScreenRows = 4096;
bool g_sm90 = true;  // tests choose other ways
int64_t g_screen_rows = kScreenRows;

struct Plan {
  bool screened, sm90;
  bool counted;  // the screen's candidates are counted, and `keep` is how many a query may have
  bool whole;    // long lists: all scores are written, and selected from
  int best, keep;
  int64_t queries, padded;  // per launch
  int slabs, query_terms;
  ScreenShape shape;
  ScreenLists lists;
  int64_t tiles, screen_tiles_per_part;
  int64_t sampled;  // tiles; 0: no sample is taken
  int sample_step, rank;
  int parts;  // of the exact pass
  int64_t tiles_per_part;
};

// How many parts a collection is cut into for `groups` of queries on so many slots: the last round should leave few
// idle.
int parts_of(int64_t groups, int64_t slots, int64_t most) {
  if (most < 1) most = 1;
  const int64_t first = slots / groups > 0 ? slots / groups : 1, last = first * 4 < most ? first * 4 : most;
  int64_t best = first < most ? first : most;
  double idle = 2;
  for (int64_t parts = best; parts <= last; ++parts) {
    const int64_t blocks = groups * parts, rounds = div_up(blocks, slots);
    const double now = static_cast<double>(rounds * slots) / blocks;
    if (now < idle * 0.97) idle = now, best = parts;  // more parts, more lists: only where it pays
  }
  return static_cast<int>(best < 65535 ? best : 65535);
}

void plan_pass(const KnnArgs& a, int64_t queries, int device, Plan* p) {
  const int64_t groups = div_up(queries, pass_group(queries)), tiles = div_up(a.n, 32 * kPassWarps);
  const int slots = pass_blocks(device);
  // A few failed queries of a screen are shared by all multiprocessors.
  int64_t parts = p->screened ? slots : parts_of(groups, slots, slots);
  const int64_t room = p->counted ? kListBytes / 4 : kListBytes;
  const int64_t fit = room / (queries * p->best * pass_lists(p->best) * static_cast<int64_t>(sizeof(Key)) + 1);
  if (parts > fit) parts = fit > 1 ? fit : 1;
  if (parts > tiles) parts = tiles > 1 ? tiles : 1;
  p->tiles_per_part = div_up(tiles > 0 ? tiles : 1, parts) * kPassWarps;
  p->parts = static_cast<int>(div_up(tiles > 0 ? tiles * kPassWarps : 1, p->tiles_per_part));
}

// Every sample_step-th tile, 16 of them at least. About rank * sample_step rows lie above the bar that the rank-th
// largest sample makes. That there are fewer than k, whose query then goes through the exact pass, has a chance of some
// 1e-6.
void take_sample(int64_t k, Plan* p) {
  const int64_t step = p->tiles / 16;
  p->sample_step = static_cast<int>(step < kSampleStep ? step : kSampleStep);
  p->sampled = p->sample_step > 1 ? div_up(p->tiles, p->sample_step) : 0;
  const double expected = static_cast<double>(k) / (p->sample_step > 1 ? p->sample_step : 1);
  p->rank = static_cast<int>(expected + 3.5 * sqrt(expected) + 5);
  if (p->rank > p->sampled * 2 || p->rank > kMostRank) p->sampled = 0;
}

// Room for the candidates that a bar of the sample should give, where the best of 256 of its places stand for many rows
// each, and for some more.
int counted_room(const Plan& p) { return static_cast<int>(round_up(int64_t{3} * p.rank * p.sample_step + 512, 32)); }

void check_sizes(const KnnArgs& a) {
  if (a.n > kMaxRows || a.d > 0x7ffffff0)
    throw std::length_error("lutra: knn on CUDA takes fewer than 2^32 - 1 rows of fewer than 2^31 - 16 values");
}

bool hopper_kernels(int device) {
#ifdef LUTRA_CUDA_SM90A
  return g_sm90 && is_hopper(device);
#else
  return false;
#endif
}

// Whether a sample gives a bar for more than kScreenK candidates.
bool can_count(const KnnArgs& a, const ScreenShape& shape) {
  Plan p{};
  p.tiles = div_up(a.n, shape.rows);
  take_sample(a.k, &p);
  return p.sampled > 0 && counted_room(p) < a.n;
}

Plan plan_for(const KnnArgs& a, int device) {
  Plan p{};
  p.queries = a.nq > 0 ? a.nq : 1;
  const bool product = a.metric == Metric::ip || a.metric == Metric::l2 || a.metric == Metric::cosine;
  p.sm90 = hopper_kernels(device);
  // Of bf16 rows the exact pass multiplies slower than it reads, and takes as long for 2 queries as for 8.
  const bool batch = a.nq > (a.storage == DType::bf16 && a.n * a.d >= kManyValues ? 1 : kPassQueries);
  p.screened = product && batch && a.n >= g_screen_rows && a.d > 0 && a.d <= 65536;
  p.counted = p.screened && a.k > kScreenK && a.k <= kMaxK && can_count(a, screen_shape(a.storage));
  p.screened = p.screened && (a.k <= kScreenK || p.counted);
  p.whole = a.k > kListK && a.n > kListK && !p.counted;
  p.best = p.whole ? 0 : static_cast<int>(a.k < a.n ? a.k : a.n);
  const bool cosine = a.metric == Metric::cosine;
  const int64_t row = cosine ? a.d * 4 : 0;
  if (p.whole) {
    p.queries = any_k_queries(p.queries, a.n);
    plan_pass(a, p.queries, device, &p);
    return p;
  }
  if (!p.screened) {
    const int64_t lists = static_cast<int64_t>(p.best > 0 ? p.best : 1) * pass_lists(p.best) * sizeof(Key);
    int64_t fit = kListBytes / (lists + row) / kPassQueries * kPassQueries;
    if (p.queries > fit) p.queries = fit > kPassQueries ? fit : kPassQueries;
    plan_pass(a, p.queries, device, &p);
    return p;
  }
  p.keep = static_cast<int>(round_up(a.k + (a.k > 64 ? a.k / 4 : 16), 4));
  p.query_terms = a.storage == DType::bf16 && a.bf16_queries && !cosine ? 1 : 2;
  p.slabs = static_cast<int>(div_up(a.d, 64));
  const int64_t panels = p.slabs * 128 * p.query_terms;
  if (p.queries > 32768) p.queries = 32768;
  for (;; p.queries = div_up(p.queries, 2)) {
    p.shape = screen_shape(a.storage);
#ifdef LUTRA_CUDA_SM90A
    if (p.sm90) p.shape = screen_shape_sm90(p.queries, a.d, a.storage, p.query_terms);
#endif
    if (p.counted) p.shape = screen_shape(a.storage);  // blocks of 128 queries, which both kernels have
    p.padded = round_up(p.queries, p.shape.queries);
    const int64_t tiles = div_up(a.n, p.shape.rows), groups = p.padded / p.shape.queries;
    int64_t parts = parts_of(groups, multiprocessors(device), div_up(tiles, 4));
    ScreenLists& s = p.lists;
    s.keep = p.keep;
    s.per_lane = p.keep / 4 + 8 + 32;
    p.tiles = tiles;
    p.screen_tiles_per_part = div_up(tiles, parts);
    s.parts = static_cast<int>(div_up(tiles, p.screen_tiles_per_part));
    s.pitch = p.counted ? 0 : static_cast<int64_t>(s.parts) * 4 * s.per_lane;
    take_sample(a.k, &p);
    if (p.counted) p.keep = s.capacity = counted_room(p);
    const int64_t lists = (s.pitch + (p.counted ? 2 * p.keep : 0)) * static_cast<int64_t>(sizeof(Key));
    const int64_t bytes = p.padded * (lists + p.sampled * 4 * 4 + panels + row);
    if (bytes <= 2 * kListBytes || p.queries <= p.shape.queries) break;
  }
  plan_pass(a, p.queries, device, &p);
  return p;
}

struct Workspace {
  float* normalized;
  double* rooms;
  unsigned char* panels;
  float* reach;
  double* squares;
  Key* lists;
  unsigned* bars;
  float* sample;
  float* bounds;  // of the candidates: [queries][keep]
  int* counts;
  int64_t* candidates;
  Key* exact;
  int* failed;
  int* failures;
  Key* pass_bars;
  Key* scratch;
  Key* pass_lists;
  void* whole;
  int64_t bytes;
};

Workspace lay_out(const KnnArgs& a, const Plan& p, int device, void* base) {
  Carve carve(base);
  Workspace w{};
  if (a.metric == Metric::cosine) w.normalized = carve.take<float>(p.queries * a.d);
  if (a.metric == Metric::poincare) w.rooms = carve.take<double>(p.queries);
  if (p.screened) {
    w.panels = carve.take<unsigned char>(panel_bytes(p.padded, p.slabs, p.query_terms));
    w.reach = carve.take<float>(p.padded);
    w.squares = carve.take<double>(p.padded);
    w.bars = carve.take<unsigned>(p.padded);
    w.lists = carve.take<Key>(p.padded * p.lists.pitch);
    w.sample = carve.take<float>(p.padded * p.sampled * 4);
    if (p.counted) w.counts = carve.take<int>(p.padded);
    w.bounds = carve.take<float>(p.counted ? 0 : p.queries * p.keep);
    w.candidates = carve.take<int64_t>((p.counted ? p.padded : p.queries) * p.keep);
    w.exact = carve.take<Key>(p.queries * p.keep);
    w.failed = carve.take<int>(p.queries);
    w.failures = carve.take<int>(1);
  }
  if (p.whole) {
    w.whole = carve.take<unsigned char>(any_k_bytes(p.queries, a.n, a.k));
    w.bytes = carve.used();
    return w;
  }
  w.pass_bars = carve.take<Key>(p.queries);
  w.scratch = carve.take<Key>(pass_scratch(p.queries, p.best, device));
  w.pass_lists = carve.take<Key>(p.queries * p.parts * pass_lists(p.best) * p.best);
  w.bytes = carve.used();
  return w;
}

struct CheckArgs {
  const float* bounds;        // [nq][keep], falling
  const int64_t* candidates;  // [nq][keep]
  const int* counts;          // or the candidates are what exceeded the bar, if so many had room; null: see above
  const float* scores;        // [nq][k]
  const float* reach;
  const double* squares;
  const unsigned* bars;
  int64_t nq, n, k, best;
  int keep, d;
  Metric metric;
  int* failed;
  int* failures;
};

// Whether no row outside the candidates can be among the k best of a query: their bounds are at most the last one's.
__global__ void __launch_bounds__(kThreads) check_kernel(CheckArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.nq) return;
  if (a.n <= a.keep) return;  // every row is a candidate
  const bool overfull = a.counts && a.counts[i] > a.keep;
  const bool whole = !a.counts && a.candidates[i * a.keep + a.keep - 1] >= 0;
  const unsigned bar = a.bars[i];
  if (!whole && !overfull && bar <= kLowestBar) return;  // nor was any row left out here
  const float bound = whole ? a.bounds[i * a.keep + a.keep - 1] : from_ordered_bits(bar);
  const double least = bound, score = a.scores[i * a.k + a.best - 1];
  bool safe;
  if (a.metric == Metric::l2) {
    // a computed distance is at least the real one less (d + 4) / 2^24 of it
    safe = score < (a.squares[i] - 2 * least) * (1.0 - (a.d + 4) * 0x1.1p-24);
  } else {
    safe = score > (a.metric == Metric::cosine ? least + 1.001 * a.reach[i] : least);
  }
  if (!safe || overfull) a.failed[atomicAdd(a.failures, 1)] = static_cast<int>(i);
}

PassArgs pass_args(const KnnArgs& a, const Plan& p, const Workspace& w, const float* q, int64_t ldq, int64_t count) {
  return PassArgs{q,
                  a.x,
                  count,
                  a.n,
                  ldq,
                  a.ldx,
                  static_cast<int>(a.d),
                  a.storage,
                  a.metric,
                  a.bias,
                  a.keep,
                  nullptr,
                  nullptr,
                  p.best,
                  pass_capacity(p.best),
                  p.parts,
                  p.tiles_per_part,
                  w.pass_bars,
                  w.scratch,
                  w.pass_lists};
}

void run_screen(const ScreenArgs& s, const Plan& p, const Launch& l) {
#ifdef LUTRA_CUDA_SM90A
  if (p.sm90) return screen_sm90(s, p.shape, l);
#endif
  screen(s, l);
}

void search_screened(const KnnArgs& a, const Plan& p, const Workspace& w, const float* q, int64_t ldq,
                     const Launch& l) {
  const int d = static_cast<int>(a.d);
  const bool cosine = a.metric == Metric::cosine;
  const float slope = screen_slope(d, p.slabs, p.query_terms, row_terms_of(a.storage), cosine);
  make_panels(PanelArgs{q, a.nq, ldq, p.padded, d, p.slabs, p.query_terms, slope, w.panels, w.reach, w.squares, w.bars},
              l);
  ScreenArgs s{};
  s.x = a.x, s.n = a.n, s.ldx = a.ldx, s.d = d, s.slabs = p.slabs;
  const int64_t value = element_bytes(a.storage);
  const int64_t access = value == 1 ? 8 : 16;
  s.vectors = aligned(a.x, static_cast<size_t>(access)) && a.ldx * value % access == 0;
  s.storage = a.storage, s.query_terms = p.query_terms;
  s.panels = w.panels, s.reach = w.reach, s.padded = p.padded;
  s.l2 = a.metric == Metric::l2;
  s.mode = cosine ? kScreenCosine : s.l2 || a.bias ? kScreenShifted : kScreenPlain;
  s.bias = a.bias, s.keep = a.keep;
  s.lists = p.lists;
  s.lists.keys = w.lists, s.lists.bars = w.bars;
  s.lists.counts = w.counts, s.lists.candidates = w.candidates;
  if (p.sampled) {
    ScreenArgs some = s;
    some.tiles = p.sampled, some.tile_step = p.sample_step;
    const int64_t groups = p.padded / p.shape.queries;
    some.tiles_per_part = div_up(p.sampled, parts_of(groups, multiprocessors(l.device), p.sampled));
    some.sample = w.sample, some.sample_pitch = p.sampled * 4;
    run_screen(some, p, l);
    seed_bars(SeedArgs{w.sample, a.nq, p.sampled * 4, p.rank, w.bars}, l);
  }
  s.tiles = p.tiles, s.tiles_per_part = p.screen_tiles_per_part, s.tile_step = 1;
  if (p.counted) fill_zero("knn", w.counts, static_cast<size_t>(p.padded) * sizeof(int), l);
  run_screen(s, p, l);
  const int per_part = 4 * p.lists.per_lane;
  if (!p.counted)
    merge_lists(
        Merge{w.lists, a.nq, p.lists.parts, per_part, per_part, false, p.keep, p.keep, false, w.bounds, w.candidates},
        "knn", l);
  CandidateArgs c{q, a.x, a.nq, a.n, ldq, a.ldx, d, a.storage, a.metric, a.bias, w.candidates, p.keep, w.exact};
  c.counts = w.counts;
  score_candidates(c, l);
  merge_lists(Merge{w.exact, a.nq, 1, p.keep, p.keep, false, p.best, static_cast<int>(a.k), s.l2, a.scores, a.ids},
              "knn", l);
  fill_zero("knn", w.failures, sizeof(int), l);
  launch("knn", check_kernel, grid_x(div_up(a.nq, kThreads)), kThreads, 0, l,
         CheckArgs{w.bounds, w.candidates, w.counts, a.scores, w.reach, w.squares, w.bars, a.nq, a.n, a.k, p.best,
                   p.keep, d, a.metric, w.failed, w.failures});
}

}  // namespace

void knn_paths(bool sm90, int64_t screen_rows) {
  g_sm90 = sm90;
  g_screen_rows = screen_rows > 0 ? screen_rows : kScreenRows;
}

int64_t knn_workspace(const KnnArgs& a, bool plain, const Launch& l) {
  const DeviceGuard guard(l.device);
  check_sizes(a);
  const bool sm90 = hopper_kernels(l.device);
  if (plain && is_nearest(a, l.device)) return nearest_workspace(a, sm90, l.device);
  return lay_out(a, plan_for(a, l.device), l.device, nullptr).bytes;
}

void knn(const KnnArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  check_sizes(a);
  if (!a.keep && !a.bias && is_nearest(a, l.device)) return nearest(a, hopper_kernels(l.device), l);
  const Plan p = plan_for(a, l.device);
  const Workspace w = lay_out(a, p, l.device, l.workspace);
  const bool smaller = a.metric != Metric::ip && a.metric != Metric::cosine;
  for (int64_t first = 0; first < a.nq; first += p.queries) {
    KnnArgs part = a;
    part.nq = a.nq - first < p.queries ? a.nq - first : p.queries;
    part.scores += first * a.k, part.ids += first * a.k;
    const float* q = a.q + first * a.ldq;
    int64_t ldq = a.ldq;
    if (a.metric == Metric::cosine) {
      normalize_queries(q, part.nq, ldq, a.d, w.normalized, l);
      q = w.normalized, ldq = a.d;
    }
    if (a.metric == Metric::poincare) query_rooms(q, part.nq, ldq, a.d, w.rooms, l);
    PassArgs pass = pass_args(part, p, w, q, ldq, part.nq);
    pass.rooms = w.rooms;
    if (p.whole) {
      const AnyK all = any_k_arrays(p.queries, a.n, a.k, w.whole);
      pass.all = all.scores;
      exact_pass(pass, l);
      any_k(all, part.nq, smaller, part.scores, part.ids, "knn", l);
      continue;
    }
    if (p.screened) {
      search_screened(part, p, w, q, ldq, l);
      pass.which = w.failed, pass.count = w.failures;
    }
    const int lists = p.parts * pass_lists(p.best);
    if (p.best > 0) {
      fill_zero("knn", w.pass_bars, part.nq * sizeof(Key), l);
      exact_pass(pass, l);
    }
    merge_lists(Merge{w.pass_lists, part.nq, p.best > 0 ? lists : 0, p.best, p.best, false, p.best,
                      static_cast<int>(a.k), smaller, part.scores, part.ids, nullptr, pass.which, pass.count},
                "knn", l);
  }
}

}  // namespace cuda
}  // namespace lutra
