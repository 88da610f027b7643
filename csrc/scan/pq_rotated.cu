// The fast pass of the PQ scan: approximate sums without bank conflicts, and the exact scores of what it keeps.
//
// The tables lie in shared memory as rotated.cuh has it, so that the order of a sum depends on the lane that makes it.
// So a few more than k rows are kept, scored again in the order of the contract, and it is tested that no other row can
// belong to the k best: its sum is not above the last one kept, and two sums of m numbers t differ by no more than
// 2 (m - 1) 2^-24 sum |t| (to first order), whatever their orders. What fails the test (many equal rows, infinite
// values) is scanned again by the plain kernel.
//
// Limits: reading the codes, for one query and m = 16; else shared memory, 32 look-ups a cycle and multiprocessor.
#include "scan/code_scan.cuh"
#include "scan/pq_plan.cuh"
#include "scan/rotated.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 512;

// W queries, VEC codes of a row a read, R rows of a thread at a time.
template <int W, int VEC, int R, bool ONE>
struct RotatedPolicy {
  static constexpr int kThreads = cuda::kThreads, kRows = R, kQueries = W, kLanes = 1;
  static constexpr bool kRowTerms = false;
  using Piece = Codes16;
  using Sum = float;
  struct RowSum {};
  const PqScan& a;
  const char* tables;
  const rotated::Lane lane;

  __device__ __forceinline__ void fetch(uint32_t row, int piece, Piece& to) const {
    const int m = ONE ? 16 : a.m;
    fetch_codes<VEC>(a.codes + static_cast<uint64_t>(row) * m, 16 * piece, m, to.v);
  }
  __device__ __forceinline__ void add(int piece, const Piece (&row)[R], Sum (&sum)[R][W], RowSum (&)[R]) const {
    uint32_t v[R][4];
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[r][i] = row[r].v[i];
      rotated::reorder<W>(lane, v[r]);
    }
    rotated::add_up<W, R>(lane, tables + rotated::unit_at<W, 256>(piece), v, sum);
  }
  __device__ __forceinline__ void close(Sum (&)[R][W], RowSum (&)[R]) const {}
  __device__ __forceinline__ float score(float sum, const RowSum&, int, uint32_t) const { return sum; }
  __device__ __forceinline__ bool wanted(uint32_t) const { return true; }
};

// ONE: there are 16 codes.
template <int W, int VEC, int R, int BLOCKS, bool ONE>
__global__ void __launch_bounds__(kThreads, BLOCKS) rotated_kernel(PqScan a) {
  char* const tables = dynamic_shared<char>();
  const int sixteens = ONE ? 1 : (a.m + 15) / 16;
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * W;
  const int queries = static_cast<int>(a.nq - q0 < W ? a.nq - q0 : W);
  Key* const keys = lists_of(a.keys, a.lists, q0);
  const int64_t pitch = a.lists.parts * a.lists.stride;
  Selector select;
  select.init(tables + rotated::unit_bytes(W, 256, sixteens), keys, pitch, W, a.lists.capacity, a.lists.best);
  rotated::fill<W, 256, kThreads>(a.tables + static_cast<int64_t>(blockIdx.x) * sixteens * 4096 * W, sixteens, tables);
  __syncthreads();
  constexpr int64_t kTile = kThreads * R;
  const int64_t begin = blockIdx.y * a.lists.tiles_per_part * kTile;
  const int64_t stop = begin + a.lists.tiles_per_part * kTile, end = stop < a.n ? stop : a.n;
  scan_codes(RotatedPolicy<W, VEC, R, ONE>{a, tables, rotated::lane_of<W>()}, select, static_cast<uint32_t>(begin),
             static_cast<uint32_t>(end), sixteens, queries);
  select.finish(keys, pitch, queries);
}

// ---- exact scores of the candidates, a block a query
constexpr int kSettleThreads = 256;

__global__ void __launch_bounds__(kSettleThreads) settle_kernel(PqSettle a, int room) {
  __shared__ float sums[kSettleThreads / 32];
  Key* keys = dynamic_shared<Key>();
  const int64_t query = blockIdx.x;
  const float* tables = a.tables + query / a.width * a.m * 256 * a.width + query % a.width;
  const float sign = a.l2 ? -1.0f : 1.0f;
  for (int i = threadIdx.x; i < room; i += kSettleThreads) {
    const int64_t id = i < a.kept ? a.ids[query * a.kept + i] : -1;
    Key key = 0;
    if (id >= 0 && id < a.n) {
      const uint8_t* row = a.codes + id * a.m;
      float sum = 0;
#pragma unroll 8
      for (int j = 0; j < a.m; ++j) sum += tables[(static_cast<int64_t>(j) * 256 + row[j]) * a.width];
      key = make_key(sign * sum, static_cast<uint32_t>(id));
    }
    keys[i] = key;
  }
  // The sum over the tables of their largest magnitudes; a NaN makes it NaN.
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  float largest_sum = 0;
  const bool sizes = !a.l2 || a.rounded;
  for (int j = warp; sizes && j < a.m; j += kSettleThreads / 32) {
    float largest = 0;
    for (int c = lane; c < a.ksub; c += 32) {
      const float t = fabsf(tables[(static_cast<int64_t>(j) * 256 + c) * a.width]);
      largest = t <= largest ? largest : t;
    }
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) {
      const float other = __shfl_xor_sync(kFullWarp, largest, s);
      largest = other <= largest || largest != largest ? largest : other;
    }
    largest_sum += largest;
  }
  if (lane == 0) sums[warp] = largest_sum;
  for (int span = 2; span <= room; span <<= 1) {
    for (int stride = span >> 1; stride > 0; stride >>= 1) {
      __syncthreads();
      for (int t = threadIdx.x; t < room / 2; t += kSettleThreads) {
        const int i = 2 * t - (t & (stride - 1));
        const Key x = keys[i], y = keys[i + stride];
        if ((x < y) == ((i & span) == 0)) keys[i] = y, keys[i + stride] = x;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < a.k; i += kSettleThreads) {
    const Key key = i < a.kept ? keys[i] : 0;
    const float infinity = __int_as_float(0x7f800000);
    a.scores[query * a.k + i] = key ? (a.l2 ? 0.0f - key_score(key) : key_score(key)) : sign * -infinity;
    a.out[query * a.k + i] = key ? key_id(key) : -1;
  }
  if (threadIdx.x > 0) return;
  bool sure = a.n <= a.kept;  // every row is a candidate
  if (!sure) {                // then k < kept
    const float worst = key_score(keys[a.k - 1]), last = sign * a.approx[query * a.kept + a.kept - 1];
    float size = fabsf(last);  // l2: the tables are not negative, so that a sum bounds its terms
    if (sizes) {
      size = 0;
      for (int w = 0; w < kSettleThreads / 32; ++w) size += sums[w];
    }
    float error = (2.0f * a.m + 12.0f) * 1.1f * 5.9604645e-8f * size + 1e-37f;
    if (a.rounded) error += 0.51f * a.m * a.rounded[query].y;
    sure = (size < 1e38f || !sizes) && (worst != worst || worst > last + error);
  }
  a.done[query] = sure;
}

template <int W, int VEC, int R, int BLOCKS>
void scan_as(const PqScan& s, const RotatedPlan& p, const Launch& l) {
  const dim3 grid(grid_x(div_up(s.nq, W)), static_cast<unsigned>(p.lists.parts));
  auto kernel = rotated_kernel<W, VEC, R, BLOCKS, false>;
  if constexpr (W == 1 && VEC == 16)
    if (s.m == 16) kernel = rotated_kernel<W, VEC, R, BLOCKS, true>;
  launch("pq", kernel, grid, kThreads, p.shared, l, s);
}

template <int W, int R, int BLOCKS>
void scan_of(const PqScan& s, const RotatedPlan& p, const Launch& l) {
  if (s.m % 16 == 0 && aligned(s.codes, 16)) return scan_as<W, 16, R, BLOCKS>(s, p, l);
  if (s.m % 4 == 0 && aligned(s.codes, 4)) return scan_as<W, 4, R, BLOCKS>(s, p, l);
  scan_as<W, 1, R, 1>(s, p, l);
}

constexpr int rows_of(int width) { return width == 4 ? 1 : 2; }

}  // namespace

RotatedPlan rotated_plan(int64_t nq, int64_t n, int64_t k, int64_t m, int device) {
  RotatedPlan p;
  const int64_t kept = candidates_of(k);
  if (kept > kMaxK || n < 1 || m > 256) return p;
  p.kept = static_cast<int>(kept < n ? kept : n);
  const int sixteens = static_cast<int>(div_up(m, 16));
  const int64_t limit = shared_limit(device);
  const auto shared_for = [&](int width) {
    return rotated::unit_bytes(width, 256, sixteens) +
           static_cast<int64_t>(Selector::bytes(width, p.kept, kThreads / 32));
  };
  for (const int width : {4, 2, 1})
    if (p.width == 0 && (width == 1 || nq >= (width == 4 ? 3 : 2)) && shared_for(width) <= limit) p.width = width;
  if (p.width == 0) return p;
  p.shared = static_cast<size_t>(shared_for(p.width));
  ListPlan& s = p.lists;
  s.best = p.kept;
  s.capacity = list_capacity(s.best);
  s.stride = s.best <= kShortK ? s.best : s.capacity;
  const int64_t at_once = limit / (p.shared + 1024), most = p.width == 2 ? 1 : 2;
  const int64_t slots = (at_once < 1 ? 1 : at_once > most ? most : at_once) * multiprocessors(device);
  const int64_t tiles = div_up(n, kThreads * rows_of(p.width));
  s.parts = parts_for(div_up(nq > 0 ? nq : 1, p.width), tiles, slots, 2);
  s.tiles_per_part = div_up(tiles, s.parts);
  s.parts = static_cast<int>(div_up(tiles, s.tiles_per_part));
  s.queries = nq;
  return p;
}

void rotated_scan(const PqScan& s, const RotatedPlan& p, const Launch& l) {
  if (p.width == 4) return scan_of<4, rows_of(4), 2>(s, p, l);
  if (p.width == 2) return scan_of<2, rows_of(2), 1>(s, p, l);
  scan_of<1, rows_of(1), 2>(s, p, l);
}

void settle(const PqSettle& s, int64_t nq, const Launch& l) {
  const int room = power_of_two(s.kept < 2 ? 2 : s.kept, kMaxK);
  launch("pq", settle_kernel, grid_x(nq), kSettleThreads, static_cast<size_t>(room) * sizeof(Key), l, s, room);
}

}  // namespace cuda
}  // namespace lutra
