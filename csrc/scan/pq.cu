// PQ scan on CUDA; formula and conventions are in pq.h.
//
// One launch computes each query's table of m x 256 partial scores (codes that ksub does not reach get a NaN, so
// no code is ever tested), a second scans. Large collections go through the scan of pq_rotated.cu first; the one here,
// the plain one, sums in the order of the contract and does what that one could not settle. In the plain one a block
// holds the tables of W = 4 queries (or of one) in shared memory, interleaved so that one 16-byte read serves the four,
// and each of its threads adds up rows of codes, several at a time. What passes the thresholds goes to the queries'
// lists (common/select.cuh), a third launch merges them. The limit is shared memory: random words of 32 lanes meet in a
// bank 3.5 times on average. Tables that do not fit in shared memory (m above 200 or so) are read through L1; many rows
// of so many codes go through pq_wide.cu first, and very many rows and queries where m is above 96.
//
// k above 2048: scores are written out and selected by radix (any_k.cuh). A NaN score, also that of a code >= ksub,
// comes first. Overflow: n < 2^32 - 1 (checked), offsets into codes and tables are 64-bit; sums are fp32 in increasing
// j.
#include "scan/any_k.cuh"
#include "scan/pq_plan.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// tables[g][j][c][w] for query g * W + w, and, where `rotated` is not null, the same for its scan (pq_plan.cuh), where
// tables from m up to a multiple of 16 are 0 and l2 is negative. A block per (g, j), a thread per code.
template <int W, bool L2>
__global__ void __launch_bounds__(256)
    tables_kernel(const float* q, int64_t nq, int64_t ldq, const float* codebooks, int m, int ksub, int64_t dsub,
                  float* tables, float* rotated, int width) {
  const int padded = rotated ? (m + 15) / 16 * 16 : m;
  const int64_t group = blockIdx.x / padded;
  const int j = static_cast<int>(blockIdx.x - group * padded), c = threadIdx.x;
  const auto put_rotated = [&](int64_t query, float value) {  // of every query of the groups of `width`
    const int64_t at = (query / width * (padded / 16) + j / 16) * 256 + c;
    rotated[(at * 16 + j % 16) * width + query % width] = value;
  };
  const int64_t room = rotated ? (nq + width - 1) / width * width : 0;  // groups of W and of `width` are not the same
  if (j >= m) {
#pragma unroll
    for (int w = 0; w < W; ++w)
      if (group * W + w < room) put_rotated(group * W + w, 0.0f);
    return;
  }
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
  store_pack<float, W>(tables + ((group * m + j) * 256 + c) * W, sum);
#pragma unroll
  for (int w = 0; w < W; ++w)
    if (group * W + w < room) put_rotated(group * W + w, L2 ? -sum[w] : sum[w]);
}

// acc += the scores of R rows, VEC codes of a row at a time, j in increasing order.
template <int W, int VEC, int R>
__device__ __forceinline__ void add_rows(const PqScan& a, const float* look, const uint64_t (&rows)[R],
                                         float (&acc)[R][W]) {
  for (int j = 0; j < a.m; j += VEC) {
    typename Word<VEC>::type word[R];
#pragma unroll
    for (int r = 0; r < R; ++r)
      word[r] = *reinterpret_cast<const typename Word<VEC>::type*>(a.codes + rows[r] * a.m + j);
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
}

// The scores of all rows, a query a block, for any_k.
template <int VEC, bool FAR>
__global__ void __launch_bounds__(kThreads, 3) all_scores_kernel(PqScan a, uint32_t* all) {
  constexpr int R = 4;
  const int64_t query = blockIdx.x;
  const float* look = a.tables + query * a.m * 256;
  if (!FAR) {
    float* shared = dynamic_shared<float>();
    for (int i = threadIdx.x; i < a.m * 64; i += kThreads)
      reinterpret_cast<float4*>(shared)[i] = reinterpret_cast<const float4*>(look)[i];
    __syncthreads();
    look = shared;
  }
  for (int64_t row0 = static_cast<int64_t>(blockIdx.y) * kThreads * R; row0 < a.n;
       row0 += static_cast<int64_t>(gridDim.y) * kThreads * R) {
    float acc[R][1];
    uint64_t rows[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = row0 + r * kThreads + threadIdx.x;
      rows[r] = static_cast<uint64_t>(row < a.n ? row : a.n - 1);
      acc[r][0] = 0;
    }
    add_rows<1, VEC, R>(a, look, rows, acc);
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (row0 + r * kThreads + threadIdx.x < a.n) all[query * a.n + rows[r]] = ordered_bits(a.sign * acc[r][0]);
  }
}

// Blocks on a multiprocessor. The addresses of 16 look-ups in device memory do not fit into the registers of three.
constexpr int blocks_of(int vec, bool far) { return far && vec == 16 ? 2 : 3; }

// VEC codes of a row are read at once. FAR: the tables stay in device memory.
template <int W, int VEC, bool FAR>
__global__ void __launch_bounds__(kThreads, blocks_of(VEC, FAR)) scan_kernel(PqScan a) {
  constexpr int R = W == 1 ? 4 : 2;  // rows of a thread at a time
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * W;
  if (a.done) {
    bool final = true;
    for (int64_t query = q0; query < q0 + W && query < a.nq; ++query) final = final && a.done[query];
    if (final) return;
  }
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
    uint64_t rows[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = row0 + r * kThreads + threadIdx.x;
      rows[r] = static_cast<uint64_t>(row < end ? row : end - 1);
    }
    add_rows<W, VEC, R>(a, look, rows, acc);
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
// Below, its tables, second scoring and tests take longer than the conflicts that it avoids: up to four queries, more.
constexpr int64_t kRotatedCodes[2] = {24 << 20, 1 << 20};

// The slabs' launches take longer than the conflicts of tables that fit, up to so many look-ups.
constexpr int64_t kWideLooks[2] = {1 << 30, 1 << 28};
int64_t g_wide = 0, g_queries = 0;  // pq_paths

struct PqPlan {
  int width;  // queries per block
  bool far;
  size_t shared;
  ListPlan lists;       // of the plain scan; lists.queries: of a launch
  RotatedPlan rotated;  // width 0: the plain scan does it all
  int64_t tables() const { return round_up(lists.queries, width); }
};

bool large(int64_t k, int64_t n) { return k > kMaxK && n > kMaxK; }

PqPlan plan_for(int64_t nq, int64_t n, int64_t k, int64_t m, int64_t ksub, int device) {
  if (n > kMaxRows) throw std::length_error("lutra: pq on CUDA takes fewer than 2^32 - 1 rows");
  if (m > 0x3fffff) throw std::length_error("lutra: pq on CUDA takes at most 2^22 - 1 sub-quantizers");
  PqPlan p;
  ListPlan& s = p.lists;
  s.best = large(k, n) ? 0 : static_cast<int>(k < n ? k : n);
  s.capacity = list_capacity(s.best);
  s.stride = s.best <= kShortK ? s.best : s.capacity;
  const auto shared_for = [&](int width, bool far) {
    return (far ? 0 : static_cast<size_t>(m) * 1024 * width) + Selector::bytes(width, s.best, kWarps);
  };
  const size_t limit = static_cast<size_t>(shared_limit(device));
  p.width =
      nq >= 3 && !large(k, n) && shared_for(4, false) * 2 <= limit ? 4 : 1;  // four queries where two blocks still fit
  p.far = shared_for(p.width, false) > limit;
  p.shared = shared_for(p.width, p.far);
  const int64_t per_processor = static_cast<int64_t>(limit / (p.shared + 1024));
  const int64_t slots = (per_processor < 1 ? 1 : per_processor > 6 ? 6 : per_processor) * multiprocessors(device);
  const int64_t tiles = div_up(n, kThreads * (p.width == 1 ? 4 : 2));
  int64_t groups = div_up(nq > 0 ? nq : 1, p.width);
  s.parts = parts_for(groups, tiles, slots, 2);
  s.tiles_per_part = div_up(tiles > 0 ? tiles : 1, s.parts);
  s.parts = static_cast<int>(div_up(tiles > 0 ? tiles : 1, s.tiles_per_part));
  if (n * m >= kRotatedCodes[nq > 4] && !large(k, n)) {
    p.rotated = packed_plan(nq, n, k, m, ksub, device);
    if (!p.rotated.width) p.rotated = rotated_plan(nq, n, k, m, device);
    const double looks = static_cast<double>(nq) * static_cast<double>(n * m);
    if (!p.rotated.width && (p.far || looks >= static_cast<double>(g_wide ? g_wide : kWideLooks[nq > 4])))
      p.rotated = wide_plan(nq, n, k, m, device);
  }
  const auto list_bytes = [](const ListPlan& lists) {
    return static_cast<int64_t>(sizeof(Key)) * (lists.stride > 0 ? lists.stride : 1) * lists.parts;
  };
  int64_t list = list_bytes(s), table = m * 1024 + 1;
  if (p.rotated.width) {
    const int64_t other = list_bytes(p.rotated.lists);
    list = list > other ? list : other;
    table += round_up(m, 16) * 1024 + p.rotated.kept * 16;
  }
  const int64_t by_lists = kListBytes / list, by_tables = kTableBytes / table;
  const int64_t fit = (by_lists < by_tables ? by_lists : by_tables) / 8 * 8;
  s.queries = fit < 8 ? 8 : fit;
  if (s.queries > nq) s.queries = nq;
  if ((large(k, n) || p.rotated.slab) && s.queries > any_k_queries(nq, n)) s.queries = any_k_queries(nq, n);
  if (g_queries && s.queries > g_queries) s.queries = g_queries;
  if (p.rotated.slab) {  // two queries a look-up, in every launch
    if (s.queries == 1) p.rotated.width = 1;
    if (s.queries > 1 && s.queries < nq) s.queries -= s.queries & 1;
  }
  p.rotated.lists.queries = s.queries;
  return p;
}

struct Arrays {
  float *tables, *rotated;
  Key* keys;  // of the rotated scan, then of the plain one
  float2* rounded;
  float* scores;
  int64_t* ids;
  int* done;
  void* any_k;
};
Arrays arrays(const PqPlan& p, int64_t n, int64_t k, int64_t m, void* workspace, int64_t* bytes) {
  Carve c(workspace);
  Arrays a{};
  a.tables = c.take<float>(p.tables() * m * 256);
  int64_t keys = p.lists.bytes();
  if (p.rotated.width) {
    const int64_t queries = p.lists.queries, other = p.rotated.lists.bytes();
    keys = keys > other ? keys : other;
    a.rotated = c.take<float>(round_up(queries, p.rotated.width) * round_up(m, 16) * 256);
    if (p.rotated.packed) a.rounded = c.take<float2>(round_up(queries, p.rotated.width));
    a.scores = c.take<float>(queries * p.rotated.kept);
    a.ids = c.take<int64_t>(queries * p.rotated.kept);
    a.done = c.take<int>(queries);
  }
  a.keys = c.take<Key>(keys / static_cast<int64_t>(sizeof(Key)));
  const int64_t selected = large(k, n) ? k : p.rotated.slab ? p.rotated.kept : 0;
  a.any_k = c.take<char>(selected ? any_k_bytes(p.lists.queries, n, selected) : 0);
  if (bytes) *bytes = c.used();
  return a;
}

template <int W>
void make_tables(const PqArgs& a, const PqPlan& p, int64_t first, int64_t count, const Arrays& w, const Launch& l) {
  float* const rotated = p.rotated.packed ? nullptr : w.rotated;
  const int64_t blocks = div_up(count, W) * (rotated ? round_up(a.m, 16) : a.m);
  launch("pq", a.metric == Metric::l2 ? tables_kernel<W, true> : tables_kernel<W, false>, grid_x(blocks), 256, 0, l,
         a.q + first * a.ldq, count, a.ldq, a.codebooks, static_cast<int>(a.m), static_cast<int>(a.ksub), a.dsub,
         w.tables, rotated, p.rotated.width);
}

template <int W>
void plain_scan(const PqScan& s, const PqPlan& p, const Launch& l) {
  const dim3 grid(grid_x(div_up(s.nq, W)), static_cast<unsigned>(p.lists.parts));
  auto kernel = p.far ? scan_kernel<1, 1, true> : scan_kernel<W, 1, false>;  // far: W is 1
  if (s.m % 16 == 0 && aligned(s.codes, 16))
    kernel = p.far ? scan_kernel<1, 16, true> : scan_kernel<W, 16, false>;
  else if (s.m % 4 == 0 && aligned(s.codes, 4))
    kernel = p.far ? scan_kernel<1, 4, true> : scan_kernel<W, 4, false>;
  launch("pq", kernel, grid, kThreads, p.shared, l, s);
}

// The results of the queries [first, first + count), which one launch serves.
void search(const PqArgs& a, const PqPlan& p, int64_t first, int64_t count, const Arrays& w, const Launch& l) {
  const bool l2 = a.metric == Metric::l2;
  const int m = static_cast<int>(a.m), k = static_cast<int>(a.k);
  float* scores = a.scores + first * a.k;
  int64_t* ids = a.ids + first * a.k;
  const ListPlan& lists = p.lists;
  if (large(a.k, a.n)) {
    make_tables<1>(a, p, first, count, w, l);
    const AnyK all = any_k_arrays(lists.queries, a.n, a.k, w.any_k);
    const PqScan s{a.codes, w.tables, count, a.n, m, l2 ? -1.0f : 1.0f, lists, nullptr, nullptr};
    const int64_t parts = parts_for(count, div_up(a.n, kThreads * 4), 3 * multiprocessors(l.device), 1);
    auto kernel = p.far ? all_scores_kernel<1, true> : all_scores_kernel<1, false>;
    if (m % 16 == 0 && aligned(a.codes, 16))
      kernel = p.far ? all_scores_kernel<16, true> : all_scores_kernel<16, false>;
    else if (m % 4 == 0 && aligned(a.codes, 4))
      kernel = p.far ? all_scores_kernel<4, true> : all_scores_kernel<4, false>;
    launch("pq", kernel, dim3(grid_x(count), static_cast<unsigned>(parts)), kThreads, p.shared, l, s, all.scores);
    return any_k(all, count, l2, scores, ids, "pq", l);
  }
  if (lists.best > 0) {
    (p.width == 4 ? make_tables<4> : make_tables<1>)(a, p, first, count, w, l);
    PqScan s{a.codes, w.tables, count, a.n, m, l2 ? -1.0f : 1.0f, lists, w.keys, w.done};
    if (p.rotated.width) {
      const int kept = p.rotated.kept;
      s.tables = w.rotated, s.lists = p.rotated.lists;
      if (p.rotated.slab) {
        wide_scan(s, p.rotated, any_k_arrays(lists.queries, a.n, kept, w.any_k), w.scores, w.ids, l2, l);
      } else {
        if (p.rotated.packed) {
          packed_tables(w.tables, p.width, count, m, l2, p.rotated, w.rotated, w.rounded, l);
          packed_scan(s, p.rotated, w.rounded, l);
        } else {
          rotated_scan(s, p.rotated, l);
        }
        merge_lists(Merge{w.keys, count, s.lists.parts, kept, s.lists.stride, false, kept, kept, l2, w.scores, w.ids},
                    "pq", l);
      }
      settle(PqSettle{w.tables, p.width, a.codes, a.n, m, static_cast<int>(a.ksub), l2, kept, k, w.scores, w.ids,
                      scores, ids, w.done, w.rounded},
             count, l);
      s.tables = w.tables, s.lists = lists;
    }
    (p.width == 4 ? plain_scan<4> : plain_scan<1>)(s, p, l);
  }
  merge_lists(
      Merge{w.keys, count, lists.parts, lists.best, lists.stride, false, lists.best, k, l2, scores, ids, w.done}, "pq",
      l);
}

}  // namespace

void pq_paths(int64_t wide, int64_t queries) { g_wide = wide, g_queries = queries; }

int64_t pq_workspace(int64_t nq, int64_t n, int64_t m, int64_t ksub, int64_t k, const Launch& l) {
  const DeviceGuard guard(l.device);
  int64_t bytes = 0;
  arrays(plan_for(nq, n, k, m, ksub, l.device), n, k, m, nullptr, &bytes);
  return bytes;
}

void pq(const PqArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const PqPlan p = plan_for(a.nq, a.n, a.k, a.m, a.ksub, l.device);
  const Arrays w = arrays(p, a.n, a.k, a.m, l.workspace, nullptr);
  for (int64_t first = 0; first < a.nq; first += p.lists.queries)
    search(a, p, first, a.nq - first < p.lists.queries ? a.nq - first : p.lists.queries, w, l);
}

}  // namespace cuda
}  // namespace lutra
