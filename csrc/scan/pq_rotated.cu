// The fast pass of the PQ scan: approximate sums without bank conflicts, and the exact scores of what it keeps.
//
// Shared memory holds the tables with look-up j of each sixteen in banks of its own: entry c of all 16 lies in the
// 256 bytes from 256 c on. A lane takes the 16 codes of a row in an order of its own, at step s look-up s ^ lane
// (modulo 16, or modulo 8 where W = 4 queries share a read of 16 bytes), so that the lanes that are served together
// always read different banks; with W = 1 the half-warps have a copy each. The codes are brought into that order once
// a row, and one byte permutation makes an address of a code and the lane's place: a look-up costs three instructions.
//
// The order of a sum depends on the lane that makes it. So a few more than k rows are kept, scored again in the order
// of the contract, and it is tested that no other row can belong to the k best: its sum is not above the last one
// kept, and two sums of m numbers t differ by no more than 2 (m - 1) 2^-24 sum |t| (to first order), whatever
// their orders. What fails the test (many equal rows, infinite values) is scanned again by the plain kernel.
//
// Limits: reading the codes, for one query and m = 16; else shared memory, 32 look-ups a cycle and multiprocessor.
#include "scan/pq_plan.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kRegion = 65536;  // bytes of shared memory of one sixteen (W = 4) or two

__host__ __device__ constexpr int region_of(int width, int g) { return width == 4 ? g : g >> 1; }

// The bytes of a lane's places: byte b of word i belongs to step 4 i + b (modulo 8 where W = 4).
template <int W>
__device__ __forceinline__ uint32_t places(int i, int lane) {
  uint32_t word = 0;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const int s = 4 * i + b;
    const int at = W == 4 ? 16 * ((s & 7) ^ (lane & 7)) : 4 * W * (s ^ (lane & 15)) + (W == 1 ? (lane & 16) * 4 : 0);
    word |= static_cast<uint32_t>(at) << (8 * b);  // at most 127: __byte_perm spreads its sign, 0
  }
  return word;
}

// 16 codes in a lane's order: byte s becomes byte s ^ (lane modulo 16, or 8).
template <int W>
__device__ __forceinline__ void reorder(uint32_t (&v)[4], int lane, unsigned bytes) {
  if (W != 4) {
    const bool far = lane & 8;
    const uint32_t a = far ? v[2] : v[0], b = far ? v[3] : v[1], c = far ? v[0] : v[2], d = far ? v[1] : v[3];
    v[0] = a, v[1] = b, v[2] = c, v[3] = d;
  }
  const bool odd = lane & 4;
  const uint32_t a = odd ? v[1] : v[0], b = odd ? v[0] : v[1], c = odd ? v[3] : v[2], d = odd ? v[2] : v[3];
  v[0] = __byte_perm(a, 0, bytes), v[1] = __byte_perm(b, 0, bytes);
  v[2] = __byte_perm(c, 0, bytes), v[3] = __byte_perm(d, 0, bytes);
}

// Codes [at, at + 16) of a row of m, 0 beyond its end.
template <int VEC>
__device__ __forceinline__ void fetch(const uint8_t* row, int at, int m, uint32_t (&v)[4]) {
  if constexpr (VEC == 16) {
    const uint4 w = *reinterpret_cast<const uint4*>(row + at);
    v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = at + 4 * i;
      v[i] = 0;
      if (VEC == 4) {
        if (j < m) v[i] = *reinterpret_cast<const uint32_t*>(row + j);
      } else {
#pragma unroll
        for (int b = 0; b < 4; ++b)
          if (j + b < m) v[i] |= static_cast<uint32_t>(row[j + b]) << (8 * b);
      }
    }
  }
}

// acc += the look-ups of R rows in one sixteen.
template <int W, int R>
__device__ __forceinline__ void add_up(const char* look, int lane, const uint32_t (&place)[4], unsigned bytes,
                                       uint32_t (&v)[R][4], float (&acc)[R][W]) {
#pragma unroll
  for (int r = 0; r < R; ++r) reorder<W>(v[r], lane, bytes);
#pragma unroll
  for (int s = 0; s < 16; ++s) {
    const unsigned b = s & 3;
    // byte 0: the lane's place; byte 1: the code; bytes 2 and 3: the sign of the place, 0
    const unsigned pick = (4 + b) | b << 4 | (12 + b) << 8 | (12 + b) << 12;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const uint32_t at = __byte_perm(v[r][s >> 2], place[s >> 2], pick);
      const auto t = load_pack<float, W>(reinterpret_cast<const float*>(look + at + (W == 4 && s >= 8 ? 128 : 0)));
#pragma unroll
      for (int w = 0; w < W; ++w) acc[r][w] += t[w];
    }
  }
}

// W queries, VEC codes of a row a read, R rows of a thread at a time. ONE: there are 16 codes.
template <int W, int VEC, int R, int BLOCKS, bool ONE>
__global__ void __launch_bounds__(kThreads, BLOCKS) rotated_kernel(PqScan a) {
  char* shared = dynamic_shared<char>();
  const int lane = threadIdx.x & 31, sixteens = ONE ? 1 : (a.m + 15) / 16;
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * W;
  Key* const keys = a.keys + (q0 * a.lists.parts + blockIdx.y) * a.lists.stride;
  Selector select;
  char* const selection = shared + (region_of(W, sixteens - 1) + 1) * kRegion;
  select.init(selection, keys, a.lists.parts * a.lists.stride, W, a.lists.capacity, a.lists.best);
  {
    const float4* from =
        reinterpret_cast<const float4*>(a.tables) + blockIdx.x * static_cast<int64_t>(sixteens) * 1024 * W;
    for (int i = threadIdx.x; i < sixteens * 1024 * W; i += kThreads) {
      const int g = i / (1024 * W), c = i / (4 * W) & 255, f = i % (4 * W);
      char* to = shared + region_of(W, g) * kRegion + c * 256 + (W == 4 ? 0 : (g & 1) * 128) + f * 16;
      const float4 v = from[i];
      *reinterpret_cast<float4*>(to) = v;
      if (W == 1) *reinterpret_cast<float4*>(to + 64) = v;
    }
  }
  uint32_t place[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) place[i] = places<W>(i, lane);
  unsigned bytes = 0;  // byte b comes from byte b ^ (lane & 3)
#pragma unroll
  for (int b = 0; b < 4; ++b) bytes |= static_cast<unsigned>(b ^ (lane & 3)) << (4 * b);
  __syncthreads();

  constexpr int64_t kTile = kThreads * R;
  const int64_t begin = blockIdx.y * a.lists.tiles_per_part * kTile;
  const int64_t stop = begin + a.lists.tiles_per_part * kTile, end = stop < a.n ? stop : a.n;
  uint32_t next[R][4];
  const auto fetch_rows = [&](int64_t row0, int g) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = row0 + r * kThreads + threadIdx.x;
      fetch<VEC>(a.codes + (row < end ? row : end - 1) * a.m, g * 16, a.m, next[r]);
    }
  };
  // The loop ends, and starts again at the same rows, where a list is full: nothing but `todo`, the sums that found no
  // place, lives through the compaction.
  unsigned todo = ~0u;
  for (int64_t row0 = begin; row0 < end;) {
    fetch_rows(row0, 0);
    for (;;) {
      float acc[R][W];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int w = 0; w < W; ++w) acc[r][w] = 0;
      for (int g = 0; g < sixteens; ++g) {
        uint32_t v[R][4];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int i = 0; i < 4; ++i) v[r][i] = next[r][i];
        if (g + 1 < sixteens)  // the next codes are on their way while these are looked up
          fetch_rows(row0, g + 1);
        else if (row0 + kTile < end)
          fetch_rows(row0 + kTile, 0);
        add_up<W, R>(shared + region_of(W, g) * kRegion + (W == 4 ? 0 : (g & 1) * 128), lane, place, bytes, v, acc);
      }
      unsigned refused = 0;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const float bar = select.least_score[w];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float score = a.sign * acc[r][w];
          const int64_t row = row0 + r * kThreads + threadIdx.x;
          if (!(score < bar) && row < end && q0 + w < a.nq && (todo >> (r * W + w) & 1) &&
              !select.add(w, score, static_cast<uint32_t>(row)))
            refused |= 1u << (r * W + w);
        }
      }
      todo = refused;
      if (__syncthreads_or(refused != 0)) break;
      todo = ~0u;
      row0 += kTile;
      if (row0 >= end) break;
    }
    if (row0 < end) {
      select.compact(false);
      __syncthreads();
    }
  }
  select.finish(keys, a.lists.parts * a.lists.stride, a.nq - q0);
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
  for (int j = warp; !a.l2 && j < a.m; j += kSettleThreads / 32) {
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
    if (!a.l2) {
      size = 0;
      for (int w = 0; w < kSettleThreads / 32; ++w) size += sums[w];
    }
    const float error = (2.0f * a.m + 4.0f) * 1.1f * 5.9604645e-8f * size + 1e-37f;
    sure = (size < 1e38f || a.l2) && (worst != worst || worst > last + error);
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
  scan_as<W, 1, R, BLOCKS>(s, p, l);
}

constexpr int rows_of(int width) { return width == 4 ? 1 : 2; }

}  // namespace

RotatedPlan rotated_plan(int64_t nq, int64_t n, int64_t k, int64_t m, int device) {
  RotatedPlan p;
  // Candidates: in the short lists, those come free; else so many that nearly equal scores do not matter.
  const int64_t kept = k <= 10 ? kShortK : k + (k < 256 ? 32 : k / 8);
  if (kept > kMaxK || n < 1 || m > 256) return p;
  p.kept = static_cast<int>(kept < n ? kept : n);
  const int sixteens = static_cast<int>(div_up(m, 16));
  const int64_t limit = shared_limit(device);
  const auto shared_for = [&](int width) {
    return static_cast<int64_t>(region_of(width, sixteens - 1) + 1) * kRegion +
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
  const int64_t at_once = limit / (p.shared + 1024), most = p.width == 1 ? 3 : 2;
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
  if (p.width == 2) return scan_of<2, rows_of(2), 2>(s, p, l);
  scan_of<1, rows_of(1), 2>(s, p, l);
}

void settle(const PqSettle& s, int64_t nq, const Launch& l) {
  const int room = power_of_two(s.kept < 2 ? 2 : s.kept, kMaxK);
  launch("pq", settle_kernel, grid_x(nq), kSettleThreads, static_cast<size_t>(room) * sizeof(Key), l, s, room);
}

}  // namespace cuda
}  // namespace lutra
