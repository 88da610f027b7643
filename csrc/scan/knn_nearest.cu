// The nearest row of each of many queries (address.nearest; k-means): no lists. Tensor cores give upper bounds of all
// scores, a thread keeps the two rows of the largest and the third bound (knn_screen.cuh); both rows' exact scores are
// computed, and where the better is not above the third bound the query goes through the exact pass. So the result
// is that of knn.cu, to the bit.
//
// The limit is the matrix rate: three products of bf16 terms for one of fp32. A block reads its queries once.
#include "scan/exact_pass.h"
#include "scan/knn_nearest.h"
#include "scan/knn_screen.h"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct Plan {
  ScreenShape shape;
  bool sm90;
  int64_t queries, padded;
  int slabs, parts;
  int64_t tiles_per_part;
};

Plan plan_for(const KnnArgs& a, int device, bool sm90) {
  Plan p{};
  p.sm90 = sm90;
  p.shape = screen_shape(DType::f32);
#ifdef LUTRA_CUDA_SM90A
  if (sm90) p.shape = screen_shape_sm90(a.nq, a.d, DType::f32, 2);
#endif
  p.slabs = static_cast<int>(div_up(a.d, 64));
  // Whole rounds of blocks, and some 256 MB of panels.
  const int64_t round = static_cast<int64_t>(multiprocessors(device)) * p.shape.queries;
  const int64_t rounds = (int64_t{256} << 20) / (round * p.slabs * 256);
  p.queries = round * (rounds > 1 ? rounds : 1);
  if (p.queries > a.nq) p.queries = a.nq;
  p.padded = round_up(p.queries, p.shape.queries);
  const int64_t tiles = div_up(a.n, 32 * kPassWarps);
  const int64_t fit = (int64_t{32} << 20) / (p.queries * static_cast<int64_t>(sizeof(Key)) + 1);
  int64_t parts = multiprocessors(device);
  if (parts > fit) parts = fit;
  if (parts > tiles) parts = tiles;
  if (parts < 1) parts = 1;
  p.tiles_per_part = div_up(tiles, parts) * kPassWarps;
  p.parts = static_cast<int>(div_up(tiles * kPassWarps, p.tiles_per_part));
  return p;
}

struct Workspace {
  unsigned char* panels;
  float* reach;
  double* squares;
  unsigned* bars;
  int64_t* candidates;
  float* bounds;
  Key* exact;
  int* failed;
  int* flags;  // how many failed; whether a row is broken
  Key* pass_bars;
  Key* scratch;
  Key* pass_lists;
  int64_t bytes;
};

Workspace lay_out(const Plan& p, int device, void* base) {
  Carve carve(base);
  Workspace w;
  w.panels = carve.take<unsigned char>(panel_bytes(p.padded, p.slabs, 2));
  w.reach = carve.take<float>(p.padded);
  w.squares = carve.take<double>(p.padded);
  w.bars = carve.take<unsigned>(p.padded);
  w.candidates = carve.take<int64_t>(2 * p.queries);
  w.bounds = carve.take<float>(p.queries);
  w.exact = carve.take<Key>(2 * p.queries);
  w.failed = carve.take<int>(p.queries);
  w.flags = carve.take<int>(2);
  w.pass_bars = carve.take<Key>(p.queries);
  w.scratch = carve.take<Key>(pass_scratch(p.queries, 1, device));
  w.pass_lists = carve.take<Key>(p.queries * p.parts);
  w.bytes = carve.used();
  return w;
}

struct DecideArgs {
  const Key* exact;  // [nq][2]
  const float* bounds;
  const double* squares;
  const int64_t* candidates;
  int64_t nq;
  int d;
  bool l2;
  float* scores;
  int64_t* ids;
  int* failed;
  int* flags;
};

__global__ void __launch_bounds__(kThreads) decide_kernel(DecideArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.nq) return;
  const Key first = a.exact[2 * i], second = a.exact[2 * i + 1], key = first > second ? first : second;
  const float score = a.l2 ? 0.0f - key_score(key) : key_score(key);
  const double bound = a.bounds[i];
  const bool safe = a.l2 ? score < (a.squares[i] - 2 * bound) * (1.0 - (a.d + 4) * 0x1.1p-24) : score > bound;
  if (safe && key && a.squares[i] < kPlainSquares && !a.flags[1]) {
    a.scores[i] = score;
    a.ids[i] = key_id(key);
  } else {
    a.failed[atomicAdd(a.flags, 1)] = static_cast<int>(i);
  }
}

}  // namespace

bool is_nearest(const KnnArgs& a, int device) {
  if (a.k != 1 || a.storage != DType::f32 || (a.metric != Metric::ip && a.metric != Metric::l2) || a.d < 1 ||
      a.d > 65536)
    return false;
  // One block has all rows for its queries.
  return a.nq >= 1024 && a.n >= 1 && a.n < (1 << 30) && (a.nq >= 128 * multiprocessors(device) || a.n <= 4096);
}

int64_t nearest_workspace(const KnnArgs& a, bool sm90, int device) {
  return lay_out(plan_for(a, device, sm90), device, nullptr).bytes;
}

void nearest(const KnnArgs& a, bool sm90, const Launch& l) {
  const Plan p = plan_for(a, l.device, sm90);
  const Workspace w = lay_out(p, l.device, l.workspace);
  const int d = static_cast<int>(a.d);
  const bool l2 = a.metric == Metric::l2;
  const float slope = screen_slope(d, p.slabs, 2, 2, false) + 0x1p-17f;  // and what the numbers in the bits take
  for (int64_t first = 0; first < a.nq; first += p.queries) {
    const int64_t count = a.nq - first < p.queries ? a.nq - first : p.queries;
    const float* q = a.q + first * a.ldq;
    float* scores = a.scores + first;
    int64_t* ids = a.ids + first;
    fill_zero("nearest", w.flags, 2 * sizeof(int), l);
    make_panels(PanelArgs{q, count, a.ldq, p.padded, d, p.slabs, 2, slope, w.panels, w.reach, w.squares, w.bars}, l);
    ScreenArgs s{};
    s.x = a.x, s.n = a.n, s.ldx = a.ldx, s.d = d, s.slabs = p.slabs;
    s.vectors = aligned(a.x, 16) && a.ldx % 4 == 0;
    s.storage = DType::f32, s.query_terms = 2;
    s.panels = w.panels, s.reach = w.reach, s.padded = round_up(count, p.shape.queries);
    s.mode = l2 ? kScreenShifted : kScreenPlain, s.l2 = l2;
    s.tiles = s.tiles_per_part = div_up(a.n, p.shape.rows), s.tile_step = 1;
    s.lists.bars = w.bars;
    s.nearest = NearestLists{count, w.candidates, w.bounds, w.flags + 1};
    if (sm90) {
#ifdef LUTRA_CUDA_SM90A
      nearest_sm90(s, p.shape, l);
#endif
    } else {
      nearest_rows(s, l);
    }
    score_candidates(
        CandidateArgs{q, a.x, count, a.n, a.ldq, a.ldx, d, DType::f32, a.metric, nullptr, w.candidates, 2, w.exact}, l);
    launch("nearest", decide_kernel, grid_x(div_up(count, kThreads)), kThreads, 0, l,
           DecideArgs{w.exact, w.bounds, w.squares, w.candidates, count, d, l2, scores, ids, w.failed, w.flags});
    fill_zero("nearest", w.pass_bars, count * sizeof(Key), l);
    exact_pass(PassArgs{q,
                        a.x,
                        count,
                        a.n,
                        a.ldq,
                        a.ldx,
                        d,
                        DType::f32,
                        a.metric,
                        nullptr,
                        nullptr,
                        w.failed,
                        w.flags,
                        1,
                        pass_capacity(1),
                        p.parts,
                        p.tiles_per_part,
                        w.pass_bars,
                        w.scratch,
                        w.pass_lists},
               l);
    merge_lists(Merge{w.pass_lists, count, p.parts, 1, 1, false, 1, 1, l2, scores, ids, nullptr, w.failed, w.flags},
                "nearest", l);
  }
}

}  // namespace cuda
}  // namespace lutra
