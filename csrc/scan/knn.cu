// Exact k nearest neighbours on CUDA; formula and conventions are in knn.h.
//
// A block has BQ queries and walks a part of the collection in tiles of BN rows. As in a matrix product, 16
// columns of its queries and of the tile at a time lie in shared memory, three such steps deep (cp.async, so that two
// are on their way while one is used), and a thread keeps TQ x TN scores in registers. At the end of a tile the
// scores are compared with the queries' thresholds and what passes goes to the queries' lists (common/select.cuh):
// no score is ever written to memory. A second launch merges the parts' lists (scan/merge.cu).
//
// Four shapes. 1 and 8 queries: every thread has a row and all queries; the limit is reading x, and the whole
// machine shares one query's scan. 32: 8 x 4 scores a thread. 128: 8 x 8 scores a thread, 16 shared-memory reads
// for 256 multiply-adds; the limit is the FMA rate. Scores are sums over d in increasing order in one thread, the
// same bits in every shape. Tensor cores are of no use here: tf32 keeps 11 bits.
//
// Shared memory rows are 16 + 4 floats long: eight rows' 16-byte words fall into different banks.
//
// k <= 2048. A NaN score comes first, as in torch.topk. Overflow: row offsets are 64-bit, ids have 32 bits
// (n < 2^32 - 1, checked); a score that overflows fp32 becomes infinite, as in the reference.
#include "scan/knn.h"

#include "common/select.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int BK = 16, LD = BK + 4, kStages = 3;

struct ScanArgs {
  const float* q;
  const float* x;
  int64_t nq, n, d, ldq, ldx;
  bool wide, cosine;
  ListPlan lists;
  Key* keys;
};

// Starts the copies of 16 columns of ROWS rows from `base`; rows past `end` and columns past d become zeros.
template <int ROWS>
__device__ __forceinline__ void copy_rows(float* to, const float* base, int64_t ld, int64_t row0, int64_t end, int k0,
                                          int d, bool wide) {
#pragma unroll 1  // unrolled, the addresses would take the registers of the scores
  for (int c0 = 0; c0 < ROWS * 4; c0 += kThreads) {
    const int c = c0 + threadIdx.x;
    if (ROWS * 4 % kThreads != 0 && c >= ROWS * 4) break;
    const int64_t row = row0 + (c >> 2);
    const int column = k0 + (c & 3) * 4;
    const bool here = row < end && column < d;
    const float* from = here ? base + row * ld + column : base;
    float* dst = to + (c >> 2) * LD + (c & 3) * 4;
    if (wide) {
      copy_async_16(dst, from, here);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool one = here && column + e < d;
        copy_async_4(dst + e, one ? from + e : base, one);
      }
    }
  }
}

template <bool L2>
__device__ __forceinline__ void add_product(float q, float x, float* sum) {
  const float difference = q - x;
  *sum = L2 ? fmaf(difference, -difference, *sum) : fmaf(q, x, *sum);  // l2 is negated: larger is better
}

// 1 / |v| from the fp32 sum of squares; where that could have overflowed or lost small values, again in double.
__device__ __forceinline__ float inverse_norm(float squares, const float* v, int64_t d) {
  if (squares > 1e-24f && squares < 1e37f) return 1.0f / sqrtf(squares);
  double wide = 0;
  for (int64_t k = 0; k < d; ++k) wide += static_cast<double>(v[k]) * v[k];
  return wide == 0 ? 0.0f : static_cast<float>(1.0 / sqrt(wide));
}

template <int BQ, int BN>
constexpr size_t tile_bytes() {
  return static_cast<size_t>(kStages) * (BQ + BN) * LD * sizeof(float);
}

template <int BQ, int BN, int TQ, int TN, int BLOCKS, bool L2>
__global__ void __launch_bounds__(kThreads, BLOCKS) scan_kernel(ScanArgs a) {
  constexpr int NX = BN / TN, NY = BQ / TQ;  // threads along rows and along queries
  static_assert(NX * NY == kThreads && TQ * TN <= 64, "one thread per piece of the tile");
  constexpr int LX = NY == 1 ? 32 : 8, LY = 32 / LX;  // a warp's piece: 8 x 4 reads the fewest different words
  constexpr int kStage = (BQ + BN) * LD;
  constexpr int KV = L2 && TQ * TN == 64 ? 2 : 4;  // columns read at once; l2 needs registers for its differences
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int tx = warp % (NX / LX) * LX + lane % LX, ty = warp / (NX / LX) * LY + lane / LX;
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * BQ;

  float* stages = dynamic_shared<float>();
  float* x_norm = stages + kStages * kStage;
  Selector select;
  select.init(x_norm + BN, a.keys + (q0 * a.lists.parts + blockIdx.y) * a.lists.stride, a.lists.parts * a.lists.stride,
              BQ, a.lists.capacity, a.lists.best);

  const int64_t row_begin = blockIdx.y * a.lists.tiles_per_part * BN;
  const int64_t row_stop = row_begin + a.lists.tiles_per_part * BN;
  const int64_t row_end = row_stop < a.n ? row_stop : a.n;
  const int d = static_cast<int>(a.d);

  // The step whose copies are started next, and the stage that it fills. A step past the end copies nothing.
  int64_t load_row = row_begin;
  int load_k = 0, load_stage = 0;
  const auto start_copies = [&] {
    if (load_row < row_end) {
      float* to = stages + load_stage * kStage;
      copy_rows<BQ>(to, a.q, a.ldq, q0, a.nq, load_k, d, a.wide);
      copy_rows<BN>(to + BQ * LD, a.x, a.ldx, load_row, row_end, load_k, d, a.wide);
      load_k += BK;
      if (load_k >= d) load_k = 0, load_row += BN;
      load_stage = load_stage == kStages - 1 ? 0 : load_stage + 1;
    }
    copy_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) start_copies();

  float acc[TQ][TN];
#pragma unroll
  for (int i = 0; i < TQ; ++i)
#pragma unroll
    for (int j = 0; j < TN; ++j) acc[i][j] = 0;
  constexpr int kPieces = BN / 64;  // 16-byte pieces of x that a thread copies in a step
  float squares[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) squares[p] = 0;

  int k0 = 0, stage = 0;
  for (int64_t row0 = row_begin; row0 < row_end;) {
    copy_wait<kStages - 2>();
    __syncthreads();  // everybody's copies of this step are here, and nobody reads the stage that is filled next
    start_copies();
    const float* qs = stages + stage * kStage;
    const float* xs = qs + BQ * LD;
    stage = stage == kStages - 1 ? 0 : stage + 1;
#pragma unroll(TQ* TN == 64 ? 1 : 2)
    for (int k = 0; k < BK; k += KV) {
      Pack<float, KV> x[TN];
#pragma unroll
      for (int j = 0; j < TN; ++j) x[j] = load_pack<float, KV>(xs + (tx + NX * j) * LD + k);
#pragma unroll
      for (int i = 0; i < TQ; ++i) {
        const auto q = load_pack<float, KV>(qs + (ty + NY * i) * LD + k);
#pragma unroll
        for (int c = 0; c < KV; ++c)
#pragma unroll
          for (int j = 0; j < TN; ++j) add_product<L2>(q[c], x[j][c], &acc[i][j]);
      }
    }
    if (!L2 && a.cosine) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int c = p * kThreads + threadIdx.x;
        const float4 v = *reinterpret_cast<const float4*>(xs + (c >> 2) * LD + (c & 3) * 4);
        squares[p] = fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, squares[p]))));
      }
    }
    k0 += BK;
    if (k0 < d) continue;

    // ---- the tile's scores are complete
    if (!L2 && a.cosine) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        float s = squares[p];
        s += __shfl_xor_sync(kFullWarp, s, 1);
        s += __shfl_xor_sync(kFullWarp, s, 2);
        const int r = (p * kThreads + threadIdx.x) >> 2;
        if ((lane & 3) == 0 && row0 + r < row_end) x_norm[r] = inverse_norm(s, a.x + (row0 + r) * a.ldx, a.d);
        squares[p] = 0;
      }
      __syncthreads();
    }
    unsigned long long pending = 0;
#pragma unroll
    for (int i = 0; i < TQ; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) {
        if (!L2 && a.cosine) acc[i][j] *= x_norm[tx + NX * j];
        const bool valid = q0 + ty + NY * i < a.nq && row0 + tx + NX * j < row_end;
        pending |= static_cast<unsigned long long>(valid) << (i * TN + j);
      }
    for (;;) {
      unsigned long long refused = 0;
#pragma unroll
      for (int i = 0; i < TQ; ++i) {
        const float bar = select.least_score[ty + NY * i];
#pragma unroll
        for (int j = 0; j < TN; ++j) {
          if ((pending >> (i * TN + j) & 1) && !(acc[i][j] < bar)) {
            if (!select.add(ty + NY * i, acc[i][j], static_cast<uint32_t>(row0 + tx + NX * j)))
              refused |= 1ull << (i * TN + j);
          }
        }
      }
      if (!__syncthreads_or(refused != 0)) break;
      select.compact(false);
      __syncthreads();
      pending = refused;
    }
#pragma unroll
    for (int i = 0; i < TQ; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) acc[i][j] = 0;
    row0 += BN;
    k0 = 0;
  }
  select.finish(a.keys + (q0 * a.lists.parts + blockIdx.y) * a.lists.stride, a.lists.parts * a.lists.stride, a.nq - q0);
}

// ---- shapes: BQ, BN, TQ, TN, blocks that share a multiprocessor
struct Shape {
  int queries, rows, blocks;
};
constexpr Shape kShapes[] = {{1, 256, 3}, {8, 256, 2}, {32, 256, 2}, {128, 128, 2}};
constexpr int64_t kListBytes = int64_t{256} << 20;  // of the workspace, about

// Cosine: the queries are divided by their norms beforehand, so that no product of large values overflows.
__global__ void __launch_bounds__(kThreads)
    normalize_kernel(const float* q, int64_t nq, int64_t ldq, int64_t d, float* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  const int lane = threadIdx.x & 31;
  if (i >= nq) return;
  const float* v = q + i * ldq;
  float squares = 0;
  for (int64_t k = lane; k < d; k += 32) squares = fmaf(v[k], v[k], squares);
  const float factor = inverse_norm(warp_sum(squares), v, d);
  for (int64_t k = lane; k < d; k += 32) to[i * d + k] = v[k] * factor;
}

struct KnnPlan {
  int shape;
  ListPlan lists;
  int64_t query_floats;  // normalized queries
  int64_t bytes() const { return round_up(query_floats * 4, 256) + lists.bytes(); }
};

KnnPlan plan_for(int64_t nq, int64_t n, int64_t d, int64_t k, Metric metric, int device) {
  if (k > kMaxK && n > kMaxK)
    throw std::invalid_argument("lutra: k is " + std::to_string(k) + "; on CUDA it must be <= 2048");
  if (n > kMaxRows || d > 0x7ffffff0)
    throw std::length_error("lutra: knn on CUDA takes fewer than 2^32 - 1 rows of fewer than 2^31 - 16 values");
  KnnPlan p;
  ListPlan& s = p.lists;
  s.best = static_cast<int>(k < n ? k : n);
  s.capacity = list_capacity(s.best);
  s.stride = s.best <= kShortK ? s.best : s.capacity;
  const int64_t most = kListBytes / (static_cast<int64_t>(sizeof(Key)) * (s.stride > 0 ? s.stride : 1));
  const int processors = multiprocessors(device);
  p.shape = nq <= 1 ? 0 : nq <= 8 ? 1 : nq <= 48 ? 2 : 3;
  if (p.shape == 3 && most < 256 * processors) p.shape = 2;  // long lists: fewer queries at a time
  const Shape& shape = kShapes[p.shape];
  int64_t groups = div_up(nq > 0 ? nq : 1, shape.queries);
  const int64_t tiles = div_up(n, shape.rows);
  s.parts = parts_for(groups, tiles, static_cast<int64_t>(shape.blocks) * processors, 2);
  s.tiles_per_part = div_up(tiles > 0 ? tiles : 1, s.parts);
  s.parts = static_cast<int>(div_up(tiles > 0 ? tiles : 1, s.tiles_per_part));
  int64_t fit = most / s.parts / shape.queries;
  const bool copied = metric == Metric::cosine;
  if (copied && fit * shape.queries * d * 4 > kListBytes) fit = kListBytes / (shape.queries * d * 4);
  if (groups > fit) groups = fit > 1 ? fit : 1;
  s.queries = groups * shape.queries < nq ? groups * shape.queries : nq;
  p.query_floats = copied ? s.queries * d : 0;
  return p;
}

template <int SHAPE, int TQ, int TN, bool L2>
void scan(const ScanArgs& a, const Launch& l) {
  constexpr Shape s = kShapes[SHAPE];
  const size_t shared =
      tile_bytes<s.queries, s.rows>() + s.rows * sizeof(float) + Selector::bytes(s.queries, a.lists.best, kWarps);
  const dim3 grid(grid_x(div_up(a.nq, s.queries)), static_cast<unsigned>(a.lists.parts));
  launch("knn", scan_kernel<s.queries, s.rows, TQ, TN, s.blocks, L2>, grid, kThreads, shared, l, a);
}

template <bool L2>
void scan_shape(int shape, const ScanArgs& a, const Launch& l) {
  switch (shape) {
    case 0: return scan<0, 1, 1, L2>(a, l);
    case 1: return scan<1, 8, 1, L2>(a, l);
    case 2: return scan<2, 8, 4, L2>(a, l);
    default: return scan<3, 8, 8, L2>(a, l);
  }
}

// A warp per candidate: its key, 0 for -1, a NaN without an id for an id that is none.
template <int VEC>
__global__ void __launch_bounds__(kThreads) rescore_kernel(RescoreArgs a, Key* keys) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  const int lane = threadIdx.x & 31;
  if (i >= a.nq * a.c) return;
  const int64_t id = a.cand[i];
  Key key = 0;
  if (id >= 0 && id < a.n) {
    const float* q = a.q + i / a.c * a.ldq;
    const float* x = a.x + id * a.ldx;
    float score = 0, qq = 0, xx = 0;
    for (int64_t k = static_cast<int64_t>(lane) * VEC; k < a.d; k += 32 * VEC) {
      const auto u = load_pack<float, VEC>(q + k);
      const auto v = load_pack<float, VEC>(x + k);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const float d = u[j] - v[j];
        score = a.metric == Metric::l2 ? fmaf(d, d, score) : fmaf(u[j], v[j], score);
        if (a.metric == Metric::cosine) qq = fmaf(u[j], u[j], qq), xx = fmaf(v[j], v[j], xx);
      }
    }
    score = warp_sum(score);
    if (a.metric == Metric::l2) score = -score;
    if (a.metric == Metric::cosine) {
      qq = warp_sum(qq);
      xx = warp_sum(xx);
      if (qq > 1e-24f && qq < 1e37f && xx > 1e-24f && xx < 1e37f) {
        score = score * (1.0f / sqrtf(qq)) * (1.0f / sqrtf(xx));
      } else {  // fp32 sums may have overflowed or lost small values
        double s = 0, qs = 0, xs = 0;
        for (int64_t k = 0; k < a.d; ++k) {
          const double u = q[k], v = x[k];
          s += u * v, qs += u * u, xs += v * v;
        }
        score = qs == 0 || xs == 0 ? 0.0f : static_cast<float>(s / (sqrt(qs) * sqrt(xs)));
      }
    }
    key = make_key(score, static_cast<uint32_t>(id));
  } else if (id != -1) {
    key = make_key(quiet_nan(), 0xffffffffu);
  }
  if (lane == 0) keys[i] = key;
}

int64_t rescore_queries(int64_t nq, int64_t c) {  // per launch
  const int64_t fit = kListBytes / (static_cast<int64_t>(sizeof(Key)) * (c > 0 ? c : 1));
  return fit < 1 ? 1 : fit < nq ? fit : nq;
}

bool wide(const float* q, int64_t ldq, const float* x, int64_t ldx, int64_t d) {
  return d % 4 == 0 && ldq % 4 == 0 && ldx % 4 == 0 && aligned(q, 16) && aligned(x, 16);
}

// The metrics that have CUDA kernels.
void check_metric(Metric metric) {
  if (metric != Metric::ip && metric != Metric::l2 && metric != Metric::cosine)
    throw std::invalid_argument(
        "lutra: on CUDA metric must be ip, l2 or cosine; move the arrays to the CPU for others");
}

}  // namespace

int max_k() { return kMaxK; }

int64_t knn_workspace(int64_t nq, int64_t n, int64_t d, int64_t k, Metric metric, const Launch& l) {
  check_metric(metric);
  const DeviceGuard guard(l.device);
  return plan_for(nq, n, d, k, metric, l.device).bytes();
}

void knn(const KnnArgs& a, const Launch& l) {
  check_metric(a.metric);
  const DeviceGuard guard(l.device);
  const KnnPlan plan = plan_for(a.nq, a.n, a.d, a.k, a.metric, l.device);
  const ListPlan& s = plan.lists;
  const bool cosine = a.metric == Metric::cosine;
  Carve workspace(l.workspace);
  float* normalized = workspace.take<float>(plan.query_floats);
  Key* keys = workspace.take<Key>(0);
  for (int64_t first = 0; first < a.nq; first += s.queries) {
    const int64_t count = a.nq - first < s.queries ? a.nq - first : s.queries;
    const float* q = a.q + first * a.ldq;
    int64_t ldq = a.ldq;
    if (cosine) {
      launch("knn", normalize_kernel, grid_x(div_up(count, kWarps)), kThreads, 0, l, q, count, ldq, a.d, normalized);
      q = normalized;
      ldq = a.d;
    }
    const ScanArgs scan{q, a.x, count, a.n, a.d, ldq, a.ldx, wide(q, ldq, a.x, a.ldx, a.d), cosine, s, keys};
    if (s.best > 0) {
      if (a.metric == Metric::l2)
        scan_shape<true>(plan.shape, scan, l);
      else
        scan_shape<false>(plan.shape, scan, l);
    }
    merge_lists(Merge{keys, count, s.parts, s.best, s.stride, false, s.best, static_cast<int>(a.k),
                      a.metric == Metric::l2, a.scores + first * a.k, a.ids + first * a.k},
                "knn", l);
  }
}

int64_t rescore_workspace(int64_t nq, int64_t c, const Launch&) {
  return rescore_queries(nq, c) * c * static_cast<int64_t>(sizeof(Key));
}

void rescore(const RescoreArgs& a, const Launch& l) {
  check_metric(a.metric);
  if (a.k > kMaxK && a.c > kMaxK)
    throw std::invalid_argument("lutra: k is " + std::to_string(a.k) + "; on CUDA it must be <= 2048");
  if (a.n > kMaxRows) throw std::length_error("lutra: rescore on CUDA takes fewer than 2^32 - 1 rows");
  if (a.c > 0x7fffffff) throw std::length_error("lutra: rescore on CUDA takes fewer than 2^31 candidates a query");
  const DeviceGuard guard(l.device);
  auto* keys = static_cast<Key*>(l.workspace);
  const int64_t chunk = rescore_queries(a.nq, a.c);
  for (int64_t first = 0; first < a.nq; first += chunk) {
    RescoreArgs part = a;
    part.nq = a.nq - first < chunk ? a.nq - first : chunk;
    part.q += first * a.ldq;
    part.cand += first * a.c;
    const bool vectors = wide(part.q, a.ldq, a.x, a.ldx, a.d);
    launch("rescore", vectors ? rescore_kernel<4> : rescore_kernel<1>, grid_x(div_up(part.nq * a.c, kWarps)), kThreads,
           0, l, part, keys);
    const int c = static_cast<int>(a.c), best = static_cast<int>(a.k < a.c ? a.k : a.c);
    merge_lists(Merge{keys, part.nq, 1, c, c, true, best, static_cast<int>(a.k), a.metric == Metric::l2,
                      a.scores + first * a.k, a.ids + first * a.k},
                "rescore", l);
  }
}

}  // namespace cuda
}  // namespace lutra
