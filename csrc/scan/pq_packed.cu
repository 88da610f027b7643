// The fast pass of the PQ scan for batches: as pq_rotated.cu, with tables rounded to 12 bits, two queries in a word.
//
// Entry e of table j is round((t - least_j) / step), step a 4095th of the widest table's range. Sixteen of them stay
// below 2^16, so that one addition serves two queries and one read of 16 bytes eight; after each sixteen the halves go
// to sums of 32 bits. A score is off by m step / 2 at most, besides what fp32 rounds; what the candidates' exact scores
// leave in doubt is scanned again (settle()). Tables with entries that are no numbers (ksub < 256) do not come here.
//
// Limit: shared memory, 64 look-ups a cycle and multiprocessor.
#include "scan/code_scan.cuh"
#include "scan/pq_plan.cuh"
#include "scan/rotated.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
// Rows of a thread at a time, and blocks that a multiprocessor is to hold, with W words an entry.
constexpr int rows_of(int words) { return words == 4 ? 1 : 2; }
constexpr int blocks_of(int words) { return words == 4 ? 3 : 2; }

// ---- tables: a block a query
struct Rounding {
  const float* tables;  // plain, of `width` queries a group
  int64_t nq;
  int width, m, sixteens;
  int batch;  // queries of a block of the scan
  float sign;
  uint16_t* image;  // [queries / batch][sixteens][256][16][batch]
  float2* terms;    // of a query: the sum of the least entries, the step
};

__global__ void __launch_bounds__(256) round_kernel(Rounding a) {
  __shared__ float widest_of[8], step, per;
  float* const low = dynamic_shared<float>();  // [m]
  const int64_t query = blockIdx.x;
  const bool real = query < a.nq;
  const float* t = a.tables + (query / a.width * a.m * 256 * a.width + query % a.width);
  const auto entry = [&](int j, int c) { return a.sign * t[(static_cast<int64_t>(j) * 256 + c) * a.width]; };
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  float widest = 0, broken = 0;
  for (int j = warp; real && j < a.m; j += 8) {
    float least = entry(j, lane), most = least, all = 0;
    for (int c = lane; c < 256; c += 32) {
      const float v = entry(j, c);
      least = fminf(least, v), most = fmaxf(most, v);
      all += v * 0.0f;  // a NaN or an infinity: NaN
    }
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) {
      least = fminf(least, __shfl_xor_sync(kFullWarp, least, s));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, s));
      all += __shfl_xor_sync(kFullWarp, all, s);
    }
    if (lane == 0) low[j] = least;
    widest = fmaxf(widest, most - least);
    broken += all;
  }
  if (lane == 0) widest_of[warp] = broken == 0.0f ? widest : quiet_nan();
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    widest = 0, broken = 0;
    for (int w = 0; w < 8; ++w) widest = fmaxf(widest, widest_of[w]), broken += widest_of[w] * 0.0f;
    for (int j = 0; real && j < a.m; ++j) sum += low[j];
    const bool fine = real && broken == 0.0f && sum * 0.0f == 0.0f;
    step = widest > 0 ? widest / 4095.0f : 1.0f;
    per = fine ? 1.0f / step : 0.0f;
    a.terms[query] = make_float2(fine ? sum : quiet_nan(), step);
  }
  __syncthreads();
  uint16_t* const image = a.image + query / a.batch * a.sixteens * 4096 * a.batch + query % a.batch;
  for (int i = threadIdx.x; i < a.sixteens * 4096; i += blockDim.x) {
    const int j = i / 4096 * 16 + i % 16, c = i / 16 % 256;
    float v = 0;
    if (per > 0 && j < a.m) v = fminf((entry(j, c) - low[j]) * per + 0.5f, 4095.0f);
    image[static_cast<int64_t>(i) * a.batch] = static_cast<uint16_t>(v);
  }
}

// ---- the scan
template <int W, int VEC, int R>
struct PackedPolicy {
  static constexpr int kThreads = cuda::kThreads, kRows = R, kQueries = 2 * W, kLanes = 1;
  static constexpr bool kRowTerms = false;
  using Piece = Codes16;
  using Sum = uint32_t;
  struct RowSum {};
  const PqScan& a;
  const char* tables;
  const float2* terms;
  const rotated::Lane lane;

  __device__ __forceinline__ void fetch(uint32_t row, int piece, Piece& to) const {
    int m = a.m;
    opaque(m);  // addresses are made here: there are no registers to keep them in
    fetch_codes<VEC>(a.codes + static_cast<uint64_t>(row) * m, 16 * piece, m, to.v);
  }
  __device__ __forceinline__ void add(int piece, const Piece (&row)[kRows], Sum (&sum)[kRows][kQueries],
                                      RowSum (&)[kRows]) const {
    uint32_t v[kRows][4], pairs[kRows][W];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[r][i] = row[r].v[i];
#pragma unroll
      for (int w = 0; w < W; ++w) pairs[r][w] = 0;
      rotated::reorder<W>(lane, v[r]);
    }
    rotated::add_up<W, kRows>(lane, tables + rotated::unit_at<W, 256>(piece), v, pairs);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int w = 0; w < W; ++w) {
        sum[r][2 * w] += pairs[r][w] & 0xffffu;
        sum[r][2 * w + 1] += pairs[r][w] >> 16;
      }
  }
  __device__ __forceinline__ void close(Sum (&)[kRows][kQueries], RowSum (&)[kRows]) const {}
  __device__ __forceinline__ float score(uint32_t sum, const RowSum&, int w, uint32_t) const {
    return fmaf(terms[w].y, static_cast<float>(sum), terms[w].x);
  }
  __device__ __forceinline__ bool wanted(uint32_t) const { return true; }
};

template <int W, int VEC, int R>
__global__ void __launch_bounds__(kThreads, VEC == 16 ? blocks_of(W) : 1)
    packed_kernel(PqScan a, const float2* all_terms) {
  constexpr int Q = 2 * W;
  char* const tables = dynamic_shared<char>();
  const int sixteens = (a.m + 15) / 16;
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * Q;
  const int queries = static_cast<int>(a.nq - q0 < Q ? a.nq - q0 : Q);
  auto* const terms = reinterpret_cast<float2*>(tables + rotated::unit_bytes(W, 256, sixteens));
  Key* const keys = lists_of(a.keys, a.lists, q0);
  const int64_t pitch = a.lists.parts * a.lists.stride;
  Selector select;
  select.init(terms + Q, keys, pitch, Q, a.lists.capacity, a.lists.best);
  rotated::fill<W, 256, kThreads>(a.tables + static_cast<int64_t>(blockIdx.x) * sixteens * 4096 * W, sixteens, tables);
  if (threadIdx.x < Q) terms[threadIdx.x] = all_terms[q0 + threadIdx.x];
  __syncthreads();
  constexpr int64_t kTile = kThreads * PackedPolicy<W, VEC, R>::kRows;
  const int64_t begin = blockIdx.y * a.lists.tiles_per_part * kTile;
  const int64_t stop = begin + a.lists.tiles_per_part * kTile, end = stop < a.n ? stop : a.n;
  scan_codes(PackedPolicy<W, VEC, R>{a, tables, terms, rotated::lane_of<W>()}, select, static_cast<uint32_t>(begin),
             static_cast<uint32_t>(end), sixteens, queries);
  select.finish(keys, pitch, queries);
}

template <int W, int R>
void scan_of(const PqScan& s, const RotatedPlan& p, const float2* terms, const Launch& l) {
  const dim3 grid(grid_x(div_up(s.nq, 2 * W)), static_cast<unsigned>(p.lists.parts));
  auto kernel = packed_kernel<W, 1, R>;
  if (s.m % 16 == 0 && aligned(s.codes, 16))
    kernel = packed_kernel<W, 16, R>;
  else if (s.m % 4 == 0 && aligned(s.codes, 4))
    kernel = packed_kernel<W, 4, R>;
  launch("pq", kernel, grid, kThreads, p.shared, l, s, terms);
}

}  // namespace

RotatedPlan packed_plan(int64_t nq, int64_t n, int64_t k, int64_t m, int64_t ksub, int device) {
  RotatedPlan p;
  const int64_t kept = candidates_of(k);
  if (ksub != 256 || nq < 5 || kept > kMaxK || n < 1 || m > 256) return p;
  p.kept = static_cast<int>(kept < n ? kept : n);
  p.packed = true;
  const int sixteens = static_cast<int>(div_up(m, 16));
  const int64_t limit = shared_limit(device);
  for (const int words : {4, 2}) {
    const int64_t shared =
        rotated::unit_bytes(words, 256, sixteens) +
        static_cast<int64_t>(2 * words * sizeof(float2) + Selector::bytes(2 * words, p.kept, kThreads / 32));
    if (p.width || shared > limit) continue;
    p.width = 2 * words;
    p.shared = static_cast<size_t>(shared);
  }
  if (p.width == 0) return p;
  const int64_t at_once = limit / static_cast<int64_t>(p.shared + 1024);
  const int64_t most = blocks_of(p.width / 2);
  const int64_t slots = (at_once < 1 ? 1 : at_once > most ? most : at_once) * multiprocessors(device);
  p.lists = cut_lists(nq, p.width, n, p.kept, kThreads * rows_of(p.width / 2), slots, int64_t{1} << 60);
  return p;
}

void packed_tables(const float* tables, int width, int64_t nq, int m, bool l2, const RotatedPlan& p, float* image,
                   float2* terms, const Launch& l) {
  const Rounding r{tables, nq, width, m, (m + 15) / 16, p.width, l2 ? -1.0f : 1.0f, reinterpret_cast<uint16_t*>(image),
                   terms};
  launch("pq", round_kernel, grid_x(round_up(nq, p.width)), 256, static_cast<size_t>(m) * sizeof(float), l, r);
}

void packed_scan(const PqScan& s, const RotatedPlan& p, const float2* terms, const Launch& l) {
  p.width == 8 ? scan_of<4, rows_of(4)>(s, p, terms, l) : scan_of<2, rows_of(2)>(s, p, terms, l);
}

}  // namespace cuda
}  // namespace lutra
