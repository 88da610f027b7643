// Batches of packed bits: common bits of 32 rows and 32 queries by a warp's binary tensor cores, and selection.
//
// mma.m16n8k256 (and, popc) counts common bits of 16 rows and 8 queries, 256 bits at a time. Which bit stands where
// does not matter as long as rows and queries agree: lane (g, t) of a warp holds bytes [16 t, 16 t + 16) of each 64 of
// rows g, g + 8, g + 16 and g + 24, as they come from memory, and of a query, from shared memory: words 0 and 1 go to
// one product, 2 and 3 to the next. A fifth column block of ones counts the bits of the rows. Then |q ^ x| = |q| + |x|
// - 2 |q & x|, and what reaches its query's threshold is offered.
//
// Limit: the binary matrix rate of mma.sync, 1024 words of 32 bits an instruction; for short rows the comparison of
// each count with its threshold.
#include "scan/binary_plan.cuh"
#include "scan/code_scan.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256, kQueries = 32, kRows = 256;  // of a block

template <int VEC, bool JACCARD>
__global__ void __launch_bounds__(kThreads, VEC == 16 ? 2 : 1) mma_kernel(BinaryScan a) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int chunks = (a.b + 63) / 64;
  uint4* const q = dynamic_shared<uint4>();                       // [chunks][4][32]: of each lane
  int* const ones = reinterpret_cast<int*>(q + chunks * 128);     // [32]
  float* const bars = reinterpret_cast<float*>(ones + kQueries);  // [32], see below
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * kQueries;
  const int queries = static_cast<int>(a.nq - q0 < kQueries ? a.nq - q0 : kQueries);
  Key* const keys = lists_of(a.keys, a.lists, q0);
  const int64_t pitch = a.lists.parts * a.lists.stride;
  Selector select;
  select.init(bars + kQueries, keys, pitch, kQueries, a.lists.capacity, a.lists.best);
  for (int i = threadIdx.x; i < chunks * 128; i += kThreads) {
    const int query = (i >> 5 & 3) * 8 + (i >> 2 & 7), at = (i >> 7) * 64 + (i & 3) * 16;
    uint32_t v[4] = {0, 0, 0, 0};
    if (query < queries && at < a.b) fetch_codes<1>(a.q + (q0 + query) * a.b, at, a.b, v);
    q[i] = make_uint4(v[0], v[1], v[2], v[3]);
  }
  if (threadIdx.x < kQueries) ones[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < chunks * 128; i += kThreads) {
    const uint4 v = q[i];
    atomicAdd(&ones[(i >> 5 & 3) * 8 + (i >> 2 & 7)], __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w));
  }
  // hamming: the least 2 |q & x| - |x| that may do. jaccard: about the least share of common bits. -inf: all may.
  const auto set_bars = [&] {
    __syncthreads();
    if (threadIdx.x < kQueries) {
      const float score = select.least_score[threadIdx.x];
      float bar = __int_as_float(0xff800000);
      if (score == score) bar = JACCARD ? (score + 1.0f) * (1.0f - 1e-6f) - 2e-7f : score + ones[threadIdx.x];
      bars[threadIdx.x] = bar;
    }
    __syncthreads();
  };
  set_bars();

  const uint32_t n = static_cast<uint32_t>(a.n);
  const int64_t first = blockIdx.y * a.lists.tiles_per_part * kRows;
  const int64_t stop = first + a.lists.tiles_per_part * kRows;
  const uint32_t end = stop < a.n ? static_cast<uint32_t>(stop) : n;
  const uint32_t own = warp * 32 + g;  // rows own, own + 8, own + 16 and own + 24 of a tile
  uint32_t next[4][4];
  const auto fetch = [&](uint32_t row0, int chunk) {
    const int at = chunk * 64 + t * 16;
    const uint32_t rest = end - 1 - row0;
    int pitch_of_rows = a.b;
    opaque(pitch_of_rows);  // addresses are made here: there are no registers to keep them in
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      next[i][0] = next[i][1] = next[i][2] = next[i][3] = 0;
      const uint32_t after = own + 8 * i;
      if (at < a.b)
        fetch_codes<VEC>(a.x + static_cast<uint64_t>(row0 + (after < rest ? after : rest)) * pitch_of_rows, at, a.b,
                         next[i]);
    }
  };
  unsigned todo = ~0u;  // as in scan_codes
  bool full = false;
  for (uint32_t row0 = static_cast<uint32_t>(first); row0 < end;) {
    fetch(row0, 0);
    for (;;) {
      const uint32_t rows = end - row0;
      int count[2][5][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int j = 0; j < 5; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) count[m][j][e] = 0;
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        uint32_t x[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int w = 0; w < 4; ++w) x[i][w] = next[i][w];
        if (chunk + 1 < chunks)
          fetch(row0, chunk + 1);
        else if (rows > kRows)
          fetch(row0 + kRows, 0);
#pragma unroll
        for (int j = 0; j < 5; ++j) {
          const uint4 b = j < 4 ? q[(chunk * 4 + j) * 32 + lane] : make_uint4(~0u, ~0u, ~0u, ~0u);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const uint32_t *top = x[2 * m], *bottom = x[2 * m + 1];
            const uint32_t first[4] = {top[0], bottom[0], top[1], bottom[1]};
            const uint32_t second[4] = {top[2], bottom[2], top[3], bottom[3]};
            mma_and_count(count[m][j], first, b.x, b.y);
            mma_and_count(count[m][j], second, b.z, b.w);
          }
        }
      }
      // Element e of count[m][j]: row 16 m + 8 (e / 2) + g, query 8 j + 2 t + e % 2.
      unsigned passing = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 bar = *reinterpret_cast<const float2*>(bars + 8 * j + 2 * t);
        const int2 mine = *reinterpret_cast<const int2*>(ones + 8 * j + 2 * t);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int c = count[m][j][e], row_ones = count[m][4][e & 2];
            const float least = e & 1 ? bar.y : bar.x;
            bool pass;
            if (JACCARD)
              pass = !(static_cast<float>(c) < least * static_cast<float>(row_ones + (e & 1 ? mine.y : mine.x) - c));
            else
              pass = static_cast<float>(2 * c - row_ones) >= least;
            if (pass) passing |= 1u << ((m * 4 + j) * 4 + e);
          }
      }
      passing &= todo;
      unsigned refused = 0;
      if (passing) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const unsigned bit = 1u << ((m * 4 + j) * 4 + e);
              const uint32_t after = own + 16 * m + 4 * (e & 2), row = row0 + after;
              const int query = 8 * j + 2 * t + (e & 1);
              if (!(passing & bit) || after >= rows || query >= queries) continue;
              if (a.keep && !(a.keep[row >> 3] >> (row & 7) & 1)) continue;
              const float score = binary_score<JACCARD>(count[m][j][e], count[m][4][e & 2], ones[query]);
              if (!select.add(query, score, row)) refused |= bit;
            }
      }
      todo = refused;
      full = __syncthreads_or(refused != 0);
      if (full || rows <= kRows) break;
      todo = ~0u;
      row0 += kRows;
    }
    if (!full) break;  // that was the last tile
    select.compact(false);
    set_bars();
  }
  select.finish(keys, pitch, queries);
}

}  // namespace

BinaryMmaPlan binary_mma_plan(int64_t nq, int64_t n, int64_t b, int64_t k, int64_t list_bytes, int device) {
  BinaryMmaPlan p;
  const int64_t limit = shared_limit(device), chunks = div_up(b, 64);
  const int best = static_cast<int>(k < n ? k : n);
  const int64_t shared =
      chunks * 2048 + kQueries * 8 + static_cast<int64_t>(Selector::bytes(kQueries, best, kThreads / 32));
  if (b > (1 << 16) || shared > limit) return p;
  p.shared = static_cast<size_t>(shared);
  const int64_t at_once = limit / (shared + 1024);
  p.lists = cut_lists(nq, kQueries, n, k, kRows, (at_once < 2 ? 1 : 2) * multiprocessors(device), list_bytes);
  return p;
}

void binary_mma(const BinaryScan& s, const BinaryMmaPlan& p, int vec, bool jaccard, const Launch& l) {
  auto kernel = jaccard ? mma_kernel<1, true> : mma_kernel<1, false>;
  if (vec == 16) kernel = jaccard ? mma_kernel<16, true> : mma_kernel<16, false>;
  if (vec == 4) kernel = jaccard ? mma_kernel<4, true> : mma_kernel<4, false>;
  const dim3 grid(grid_x(div_up(s.nq, kQueries)), static_cast<unsigned>(p.lists.parts));
  launch("binary", kernel, grid, kThreads, p.shared, l, s);
}

}  // namespace cuda
}  // namespace lutra
