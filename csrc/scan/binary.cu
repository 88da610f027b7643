// Packed bits on CUDA; formulas and conventions are in binary.h.
//
// Few queries: as many lanes as make whole sectors share a row, 16 bytes each, and add up their counts by
// shuffles; the limit is reading the collection. More queries: binary_mma.cu.
//
// k above 2048: scores are written out and selected by radix (any_k.cuh). n < 2^32 - 1; offsets are 64-bit. Counts are
// integers: 32 bits hold rows of 2^28 bytes.
#include "scan/binary_plan.cuh"

#include <type_traits>

#include "scan/any_k.cuh"
#include "scan/code_scan.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256, kRows = 2;

__device__ __forceinline__ int count4(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __popc(a) + __popc(b) + (__popc(c) + __popc(d));
}

struct Nothing {};
struct Ones {
  int count = 0;
};

template <int VEC, int LANES, int QUERIES, bool JACCARD>
struct BinaryPolicy {
  static constexpr int kThreads = cuda::kThreads, kRows = cuda::kRows, kQueries = QUERIES, kLanes = LANES;
  static constexpr bool kRowTerms = false;
  using Piece = Codes16;
  using Sum = int;
  using RowSum = std::conditional_t<JACCARD, Ones, Nothing>;
  const BinaryScan& a;
  const uint4* q;   // [QUERIES][chunks], shared memory
  const int* ones;  // [QUERIES]
  int queries;

  __device__ __forceinline__ void fetch(uint32_t row, int piece, Piece& to) const {
    fetch_codes<VEC>(a.x + static_cast<uint64_t>(row) * a.b,
                     16 * (LANES == 1 ? piece : piece * LANES + threadIdx.x % LANES), a.b, to.v);
  }
  __device__ __forceinline__ void add(int piece, const Piece (&row)[kRows], Sum (&sum)[kRows][kQueries],
                                      RowSum (&row_sum)[kRows]) const {
    const uint4* at = q + (LANES == 1 ? piece : piece * LANES + threadIdx.x % LANES);
    if constexpr (JACCARD) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) row_sum[r].count += count4(row[r].v[0], row[r].v[1], row[r].v[2], row[r].v[3]);
    }
#pragma unroll
    for (int w = 0; w < kQueries; ++w) {
      if (kQueries > 1 && w >= queries) break;
      const uint4 s = at[w * a.chunks];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t* v = row[r].v;
        sum[r][w] += JACCARD ? count4(v[0] & s.x, v[1] & s.y, v[2] & s.z, v[3] & s.w)
                             : count4(v[0] ^ s.x, v[1] ^ s.y, v[2] ^ s.z, v[3] ^ s.w);
      }
    }
  }
  __device__ __forceinline__ void close(Sum (&sum)[kRows][kQueries], RowSum (&row_sum)[kRows]) const {
#pragma unroll
    for (int s = LANES / 2; s > 0; s >>= 1)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] += __shfl_xor_sync(kFullWarp, sum[r][0], s);
        if constexpr (JACCARD) row_sum[r].count += __shfl_xor_sync(kFullWarp, row_sum[r].count, s);
      }
  }
  __device__ __forceinline__ float score(int count, const RowSum& row_sum, int w, uint32_t) const {
    if constexpr (JACCARD)
      return binary_score<true>(count, row_sum.count, ones[w]);
    else
      return -static_cast<float>(count);
  }
  __device__ __forceinline__ bool wanted(uint32_t row) const { return !a.keep || (a.keep[row >> 3] >> (row & 7) & 1); }
};

// The block's queries and their counts of ones in shared memory, with 0 beyond their ends.
template <int QUERIES, bool JACCARD>
__device__ __forceinline__ void load_queries(const BinaryScan& a, int64_t q0, int queries, uint8_t* patterns,
                                             int* ones) {
  for (int i = threadIdx.x; i < a.chunks * 16 * QUERIES; i += kThreads) {
    const int w = i / (a.chunks * 16), at = i - w * a.chunks * 16;
    patterns[i] = w < queries && at < a.b ? a.q[(q0 + w) * a.b + at] : 0;
  }
  __syncthreads();
  if (!JACCARD) return;
  const uint4* const q = reinterpret_cast<const uint4*>(patterns);
  for (int w = threadIdx.x >> 5; w < QUERIES; w += kThreads / 32) {
    int count = 0;
    for (int c = threadIdx.x & 31; c < a.chunks; c += 32) {
      const uint4 v = q[w * a.chunks + c];
      count += count4(v.x, v.y, v.z, v.w);
    }
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) count += __shfl_xor_sync(kFullWarp, count, s);
    if ((threadIdx.x & 31) == 0) ones[w] = count;
  }
  __syncthreads();
}

template <int VEC, int LANES, bool JACCARD>
__global__ void __launch_bounds__(kThreads, JACCARD || VEC == 1 ? 3 : 4) binary_kernel(BinaryScan a) {
  constexpr int QUERIES = 1;
  using Policy = BinaryPolicy<VEC, LANES, QUERIES, JACCARD>;
  uint8_t* const patterns = dynamic_shared<uint8_t>();
  int* const ones = reinterpret_cast<int*>(patterns + static_cast<int64_t>(a.chunks) * 16 * QUERIES);
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * QUERIES;
  const int queries = static_cast<int>(a.nq - q0 < QUERIES ? a.nq - q0 : QUERIES);
  Key* const keys = lists_of(a.keys, a.lists, q0);
  const int64_t pitch = a.lists.parts * a.lists.stride;
  Selector select;
  select.init(ones + (QUERIES + 1) / 2 * 2, keys, pitch, QUERIES, a.lists.capacity, a.lists.best);
  load_queries<QUERIES, JACCARD>(a, q0, queries, patterns, ones);
  constexpr int64_t kTile = kThreads / LANES * Policy::kRows;
  const int64_t begin = blockIdx.y * a.lists.tiles_per_part * kTile;
  const int64_t stop = begin + a.lists.tiles_per_part * kTile, end = stop < a.n ? stop : a.n;
  scan_codes(Policy{a, reinterpret_cast<const uint4*>(patterns), ones, queries}, select, static_cast<uint32_t>(begin),
             static_cast<uint32_t>(end), a.chunks / LANES, queries);
  select.finish(keys, pitch, queries);
}

template <int VEC, int QUERIES, bool JACCARD>
__global__ void __launch_bounds__(kThreads, 3) all_scores_kernel(BinaryScan a, uint32_t* all) {
  uint8_t* const patterns = dynamic_shared<uint8_t>();
  int* const ones = reinterpret_cast<int*>(patterns + static_cast<int64_t>(a.chunks) * 16 * QUERIES);
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * QUERIES;
  const int queries = static_cast<int>(a.nq - q0 < QUERIES ? a.nq - q0 : QUERIES);
  load_queries<QUERIES, JACCARD>(a, q0, queries, patterns, ones);
  score_codes(BinaryPolicy<VEC, 1, QUERIES, JACCARD>{a, reinterpret_cast<const uint4*>(patterns), ones, queries},
              static_cast<uint32_t>(a.n), a.chunks, queries, all + q0 * a.n);
}

constexpr int64_t kListBytes = int64_t{128} << 20;  // of the workspace, about
constexpr int kBatch = 8;

struct BinaryPlan {
  int queries, lanes, vec;
  size_t shared;
  ListPlan lists;
  BinaryMmaPlan mma;  // where it does the scan
};

bool large(int64_t k, int64_t n) { return k > kMaxK && n > kMaxK; }

BinaryPlan plan_for(int64_t nq, int64_t n, int64_t b, int64_t k, int vec, int device) {
  if (n > kMaxRows) throw std::length_error("lutra: binary on CUDA takes fewer than 2^32 - 1 rows");
  const int64_t chunks = div_up(b, 16), limit = shared_limit(device);
  const int best = large(k, n) ? 1 : static_cast<int>(k < n ? k : n);
  const auto shared_for = [&](int queries) {
    return chunks * 16 * queries + 4 * ((queries + 1) / 2 * 2) +
           static_cast<int64_t>(Selector::bytes(queries, best, kThreads / 32));
  };
  if (b > (int64_t{1} << 24) || shared_for(1) > limit)
    throw std::length_error("lutra: binary on CUDA takes rows of at most 200 kB or so");
  BinaryPlan p{};
  p.vec = vec;
  p.queries = 1;
  p.lanes = 1;
  if (large(k, n)) {
    p.queries = nq > 2 && shared_for(kBatch) * 2 <= limit ? kBatch : 1;
    p.shared = static_cast<size_t>(shared_for(p.queries));
    p.lists.queries = any_k_queries(nq, n);
    return p;
  }
  // Fewer queries: their blocks meet the same rows in the L2, and popcounts are quicker than 32 queries at a time.
  if (nq >= 6 + 320 / (b < 16 ? 40 : b)) p.mma = binary_mma_plan(nq, n, b, k, kListBytes, device);
  if (p.mma.shared) {
    p.lists = p.mma.lists;
    return p;
  }
  while (vec == 16 && p.lanes < 8 && chunks % (2 * p.lanes) == 0) p.lanes *= 2;
  p.shared = static_cast<size_t>(shared_for(p.queries));
  int64_t at_once = limit / static_cast<int64_t>(p.shared + 1024);
  at_once = at_once < 1 ? 1 : at_once > 4 ? 4 : at_once;
  p.lists = cut_lists(nq, p.queries, n, k, kThreads / p.lanes * kRows, at_once * multiprocessors(device), kListBytes);
  return p;
}

template <int VEC, int LANES>
void scan_as(const BinaryScan& s, const BinaryPlan& p, bool jaccard, const Launch& l) {
  const dim3 grid(grid_x(s.nq), static_cast<unsigned>(p.lists.parts));
  launch("binary", jaccard ? binary_kernel<VEC, LANES, true> : binary_kernel<VEC, LANES, false>, grid, kThreads,
         p.shared, l, s);
}

template <int VEC>
void scan_of(const BinaryScan& s, const BinaryPlan& p, bool jaccard, const Launch& l) {
  if (p.mma.shared) return binary_mma(s, p.mma, VEC, jaccard, l);
  if constexpr (VEC == 16) {
    if (p.lanes == 2) return scan_as<VEC, 2>(s, p, jaccard, l);
    if (p.lanes == 4) return scan_as<VEC, 4>(s, p, jaccard, l);
    if (p.lanes == 8) return scan_as<VEC, 8>(s, p, jaccard, l);
  }
  scan_as<VEC, 1>(s, p, jaccard, l);
}

template <int VEC, int QUERIES>
void all_scores_as(const BinaryScan& s, const BinaryPlan& p, bool jaccard, uint32_t* all, const Launch& l) {
  const int64_t groups = div_up(s.nq, QUERIES);
  const int64_t parts = parts_for(groups, div_up(s.n, kThreads * kRows), 3 * multiprocessors(l.device), 1);
  launch("binary", jaccard ? all_scores_kernel<VEC, QUERIES, true> : all_scores_kernel<VEC, QUERIES, false>,
         dim3(grid_x(groups), static_cast<unsigned>(parts)), kThreads, p.shared, l, s, all);
}
template <int VEC>
void all_scores(const BinaryScan& s, const BinaryPlan& p, bool jaccard, uint32_t* all, const Launch& l) {
  p.queries > 1 ? all_scores_as<VEC, kBatch>(s, p, jaccard, all, l) : all_scores_as<VEC, 1>(s, p, jaccard, all, l);
}

int vector_bytes(int64_t b, const void* x) {
  return b % 16 == 0 && aligned(x, 16) ? 16 : b % 4 == 0 && aligned(x, 4) ? 4 : 1;
}

}  // namespace

int64_t binary_workspace(int64_t nq, int64_t n, int64_t b, int64_t k, const void* x, const Launch& l) {
  const DeviceGuard guard(l.device);
  const ListPlan lists = plan_for(nq, n, b, k, vector_bytes(b, x), l.device).lists;
  if (large(k, n)) return any_k_bytes(lists.queries, n, k);
  Carve c(nullptr);
  c.take<Key>(lists.bytes() / static_cast<int64_t>(sizeof(Key)));
  return c.used();
}

void binary(const BinaryArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const BinaryPlan p = plan_for(a.nq, a.n, a.b, a.k, vector_bytes(a.b, a.x), l.device);
  const ListPlan& lists = p.lists;
  Key* keys = static_cast<Key*>(l.workspace);
  const bool jaccard = a.metric == BinaryMetric::jaccard;
  for (int64_t first = 0; first < a.nq; first += lists.queries) {
    const int64_t count = a.nq - first < lists.queries ? a.nq - first : lists.queries;
    const BinaryScan s{a.q + first * a.b,
                       a.x,
                       a.keep,
                       count,
                       a.n,
                       static_cast<int>(a.b),
                       static_cast<int>(div_up(a.b, 16)),
                       lists,
                       keys};
    if (large(a.k, a.n)) {
      const AnyK all = any_k_arrays(lists.queries, a.n, a.k, l.workspace);
      if (p.vec == 16)
        all_scores<16>(s, p, jaccard, all.scores, l);
      else
        p.vec == 4 ? all_scores<4>(s, p, jaccard, all.scores, l) : all_scores<1>(s, p, jaccard, all.scores, l);
      any_k(all, count, true, a.scores + first * a.k, a.ids + first * a.k, "binary", l);
      continue;
    }
    if (lists.best > 0) {
      if (p.vec == 16)
        scan_of<16>(s, p, jaccard, l);
      else
        p.vec == 4 ? scan_of<4>(s, p, jaccard, l) : scan_of<1>(s, p, jaccard, l);
    }
    merge_lists(Merge{keys, count, lists.parts, lists.best, lists.stride, false, lists.best, static_cast<int>(a.k),
                      true, a.scores + first * a.k, a.ids + first * a.k},
                "binary", l);
  }
}

}  // namespace cuda
}  // namespace lutra
