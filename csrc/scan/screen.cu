// The int8 screen on CUDA: exact search that reads codes of 8 bits, and few exact rows. The contract is in screen.h.
//
// Queries become codes (screen_queries.cu). The screen runs over every some rows first: the `rank`-th largest of that
// sample is the query's bar. Then it runs over all (screen_scan.cu): rows whose bound reaches the bar are candidates,
// some hundreds of a million, and get exact scores (exact_pass.cu). A query whose k-th best of these is above what the
// bar stands for is done: no other row can be among its k best. The others, with too few or too many candidates, go
// through the exact pass, whose blocks return at once where there are none. So the results are those of knn to the bit,
// whatever the data.
//
// Small collections, large k and rows too long for shared memory are searched by knn; so are few queries of which the
// codes would save less reading than the launches cost, and searches that would have many candidates.
#include "scan/screen.h"

#include <cmath>

#include "scan/exact_pass.h"
#include "scan/knn_screen.h"
#include "scan/screen_cuda.h"

namespace lutra {
namespace cuda {
namespace {

using Args = ::lutra::ScreenArgs;

constexpr int kThreads = 256;
constexpr int64_t kLeastRows = 32768;         // fewer are searched by knn
constexpr int64_t kLeastSaved = 100'000'000;  // bytes
constexpr int64_t kCandidatesOf = 64;         // at most every so many-th row is a candidate: they are read at random
constexpr int64_t kMostK = 256, kMostStep = 32, kListBytes = int64_t{256} << 20;

int64_t g_rows = kLeastRows, g_capacity = 0;  // tests choose others

struct Plan {
  bool screened;
  int width, sample_width, best, rank, capacity;
  int64_t queries, padded;  // per launch
  int64_t tiles, parts, tiles_per_part;
  int step;
  int64_t sampled, sample_parts, sampled_per_part;
  int pass_parts;  // of the exact pass
  int64_t pass_tiles_per_part;
};

KnnArgs knn_args(const Args& a) {
  KnnArgs k{a.q, static_cast<const float*>(a.x), a.nq, a.n, a.d, a.ldq, a.ldx, a.k, a.metric, a.scores, a.ids, nullptr};
  k.storage = a.dtype, k.keep = a.keep, k.bias = a.bias;
  return k;
}

// About so many rows of each query should pass: as many as the bounds let reach the k-th best score, and some more.
// What the codes lose grows with the root of the dimension against the scores' spread: of normal values the bound lies
// 0.02 sqrt(d) standard deviations of the scores above the score. With the k-th best of n at z of them, about
// k exp(m z - m^2 / 2) scores lie above z - m. A tenth more is for queries that lie badly.
int64_t wanted_candidates(int64_t k, int64_t n, int64_t d) {
  const double root = sqrt(static_cast<double>(d)), z = sqrt(2 * log(static_cast<double>(n) / static_cast<double>(k)));
  double m = 0.021 * root + 0.1;
  if (m > z) m = z;  // all n
  const double reach = exp(m * z - m * m / 2), least = 5 + 0.25 * root;
  return 432 + static_cast<int64_t>(static_cast<double>(k) * (reach > least ? reach : least));
}

// Where the codes of a whole collection are read for few queries, what they save must pay for some ten launches: 100 MB
// are about 30 us of an H100's memory.
bool saves_little(const Args& a) { return a.nq <= 8 && a.n * a.d * (element_bytes(a.dtype) - 1) < kLeastSaved; }

Plan plan_for(const Args& a, int device) {
  Plan p{};
  p.width = screen_width(a.nq, a.d, false, device), p.sample_width = screen_width(a.nq, a.d, true, device);
  p.screened =
      p.sample_width > 0 && a.nq > 0 && a.d > 0 && a.n >= g_rows && a.n > a.k && a.k <= kMostK && a.n <= kMaxRows;
  if (g_rows == kLeastRows && saves_little(a)) p.screened = false;
  if (!p.screened) return p;
  p.best = static_cast<int>(a.k);
  const int64_t wanted = wanted_candidates(a.k, a.n, a.d), sms = multiprocessors(device);
  // The bar may come from rows that stand beside their like, of which a bucket of the sample has the best of four.
  p.capacity = static_cast<int>(g_capacity > 0 ? g_capacity : 4 * wanted + 512);
  p.tiles = div_up(a.n, kScreenTile);
  const int64_t step = p.tiles / 32, most = wanted > kMostStep * 64 ? 2 * kMostStep : kMostStep;
  p.step = static_cast<int>(step < 2 ? 2 : step > most ? most : step);
  p.sampled = p.tiles >= 2 * kScreenWarps ? div_up(p.tiles, p.step) : 0;

  const int64_t pass = kPassWarps * int64_t{p.best} * static_cast<int64_t>(sizeof(Key));
  const int64_t each = p.capacity * int64_t{16} + screen_panel_bytes(16, a.d) / 16 + 8 * pass + 16 * kBuckets * 4 +
                       (a.metric == Metric::cosine ? a.d * 4 : 0);
  int64_t fit = kListBytes / each / 128 * 128;
  fit = fit < 128 ? 128 : fit > 16384 ? 16384 : fit;
  p.queries = a.nq < fit ? a.nq : fit;
  p.padded = round_up(p.queries, p.width < 16 ? 16 : p.width);
  const int64_t groups = div_up(p.queries, p.width), slots = sms * screen_blocks(p.width, a.d, device);
  p.parts = parts_for(groups, p.tiles, slots, kScreenWarps);
  p.tiles_per_part = div_up(p.tiles, p.parts);
  p.parts = div_up(p.tiles, p.tiles_per_part);
  if (p.sampled) {
    p.sample_parts = parts_for(div_up(p.queries, p.sample_width), p.sampled, slots, kScreenWarps);
    if (p.sample_parts > 128) p.sample_parts = 128;
    p.sampled_per_part = div_up(p.sampled, p.sample_parts);
    p.sample_parts = div_up(p.sampled, p.sampled_per_part);
    p.rank = static_cast<int>(div_up(wanted, p.step));
    const int64_t buckets = p.sample_parts * kBuckets < 256 ? p.sample_parts * kBuckets : 256;
    const int64_t some = buckets < 8 * p.sampled ? buckets : 8 * p.sampled;
    if (p.rank > some / 3) p.rank = static_cast<int>(some / 3);
    if (p.rank < 1) p.rank = 1;
  }
  // Where the sample cannot give such a bar most queries would need the exact pass.
  const bool many = wanted * kCandidatesOf > a.n || int64_t{4} * p.rank * p.step < 3 * wanted;
  if (g_rows == kLeastRows && many) p.screened = false;

  const int64_t pass_tiles = div_up(a.n, 32 * kPassWarps);
  int64_t parts = pass_blocks(device);
  const int64_t room = kListBytes / (p.queries * p.best * pass_lists(p.best) * static_cast<int64_t>(sizeof(Key)));
  if (parts > room) parts = room > 1 ? room : 1;
  if (parts > pass_tiles) parts = pass_tiles;
  p.pass_tiles_per_part = div_up(pass_tiles, parts) * kPassWarps;
  p.pass_parts = static_cast<int>(div_up(pass_tiles * kPassWarps, p.pass_tiles_per_part));
  return p;
}

struct Workspace {
  float* normalized;
  CodedQueries queries;
  float* sample;
  int64_t* candidates;
  Key* exact;
  int* failed;
  int* failures;
  Key *pass_bars, *pass_scratch, *pass_lists;
  int64_t bytes;
};

Workspace lay_out(const Args& a, const Plan& p, int device, void* base) {
  Carve carve(base);
  Workspace w{};
  if (a.metric == Metric::cosine) w.normalized = carve.take<float>(p.queries * a.d);
  w.queries.panels = carve.take<unsigned char>(screen_panel_bytes(p.padded, a.d));
  w.queries.start = carve.take<int>(p.padded);
  w.queries.per_scale = carve.take<float>(p.padded);
  w.queries.scale = carve.take<double>(p.padded);
  w.queries.slack = carve.take<double>(p.padded);
  w.queries.shift = carve.take<double>(p.padded);
  w.queries.bars = carve.take<unsigned>(p.padded);
  w.queries.counts = carve.take<int>(p.padded);
  w.queries.broken = carve.take<int>(p.padded);
  w.sample = carve.take<float>(p.padded * p.sample_parts * kBuckets);
  w.candidates = carve.take<int64_t>(p.queries * p.capacity);
  w.exact = carve.take<Key>(p.queries * p.capacity);
  w.failed = carve.take<int>(p.queries);
  w.failures = carve.take<int>(1);
  w.pass_bars = carve.take<Key>(p.queries);
  w.pass_scratch = carve.take<Key>(pass_scratch(p.queries, p.best, device));
  w.pass_lists = carve.take<Key>(p.queries * p.pass_parts * pass_lists(p.best) * p.best);
  w.bytes = carve.used();
  return w;
}

struct CheckArgs {
  CodedQueries queries;
  const float* scores;  // [nq][k]
  int64_t nq, k;
  int capacity;
  bool l2;
  int* failed;
  int* failures;
};

// Whether no row outside the candidates can be among the k best: its score is at most what the bar stands for.
__global__ void __launch_bounds__(kThreads) check_kernel(CheckArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.nq) return;
  const CodedQueries& q = a.queries;
  bool safe = !q.broken[i] && q.counts[i] <= a.capacity;
  if (safe && q.bars[i] > kLowestBar) {
    const double bar = from_ordered_bits(q.bars[i]), score = a.scores[i * a.k + a.k - 1];
    const double most = (q.scale[i] * bar + q.slack[i]) * (a.l2 ? 2.0 : 1.0) + q.shift[i];
    safe = (a.l2 ? -score : score) > most;
  }
  if (!safe) a.failed[atomicAdd(a.failures, 1)] = static_cast<int>(i);
}

void search(const Args& a, const Plan& p, const Workspace& w, const float* q, int64_t ldq, const Launch& l) {
  const int d = static_cast<int>(a.d);
  const bool l2 = a.metric == Metric::l2;
  code_queries(QueryArgs{q, a.nq, p.padded, ldq, d, a.metric, l2 || a.bias, a.mean, a.bounds, w.queries}, l);
  Int8Scan s{};
  s.codes = a.codes, s.inverse = a.inverse, s.half = a.half, s.keep = a.keep;
  s.n = a.n, s.nq = a.nq, s.d = d;
  s.use_half = l2 || a.bias;
  // l2: twice what a sum of d squares can be wrong by (screen_queries.cu), and half's own sum
  s.half_reach = l2 ? (d + 32) * 0x1.2p-23f : 0x1p-20f;
  s.queries = w.queries;
  s.candidates = w.candidates, s.capacity = p.capacity;
  if (p.sampled) {
    Int8Scan some = s;
    some.tiles = p.sampled, some.tiles_per_part = p.sampled_per_part, some.tile_step = p.step;
    some.sample = w.sample, some.sample_pitch = p.sample_parts * kBuckets;
    screen_scan(some, p.sample_width, p.sample_parts, l);
    seed_bars(SeedArgs{w.sample, a.nq, some.sample_pitch, p.rank, w.queries.bars}, l);
  }
  s.tiles = p.tiles, s.tiles_per_part = p.tiles_per_part, s.tile_step = 1;
  screen_scan(s, p.width, p.parts, l);
  CandidateArgs c{q, a.x, a.nq, a.n, ldq, a.ldx, d, a.dtype, a.metric, a.bias, w.candidates, p.capacity, w.exact};
  c.counts = w.queries.counts;
  score_candidates(c, l);
  merge_lists(Merge{w.exact, a.nq, 1, p.capacity, p.capacity, false, p.best, p.best, l2, a.scores, a.ids},
              "knn_screened", l);
  fill_zero("knn_screened", w.failures, sizeof(int), l);
  launch("knn_screened", check_kernel, grid_x(div_up(a.nq, kThreads)), kThreads, 0, l,
         CheckArgs{w.queries, a.scores, a.nq, a.k, p.capacity, l2, w.failed, w.failures});

  fill_zero("knn_screened", w.pass_bars, static_cast<size_t>(a.nq) * sizeof(Key), l);
  exact_pass(PassArgs{q,
                      a.x,
                      a.nq,
                      a.n,
                      ldq,
                      a.ldx,
                      d,
                      a.dtype,
                      a.metric,
                      a.bias,
                      a.keep,
                      w.failed,
                      w.failures,
                      p.best,
                      pass_capacity(p.best),
                      p.pass_parts,
                      p.pass_tiles_per_part,
                      w.pass_bars,
                      w.pass_scratch,
                      w.pass_lists},
             l);
  merge_lists(Merge{w.pass_lists, a.nq, p.pass_parts * pass_lists(p.best), p.best, p.best, false, p.best, p.best, l2,
                    a.scores, a.ids, nullptr, w.failed, w.failures},
              "knn_screened", l);
}

}  // namespace

void screen_paths(int64_t rows, int64_t capacity) {
  g_rows = rows > 0 ? rows : kLeastRows;
  g_capacity = capacity;
}

int64_t screen_workspace(const Args& a, bool plain, const Launch& l) {
  const DeviceGuard guard(l.device);
  const Plan p = plan_for(a, l.device);
  return p.screened ? lay_out(a, p, l.device, nullptr).bytes : knn_workspace(knn_args(a), plain, l);
}

void screen(const Args& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const Plan p = plan_for(a, l.device);
  if (!p.screened) return knn(knn_args(a), l);
  if (!aligned(a.codes, 16) || !aligned(a.inverse, 16) || !aligned(a.half, 16))
    throw std::invalid_argument("lutra: knn_screened: the arrays of screen must be aligned to 16 bytes");
  const Workspace w = lay_out(a, p, l.device, l.workspace);
  for (int64_t first = 0; first < a.nq; first += p.queries) {
    Args part = a;
    part.nq = a.nq - first < p.queries ? a.nq - first : p.queries;
    part.scores += first * a.k, part.ids += first * a.k;
    const float* q = a.q + first * a.ldq;
    int64_t ldq = a.ldq;
    if (a.metric == Metric::cosine) {
      normalize_queries(q, part.nq, ldq, a.d, w.normalized, l);
      q = w.normalized, ldq = a.d;
    }
    search(part, p, w, q, ldq, l);
  }
}

}  // namespace cuda
}  // namespace lutra
