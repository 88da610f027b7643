// PQ scan on CUDA; formula and conventions are in pq.h.
//
// One launch computes each query's table of m x 256 partial scores (codes that ksub does not reach get a NaN, so
// no code is ever tested), a second scans: a block holds the tables of W = 4 queries (or of one) in shared memory,
// interleaved so that one 16-byte read serves the four, and each of its threads adds up rows of codes, several at
// a time. What passes the thresholds goes to the queries' lists (common/select.cuh), a third launch merges them.
// The limit is shared memory: random words of 32 lanes meet in a bank 3.5 times on average. Tables that do not
// fit in shared memory (m above 200 or so) are read through L1.
//
// k <= 2048. A NaN score, also that of a code >= ksub, comes first. Overflow: n < 2^32 - 1 (checked), offsets into
// codes and tables are 64-bit; sums are fp32 in increasing j.
#include "scan/pq.h"

#include "common/select.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct PqScan {
  const uint8_t* codes;
  const float* tables;  // [groups][m][256][W]
  int64_t nq, n;
  int m;
  float sign;  // -1 where smaller is better
  ListPlan lists;
  Key* keys;
};

// tables[g][j][c][w] for query g * W + w. A block per (g, j), a thread per code.
template <int W, bool L2>
__global__ void __launch_bounds__(256) tables_kernel(const float* q, int64_t nq, int64_t ldq, const float* codebooks,
                                                     int m, int ksub, int64_t dsub, float* tables) {
  const int64_t group = blockIdx.x / m;
  const int j = static_cast<int>(blockIdx.x - group * m), c = threadIdx.x;
  const float* row = codebooks + (static_cast<int64_t>(j) * ksub + c) * dsub;
  float sum[W];
#pragma unroll
  for (int w = 0; w < W; ++w) {
    const int64_t query = group * W + w;
    sum[w] = c < ksub ? 0.0f : quiet_nan();
    if (c >= ksub || query >= nq) continue;
    const float* part = q + query * ldq + j * dsub;
    for (int64_t t = 0; t < dsub; ++t) {
      const float a = part[t], b = row[t];
      sum[w] = L2 ? fmaf(a - b, a - b, sum[w]) : fmaf(a, b, sum[w]);
    }
  }
  store_pack<float, W>(tables + (static_cast<int64_t>(blockIdx.x) * 256 + c) * W, sum);
}

// VEC codes of a row are read at once. FAR: the tables stay in device memory.
template <int W, int VEC, bool FAR>
__global__ void __launch_bounds__(kThreads, 3) scan_kernel(PqScan a) {
  constexpr int R = W == 1 ? 4 : 2;  // rows of a thread at a time
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * W;
  const int64_t table_floats = static_cast<int64_t>(a.m) * 256 * W;
  const float* tables = a.tables + blockIdx.x * table_floats;
  float* shared = dynamic_shared<float>();
  Selector select;
  select.init(shared + (FAR ? 0 : table_floats), a.keys + (q0 * a.lists.parts + blockIdx.y) * a.lists.stride,
              a.lists.parts * a.lists.stride, W, a.lists.capacity, a.lists.best);
  if (!FAR) {
    for (int64_t i = threadIdx.x; i < table_floats / 4; i += kThreads)
      reinterpret_cast<float4*>(shared)[i] = reinterpret_cast<const float4*>(tables)[i];
  }
  const float* look = FAR ? tables : shared;
  __syncthreads();

  const int64_t tile_rows = kThreads * R;
  const int64_t begin = blockIdx.y * a.lists.tiles_per_part * tile_rows;
  const int64_t stop = begin + a.lists.tiles_per_part * tile_rows, end = stop < a.n ? stop : a.n;
  for (int64_t row0 = begin; row0 < end; row0 += tile_rows) {
    float acc[R][W];
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int w = 0; w < W; ++w) acc[r][w] = 0;
    for (int j = 0; j < a.m; j += VEC) {
      typename Word<VEC>::type word[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t row = row0 + r * kThreads + threadIdx.x;
        const int64_t at = (row < end ? row : end - 1) * a.m + j;
        word[r] = *reinterpret_cast<const typename Word<VEC>::type*>(a.codes + at);
      }
#pragma unroll
      for (int b = 0; b < VEC; ++b) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          uint8_t bytes[VEC];
          memcpy(bytes, &word[r], VEC);
          const auto v = load_pack<float, W>(look + ((j + b) * 256 + bytes[b]) * W);
#pragma unroll
          for (int w = 0; w < W; ++w) acc[r][w] += v[w];
        }
      }
    }
    unsigned pending = 0;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int w = 0; w < W; ++w) {
        acc[r][w] *= a.sign;
        const bool valid = row0 + r * kThreads + threadIdx.x < end && q0 + w < a.nq;
        pending |= static_cast<unsigned>(valid) << (r * W + w);
      }
    for (;;) {
      unsigned refused = 0;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const float bar = select.least_score[w];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if ((pending >> (r * W + w) & 1) && !(acc[r][w] < bar)) {
            if (!select.add(w, acc[r][w], static_cast<uint32_t>(row0 + r * kThreads + threadIdx.x)))
              refused |= 1u << (r * W + w);
          }
        }
      }
      if (!__syncthreads_or(refused != 0)) break;
      select.compact(false);
      __syncthreads();
      pending = refused;
    }
  }
  select.finish(a.keys + (q0 * a.lists.parts + blockIdx.y) * a.lists.stride, a.lists.parts * a.lists.stride, a.nq - q0);
}

constexpr int64_t kListBytes = int64_t{128} << 20, kTableBytes = int64_t{64} << 20;  // of the workspace, about

struct PqPlan {
  int width;  // queries per block
  bool far;
  size_t shared;
  ListPlan lists;
  int64_t tables() const { return round_up(lists.queries, width); }
};

PqPlan plan_for(int64_t nq, int64_t n, int64_t k, int64_t m, int device) {
  if (k > kMaxK && n > kMaxK)
    throw std::invalid_argument("lutra: k is " + std::to_string(k) + "; on CUDA it must be <= 2048");
  if (n > kMaxRows) throw std::length_error("lutra: pq on CUDA takes fewer than 2^32 - 1 rows");
  if (m > 0x3fffff) throw std::length_error("lutra: pq on CUDA takes at most 2^22 - 1 sub-quantizers");
  PqPlan p;
  ListPlan& s = p.lists;
  s.best = static_cast<int>(k < n ? k : n);
  s.capacity = list_capacity(s.best);
  s.stride = s.best <= kShortK ? s.best : s.capacity;
  const auto shared_for = [&](int width, bool far) {
    return (far ? 0 : static_cast<size_t>(m) * 1024 * width) + Selector::bytes(width, s.best, kWarps);
  };
  const size_t limit = static_cast<size_t>(shared_limit(device));
  p.width = nq >= 3 && shared_for(4, false) * 2 <= limit ? 4 : 1;  // four queries where two blocks still fit
  p.far = shared_for(p.width, false) > limit;
  p.shared = shared_for(p.width, p.far);
  const int64_t per_processor = static_cast<int64_t>(limit / (p.shared + 1024));
  const int64_t slots = (per_processor < 1 ? 1 : per_processor > 6 ? 6 : per_processor) * multiprocessors(device);
  const int64_t tiles = div_up(n, kThreads * (p.width == 1 ? 4 : 2));
  int64_t groups = div_up(nq > 0 ? nq : 1, p.width);
  s.parts = parts_for(groups, tiles, slots, 2);
  s.tiles_per_part = div_up(tiles > 0 ? tiles : 1, s.parts);
  s.parts = static_cast<int>(div_up(tiles > 0 ? tiles : 1, s.tiles_per_part));
  const int64_t list = static_cast<int64_t>(sizeof(Key)) * (s.stride > 0 ? s.stride : 1) * s.parts * p.width;
  const int64_t by_lists = kListBytes / list, by_tables = kTableBytes / (m * 1024 * p.width + 1);
  const int64_t fit = by_lists < by_tables ? by_lists : by_tables;
  if (groups > fit) groups = fit > 1 ? fit : 1;
  s.queries = groups * p.width < nq ? groups * p.width : nq;
  return p;
}

struct Arrays {
  float* tables;
  Key* keys;
};
Arrays arrays(const PqPlan& p, int64_t m, void* workspace, int64_t* bytes) {
  Carve c(workspace);
  Arrays a;
  a.tables = c.take<float>(p.tables() * m * 256);
  a.keys = c.take<Key>(p.lists.bytes() / static_cast<int64_t>(sizeof(Key)));
  if (bytes) *bytes = c.used();
  return a;
}

template <int W>
void scan(const PqArgs& a, const PqPlan& p, const PqScan& s, const float* q, float* tables, const Launch& l) {
  const int64_t groups = div_up(s.nq, W);
  launch("pq", a.metric == Metric::l2 ? tables_kernel<W, true> : tables_kernel<W, false>, grid_x(groups * a.m), 256, 0,
         l, q, s.nq, a.ldq, a.codebooks, s.m, static_cast<int>(a.ksub), a.dsub, tables);
  const dim3 grid(grid_x(groups), static_cast<unsigned>(p.lists.parts));
  auto kernel = scan_kernel<W, 1, false>;
  if (p.far)
    kernel = scan_kernel<1, 1, true>;
  else if (a.m % 16 == 0 && aligned(a.codes, 16))
    kernel = scan_kernel<W, 16, false>;
  else if (a.m % 4 == 0 && aligned(a.codes, 4))
    kernel = scan_kernel<W, 4, false>;
  launch("pq", kernel, grid, kThreads, p.shared, l, s);
}

}  // namespace

int64_t pq_workspace(int64_t nq, int64_t n, int64_t m, int64_t k, const Launch& l) {
  const DeviceGuard guard(l.device);
  int64_t bytes = 0;
  arrays(plan_for(nq, n, k, m, l.device), m, nullptr, &bytes);
  return bytes;
}

void pq(const PqArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const PqPlan p = plan_for(a.nq, a.n, a.k, a.m, l.device);
  const ListPlan& lists = p.lists;
  const Arrays w = arrays(p, a.m, l.workspace, nullptr);
  const bool l2 = a.metric == Metric::l2;
  for (int64_t first = 0; first < a.nq; first += lists.queries) {
    const int64_t count = a.nq - first < lists.queries ? a.nq - first : lists.queries;
    if (lists.best > 0) {
      const PqScan s{a.codes, w.tables, count, a.n, static_cast<int>(a.m), l2 ? -1.0f : 1.0f, lists, w.keys};
      const float* q = a.q + first * a.ldq;
      if (p.width == 4)
        scan<4>(a, p, s, q, w.tables, l);
      else
        scan<1>(a, p, s, q, w.tables, l);
    }
    merge_lists(Merge{w.keys, count, lists.parts, lists.best, lists.stride, false, lists.best, static_cast<int>(a.k),
                      l2, a.scores + first * a.k, a.ids + first * a.k},
                "pq", l);
  }
}

}  // namespace cuda
}  // namespace lutra
