// Scan of 4-bit codes on CUDA; formulas, the rounding of tables and the layout are in fast_scan.h.
//
// Served are given tables over all rows, with bias, add, mul and keep: what `lutra.scan.fast_scan` asks for. Sums of
// rounded entries are integers below 2^24, exact in fp32 whatever the order, so that the lanes may add them up in
// orders of their own (rotated.cuh). A byte of codes holds two entries. Where m is small their tables are joined to one
// of 256 entries, a look-up for both; else each half of a byte is looked up by itself, in a sixteenth of the memory.
//
// Limits: reading the codes for one query; else shared memory, 32 look-ups a cycle and multiprocessor. k above
// 2048: any_k.cuh. m <= 1792 or so (tables in shared memory), n < 2^32 - 1. A query whose tables are not finite has
// scores of NaN.
#include "scan/fast_scan.h"

#include <type_traits>

#include "scan/any_k.cuh"
#include "scan/code_scan.cuh"
#include "scan/rotated.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256, kRows = 2;

struct QueryTerms {  // of a query, in keys: the greater the better
  float least, step, base;
};

struct FastScan {
  const uint8_t* codes;
  const float* image;  // [queries / W][units][E][16][W]
  const QueryTerms* terms;
  const float *add, *mul;
  const uint8_t* keep;
  int64_t nq, n;
  int groups, pieces;
  float sign;
  ListPlan lists;
  Key* keys;
};

// ---- tables, a block a query
struct TablesArgs {
  const float *tables, *bias;
  int64_t nq;
  int m, pieces, width;
  float sign;
  float* image;
  QueryTerms* terms;
};

template <bool JOINED>
__global__ void __launch_bounds__(256) tables_kernel(TablesArgs a) {
  __shared__ float widest_of[8], step, per;
  __shared__ int broken;
  float* const low = dynamic_shared<float>();  // [32 pieces]
  float* const range = low + 32 * a.pieces;
  const int64_t query = blockIdx.x;
  const bool real = query < a.nq;  // else padding of a group of queries
  const float* t = a.tables + query * a.m * 16;
  const int padded = 32 * a.pieces;
  if (threadIdx.x == 0) broken = 0;
  __syncthreads();
  for (int j = threadIdx.x; j < padded; j += blockDim.x) {
    float least = 0, most = 0;
    if (real && j < a.m) {
      least = most = a.sign * t[static_cast<int64_t>(j) * 16];
      float all = 0;
      for (int c = 0; c < 16; ++c) {
        const float v = a.sign * t[static_cast<int64_t>(j) * 16 + c];
        least = v < least ? v : least;
        most = v > most ? v : most;
        all += v * 0.0f;
      }
      if (all != 0.0f) atomicOr(&broken, 1);  // a NaN or an infinity: NaN
    }
    low[j] = least;
    range[j] = most - least;
  }
  __syncthreads();
  float widest = 0;
  for (int i = threadIdx.x; i < padded / 2; i += blockDim.x) {
    const int j = i / 4 * 8 + i % 4;
    widest = fmaxf(widest, range[j] + range[j + 4]);
  }
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) widest = fmaxf(widest, __shfl_xor_sync(kFullWarp, widest, s));
  if ((threadIdx.x & 31) == 0) widest_of[threadIdx.x >> 5] = widest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 0; w < 8; ++w) widest = fmaxf(widest, widest_of[w]);
    float sum = 0;
    for (int j = 0; j < a.m; ++j) sum += low[j];
    step = widest > 0 ? widest / 254.0f : 1.0f;
    per = 1.0f / step;
    const bool fine = real && !broken && widest < __int_as_float(0x7f800000) && sum * 0.0f == 0.0f;
    if (!fine) per = 0;
    a.terms[query] = {fine ? sum : quiet_nan(), step, real && a.bias ? a.sign * a.bias[query] : 0.0f};
  }
  __syncthreads();
  const auto rounded = [&](int j, int c) {  // as the CPU and the reference: product and sum rounded by themselves
    if (!real || j >= a.m || per == 0.0f) return 0.0f;
    const float above = a.sign * t[static_cast<int64_t>(j) * 16 + c] - low[j];
    return static_cast<float>(static_cast<int>(__fadd_rn(__fmul_rn(above, per), 0.5f)));
  };
  constexpr int E = JOINED ? 256 : 16;
  const int units = JOINED ? a.pieces : 2 * a.pieces;
  float* const image = a.image + query / a.width * units * E * 16 * a.width + query % a.width;
  for (int i = threadIdx.x; i < units * E * 16; i += blockDim.x) {
    const int u = i / (E * 16), e = i / 16 % E, at = i % 16;
    const int piece = JOINED ? u : u / 2, j = piece * 32 + at / 4 * 8 + at % 4;
    const float v = JOINED ? rounded(j, e & 15) + rounded(j + 4, e >> 4) : rounded(j + (u & 1) * 4, e);
    image[static_cast<int64_t>(i) * a.width] = v;
  }
}

// ---- the scan
struct Terms {
  float add, mul;
};
struct NoTerms {};

template <int W, bool JOINED, bool TERMS>
struct FastScanPolicy {
  static constexpr int kThreads = cuda::kThreads, kRows = W == 4 ? 1 : cuda::kRows, kQueries = W, kLanes = 1;
  static constexpr bool kRowTerms = false;
  static constexpr int kEntries = JOINED ? 256 : 16;
  using RowSum = std::conditional_t<TERMS, Terms, NoTerms>;
  struct Piece : RowSum {
    uint32_t v[4];
  };
  using Sum = float;
  const FastScan& a;
  const char* tables;
  const QueryTerms* terms;  // of the block's queries, shared memory
  const rotated::Lane lane;

  __device__ __forceinline__ void fetch(uint32_t row, int piece, Piece& to) const {
    const uint8_t* at = a.codes + static_cast<uint64_t>(row >> 4) * a.groups * 64 + (row & 15) * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int g = piece * 4 + i;
      to.v[i] = g < a.groups ? *reinterpret_cast<const uint32_t*>(at + g * 64) : 0;
    }
    if constexpr (TERMS) {
      if (piece == 0) {
        to.add = a.add ? a.add[row] : 0.0f;
        to.mul = a.mul ? a.mul[row] : 1.0f;
      }
    }
  }
  __device__ __forceinline__ void add(int piece, const Piece (&row)[kRows], Sum (&sum)[kRows][W],
                                      RowSum (&row_sum)[kRows]) const {
    uint32_t v[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if constexpr (TERMS) {
        if (piece == 0) row_sum[r] = row[r];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) v[r][i] = row[r].v[i];
      rotated::reorder<W>(lane, v[r]);
    }
    if constexpr (JOINED) {
      rotated::add_up<W, kRows>(lane, tables + rotated::unit_at<W, 256>(piece), v, sum);
    } else {
      uint32_t half[kRows][4];
#pragma unroll(W == 4 && TERMS ? 1 : 2)  // one at a time where both would take too many registers
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i) half[r][i] = v[r][i] >> (4 * h) & 0x0f0f0f0fu;
        rotated::add_up<W, kRows>(lane, tables + rotated::unit_at<W, 16>(2 * piece + h), half, sum);
      }
    }
  }
  __device__ __forceinline__ void close(Sum (&)[kRows][W], RowSum (&)[kRows]) const {}
  __device__ __forceinline__ float score(float sum, const RowSum& row, int w, uint32_t) const {
    float key = __fadd_rn(terms[w].least, __fmul_rn(terms[w].step, sum));
    if constexpr (TERMS) key = __fmul_rn(key, row.mul);
    key = __fadd_rn(key, terms[w].base);
    if constexpr (TERMS) key = __fadd_rn(key, a.sign * row.add);
    return key;
  }
  __device__ __forceinline__ bool wanted(uint32_t row) const { return !a.keep || (a.keep[row >> 3] >> (row & 7) & 1); }
};

template <int W, bool JOINED, bool TERMS>
__global__ void __launch_bounds__(kThreads, 3) fast_scan_kernel(FastScan a) {
  using Policy = FastScanPolicy<W, JOINED, TERMS>;
  char* const tables = dynamic_shared<char>();
  const int units = JOINED ? a.pieces : 2 * a.pieces;
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * W;
  const int queries = static_cast<int>(a.nq - q0 < W ? a.nq - q0 : W);
  auto* const terms = reinterpret_cast<QueryTerms*>(tables + rotated::unit_bytes(W, Policy::kEntries, units));
  Key* const keys = lists_of(a.keys, a.lists, q0);
  const int64_t pitch = a.lists.parts * a.lists.stride;
  Selector select;
  select.init(terms + 4, keys, pitch, W, a.lists.capacity, a.lists.best);
  rotated::fill<W, Policy::kEntries, kThreads>(
      a.image + static_cast<int64_t>(blockIdx.x) * units * Policy::kEntries * 16 * W, units, tables);
  if (threadIdx.x < W) terms[threadIdx.x] = a.terms[q0 + threadIdx.x];
  __syncthreads();
  constexpr int64_t kTile = kThreads * Policy::kRows;
  const int64_t begin = blockIdx.y * a.lists.tiles_per_part * kTile;
  const int64_t stop = begin + a.lists.tiles_per_part * kTile, end = stop < a.n ? stop : a.n;
  scan_codes(Policy{a, tables, terms, rotated::lane_of<W>()}, select, static_cast<uint32_t>(begin),
             static_cast<uint32_t>(end), a.pieces, queries);
  select.finish(keys, pitch, queries);
}

template <int W>
__global__ void __launch_bounds__(kThreads, 3) all_scores_kernel(FastScan a, uint32_t* all) {
  using Policy = FastScanPolicy<W, false, true>;
  char* const tables = dynamic_shared<char>();
  const int units = 2 * a.pieces;
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * W;
  const int queries = static_cast<int>(a.nq - q0 < W ? a.nq - q0 : W);
  auto* const terms = reinterpret_cast<QueryTerms*>(tables + rotated::unit_bytes(W, 16, units));
  rotated::fill<W, 16, kThreads>(a.image + static_cast<int64_t>(blockIdx.x) * units * 256 * W, units, tables);
  if (threadIdx.x < W) terms[threadIdx.x] = a.terms[q0 + threadIdx.x];
  __syncthreads();
  score_codes(Policy{a, tables, terms, rotated::lane_of<W>()}, static_cast<uint32_t>(a.n), a.pieces, queries,
              all + q0 * a.n);
}

bool large(int64_t k, int64_t n) { return k > kMaxK && n > kMaxK; }

constexpr int64_t kListBytes = int64_t{128} << 20, kImageBytes = int64_t{64} << 20;  // of the workspace, about

struct FastScanPlan {
  int width, pieces;
  bool joined;
  size_t shared;
  ListPlan lists;
  int units() const { return joined ? pieces : 2 * pieces; }
  int entries() const { return joined ? 256 : 16; }
  int64_t padded() const { return round_up(lists.queries, width); }
};

FastScanPlan plan_for(int64_t nq, int64_t n, int64_t m, int64_t k, int device) {
  if (n > kMaxRows) throw std::length_error("lutra: fast_scan on CUDA takes fewer than 2^32 - 1 rows");
  const int64_t limit = shared_limit(device);
  const int best = large(k, n) ? 1 : static_cast<int>(k < n ? k : n);
  FastScanPlan p{};
  p.pieces = static_cast<int>(div_up(m < (1 << 20) ? m : 1 << 20, 32));
  const auto shared_for = [&](int width, bool joined) {
    return rotated::unit_bytes(width, joined ? 256 : 16, joined ? p.pieces : 2 * p.pieces) +
           static_cast<int64_t>(4 * sizeof(QueryTerms) + Selector::bytes(width, best, kThreads / 32));
  };
  for (const bool joined : {true, false})
    for (const int width : {4, 2, 1}) {
      if (p.width || (width > 1 && nq < (width == 4 ? 3 : 2)) || shared_for(width, joined) > limit) continue;
      if (joined && (p.pieces > 2 || width == 2 || large(k, n))) continue;  // two blocks and more where they are joined
      p.width = width, p.joined = joined;
    }
  if (p.width == 0)
    throw std::length_error("lutra: fast_scan on CUDA takes at most 1700 look-ups or so, got " + std::to_string(m));
  p.shared = static_cast<size_t>(shared_for(p.width, p.joined));
  int64_t at_once = limit / static_cast<int64_t>(p.shared + 1024);
  at_once = at_once < 1 ? 1 : at_once > 3 ? 3 : at_once;
  const int64_t image = static_cast<int64_t>(p.units()) * p.entries() * 64;
  if (large(k, n))
    p.lists.queries = any_k_queries(nq, n);
  else
    p.lists = cut_lists(nq, p.width, n, k, kThreads * (p.width == 4 ? 1 : kRows), at_once * multiprocessors(device),
                        kListBytes);
  const int64_t fit = kImageBytes / image / 4 * 4;
  if (p.lists.queries > fit) p.lists.queries = fit < 4 ? (nq < 4 ? nq : 4) : fit;
  return p;
}

struct Arrays {
  float* image;
  QueryTerms* terms;
  Key* keys;
  void* any_k;
};
Arrays arrays(const FastScanPlan& p, int64_t n, int64_t k, void* workspace, int64_t* bytes) {
  Carve c(workspace);
  Arrays a;
  a.image = c.take<float>(p.padded() * p.units() * p.entries() * 16);
  a.terms = c.take<QueryTerms>(p.padded());
  a.keys = c.take<Key>(p.lists.bytes() / static_cast<int64_t>(sizeof(Key)));
  a.any_k = c.take<char>(large(k, n) ? any_k_bytes(p.lists.queries, n, k) : 0);
  if (bytes) *bytes = c.used();
  return a;
}

template <int W, bool JOINED>
void scan_as(const FastScan& s, const FastScanPlan& p, const Launch& l) {
  const dim3 grid(grid_x(div_up(s.nq, W)), static_cast<unsigned>(p.lists.parts));
  const bool terms = s.add || s.mul;
  launch("fast_scan", terms ? fast_scan_kernel<W, JOINED, true> : fast_scan_kernel<W, JOINED, false>, grid, kThreads,
         p.shared, l, s);
}

}  // namespace

int64_t fast_scan_workspace(int64_t nq, int64_t n, int64_t m, int64_t k, const Launch& l) {
  const DeviceGuard guard(l.device);
  int64_t bytes = 0;
  arrays(plan_for(nq, n, m, k, l.device), n, k, nullptr, &bytes);
  return bytes;
}

void fast_scan(const FastScanArgs& a, const Launch& l) {
  if (a.nq < 1) return;
  if (!a.tables || a.positions || a.probes || a.candidates || a.screen || a.base)
    throw std::invalid_argument("lutra: fast_scan on CUDA takes tables over all rows");
  const DeviceGuard guard(l.device);
  const FastScanPlan p = plan_for(a.nq, a.n, a.m, a.k, l.device);
  const Arrays w = arrays(p, a.n, a.k, l.workspace, nullptr);
  const bool l2 = a.metric == Metric::l2;
  const float sign = l2 ? -1.0f : 1.0f;
  const int m = static_cast<int>(a.m);
  for (int64_t first = 0; first < a.nq; first += p.lists.queries) {
    const int64_t count = a.nq - first < p.lists.queries ? a.nq - first : p.lists.queries;
    if (a.n > 0) {
      const TablesArgs t{a.tables + first * a.m * 16,
                         a.bias ? a.bias + first : nullptr,
                         count,
                         m,
                         p.pieces,
                         p.width,
                         sign,
                         w.image,
                         w.terms};
      launch("fast_scan", p.joined ? tables_kernel<true> : tables_kernel<false>, grid_x(round_up(count, p.width)), 256,
             static_cast<size_t>(p.pieces) * 64 * sizeof(float), l, t);
      const FastScan s{a.codes,  w.image, w.terms, a.add, a.mul, a.keep, count, a.n, static_cast<int>((a.m + 7) / 8),
                       p.pieces, sign,    p.lists, w.keys};
      if (large(a.k, a.n)) {
        const AnyK all = any_k_arrays(p.lists.queries, a.n, a.k, w.any_k);
        const int64_t groups = div_up(count, p.width);
        const int64_t parts = parts_for(groups, div_up(a.n, kThreads), 3 * multiprocessors(l.device), 1);
        launch("fast_scan",
               p.width == 4   ? all_scores_kernel<4>
               : p.width == 2 ? all_scores_kernel<2>
                              : all_scores_kernel<1>,
               dim3(grid_x(groups), static_cast<unsigned>(parts)), kThreads, p.shared, l, s, all.scores);
        any_k(all, count, l2, a.scores + first * a.k, a.ids + first * a.k, "fast_scan", l);
        continue;
      }
      if (p.joined)
        p.width == 4 ? scan_as<4, true>(s, p, l) : scan_as<1, true>(s, p, l);
      else
        p.width == 4   ? scan_as<4, false>(s, p, l)
        : p.width == 2 ? scan_as<2, false>(s, p, l)
                       : scan_as<1, false>(s, p, l);
    }
    merge_lists(Merge{w.keys, count, p.lists.parts, p.lists.best, p.lists.stride, false, p.lists.best,
                      static_cast<int>(a.k), l2, a.scores + first * a.k, a.ids + first * a.k},
                "fast_scan", l);
  }
}

// ---- the layout
namespace {

__global__ void __launch_bounds__(256) pack4_kernel(Pack4Args a, int64_t rows) {  // a thread a byte
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, groups = (a.m + 7) / 8;
  if (i >= rows * groups * 4) return;
  const int64_t r = i / (groups * 4), at = i - r * groups * 4, g = at / 4, b = at % 4, row = a.first + r;
  const uint8_t* entries = a.entries + r * a.m;
  const int64_t j = g * 8 + b;
  const bool here = r < a.n;
  const unsigned low = here && j < a.m ? entries[j] & 15 : 0, high = here && j + 4 < a.m ? entries[j + 4] & 15 : 0;
  a.codes[((row / 16 * groups + g) * 16 + row % 16) * 4 + b] = static_cast<uint8_t>(low | high << 4);
}

__global__ void __launch_bounds__(256) unpack4_kernel(Unpack4Args a) {  // a thread an entry
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= a.n * a.m) return;
  const int64_t r = i / a.m, j = i - r * a.m, row = a.rows ? a.rows[r] : a.first + r;
  const int64_t groups = (a.m + 7) / 8, g = j / 8;
  const unsigned byte = a.codes[((row / 16 * groups + g) * 16 + row % 16) * 4 + j % 4];
  a.entries[i] = static_cast<uint8_t>(j % 8 >= 4 ? byte >> 4 : byte & 15);
}

}  // namespace

void pack4(const Pack4Args& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const int64_t rows = round_up(a.first + a.n, 16) - a.first;  // what is left of the last block becomes 0
  launch("pack4", pack4_kernel, grid_x(div_up(rows * ((a.m + 7) / 8) * 4, 256)), 256, 0, l, a, rows);
}

void unpack4(const Unpack4Args& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  launch("unpack4", unpack4_kernel, grid_x(div_up(a.n * a.m, 256)), 256, 0, l, a);
}

}  // namespace cuda
}  // namespace lutra
