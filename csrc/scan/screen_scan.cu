// The int8 screen's products: rows of codes from memory straight into fragments, queries from shared memory.
//
// A warp takes 32 rows at a time, two blocks of codes. Which row stands where in a fragment does not matter, so lane
// (g, t) reads 16 bytes, 4 columns of its 4 rows (block g / 4, rows 4 (g % 4) and on), and these are the words of two
// products' A: reading is in runs of 256 bytes and nothing passes through shared memory. Two steps of 32 columns are on
// their way while two are multiplied. All warps of a block have the same queries; blocks of other queries walk the same
// rows at the same time, so that they meet them in the L2.
//
// Then each of a lane's sums becomes a float, has inverse(x) * bar subtracted (with l2 or a bias, also half(x) /
// scale(q)), and its sign is shifted into a word: 3 or 4 instructions a score. Narrow rows' sums start at 1.5 * 2^23 as
// a float's bits, so that the sum is the float; wide ones are converted. Candidates wait in a list of the warp until
// some tens can take their places in memory together.
//
// Limits: reading the codes (8 queries), the 8-bit matrix rate of mma.sync (128).
#include "common/mma.cuh"
#include "scan/screen_cuda.h"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = kScreenWarps * 32, kWaiting = 64;
constexpr int kMagic = 0x4b400000;  // bits of 1.5 * 2^23
constexpr float kFarBar = 3e38f;    // no row with codes reaches it
constexpr float kNoBar = 3.2e38f;   // of queries that take no candidates: padding, no bound, a list that is full

template <int NT>
struct Shared {  // NT: tiles of 8 queries
  static constexpr int kQueries = 8 * NT;
  uint4* panel;  // [(NT + 1) / 2][steps][32]
  float* bars;   // [kQueries], the warp's own: a query whose list is full gets kNoBar
  float* per_scale;
  int4* start;  // [2][kQueries / 2]: two queries' twice, as the sums lie; and twice, so that no two sums are one value
  uint2* waiting;  // the warp's
  float* most;     // [kQueries][kBuckets], of a sample
  static __host__ __device__ int64_t bytes(int64_t d, bool sample) {
    return (NT + 1) / 2 * screen_pairs(d) * 1024 + kScreenWarps * kWaiting * 8 + (kScreenWarps + 5) * kQueries * 4 +
           (sample ? kQueries * kBuckets * 4 : 0);
  }
  __device__ __forceinline__ Shared(unsigned char* base, int64_t d) {
    const int warp = threadIdx.x >> 5;
    panel = reinterpret_cast<uint4*>(base);
    uint2* lists = reinterpret_cast<uint2*>(base + (NT + 1) / 2 * screen_pairs(d) * 1024);
    waiting = lists + warp * kWaiting;
    float* numbers = reinterpret_cast<float*>(lists + kScreenWarps * kWaiting);
    bars = numbers + warp * kQueries;
    per_scale = numbers + kScreenWarps * kQueries;
    start = reinterpret_cast<int4*>(per_scale + kQueries);
    most = per_scale + 5 * kQueries;
  }
};

// Gives the candidates that wait their places. Rows whose `half` is not finite, or that have no codes, pass whatever
// the bar: also for queries that take none, which are left out here. So a count ends near the capacity.
template <int NT>
__device__ __forceinline__ void flush(const Int8Scan& a, const Shared<NT>& s, int64_t q0, int waiting) {
  __syncwarp();
  for (int i0 = 0; i0 < waiting; i0 += 32) {
    const int i = i0 + (threadIdx.x & 31);
    uint2 w = make_uint2(0, 0);
    if (i < waiting) w = s.waiting[i];
    const bool wanted = i < waiting && s.bars[w.y] <= kFarBar;
    __syncwarp();  // all have read their bars
    if (wanted) {
      const int64_t query = q0 + w.y;
      const int place = atomicAdd(a.queries.counts + query, 1);
      if (place < a.capacity)
        a.candidates[query * a.capacity + place] = w.x;
      else
        s.bars[w.y] = kNoBar;
    }
    __syncwarp();
  }
}

template <int NT>
__global__ void __launch_bounds__(kThreads, NT == 16 ? 1 : 2) scan_kernel(const Int8Scan a) {
  constexpr int kQueries = 8 * NT, kWords = (NT + 3) / 4, kPanels = (NT + 1) / 2;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int steps = (a.d + 3) / 4, pairs = static_cast<int>(screen_pairs(a.d)), products = (steps + 7) / 8;
  const bool wide = a.d > kScreenNarrow;
  const Shared<NT> s(dynamic_shared<unsigned char>(), a.d);
  const int64_t q0 = static_cast<int64_t>(blockIdx.x) * kQueries;
  {
    // Panels hold 16 queries; blocks of 8 take theirs from the half that they need.
    const uint4* from = reinterpret_cast<const uint4*>(a.queries.panels) + q0 / 16 * pairs * 64;
    for (int i = threadIdx.x; i < kPanels * pairs * 64; i += kThreads) {
      uint4 v = from[i];
      if (NT == 1 && q0 % 16) v.x = v.z, v.y = v.w;
      s.panel[i] = v;
    }
    for (int i = lane; i < kQueries; i += 32) {
      const bool live = q0 + i < a.nq && !a.queries.broken[q0 + i];
      const float bar = from_ordered_bits(a.queries.bars[q0 + i]);
      s.bars[i] = live ? fminf(bar, kFarBar) : kNoBar;
    }
    for (int i = threadIdx.x; i < kQueries; i += kThreads) {
      s.per_scale[i] = a.queries.per_scale[q0 + i];
      const int first = i & ~1, v0 = a.queries.start[q0 + first] + (wide ? 0 : kMagic),
                v1 = a.queries.start[q0 + first + 1] + (wide ? 0 : kMagic);
      s.start[(i & 1) * (kQueries / 2) + i / 2] = make_int4(v0, v1, v0, v1);
    }
    if (a.sample)
      for (int i = threadIdx.x; i < kQueries * kBuckets; i += kThreads) s.most[i] = -__int_as_float(0x7f800000);
  }
  __syncthreads();

  // Fewer than 2^32 rows are 2^28 blocks and 2^27 tiles.
  const int blocks = static_cast<int>((a.n + 15) / 16);
  const int begin = static_cast<int>(blockIdx.y * a.tiles_per_part), stop = begin + static_cast<int>(a.tiles_per_part);
  const int end = stop < a.tiles ? stop : static_cast<int>(a.tiles);
  uint4 next[4];  // columns t and 4 + t (times 4) of two products
  const auto fetch = [&](int tile, int pair) {
    const int block = tile * a.tile_step * 2 + (g >> 2);
    const uint4* from =
        reinterpret_cast<const uint4*>(a.codes) + (static_cast<int64_t>(block) * steps + pair * 16 + t) * 4 + (g & 3);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      next[i] = make_uint4(0x80808080u, 0x80808080u, 0x80808080u, 0x80808080u);
      if (block < blocks && pair * 16 + 4 * i + t < steps) next[i] = from[16 * i];
    }
  };
  int waiting = 0;
  if (begin + warp < end) fetch(begin + warp, 0);
  for (int tile = begin + warp; tile < end; tile += kScreenWarps) {
    // The lane's 4 rows: sum[m][j][e] is of row 2 m + e / 2 and query 8 j + 2 t + e % 2.
    const int64_t row0 = static_cast<int64_t>(tile) * a.tile_step * kScreenTile + (g >> 2) * 16 + (g & 3) * 4;
    float4 inverse4 = make_float4(1, 1, 1, 1), half4 = make_float4(0, 0, 0, 0);
    unsigned valid = 0;  // bit r: row r may be found
    if (row0 < a.n) {
      inverse4 = *reinterpret_cast<const float4*>(a.inverse + row0);
      if (a.use_half) half4 = *reinterpret_cast<const float4*>(a.half + row0);
      valid = a.n - row0 < 4 ? (1u << (a.n - row0)) - 1 : 15u;
      if (a.keep) valid &= a.keep[row0 >> 3] >> (row0 & 4);
    }
    int sum[2][NT][4];
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int4 v = s.start[m * (kQueries / 2) + 4 * j + t];
        sum[m][j][0] = v.x, sum[m][j][1] = v.y, sum[m][j][2] = v.z, sum[m][j][3] = v.w;
      }
    }
#pragma unroll 1
    for (int pair = 0; pair < pairs; ++pair) {
      uint4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = next[i];
        x[i].x ^= 0x80808080u, x[i].y ^= 0x80808080u, x[i].z ^= 0x80808080u, x[i].w ^= 0x80808080u;
      }
      if (pair + 1 < pairs)
        fetch(tile, pair + 1);
      else if (tile + kScreenWarps < end)
        fetch(tile + kScreenWarps, 0);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (2 * pair + h >= products) break;
        const uint32_t upper[4] = {x[2 * h].x, x[2 * h].y, x[2 * h + 1].x, x[2 * h + 1].y};
        const uint32_t lower[4] = {x[2 * h].z, x[2 * h].w, x[2 * h + 1].z, x[2 * h + 1].w};
        const uint4* panel = s.panel + (2 * pair + h) * 32 + lane;
#pragma unroll
        for (int j = 0; j < kPanels; ++j) {
          const uint4 b = panel[j * pairs * 64];
          mma_s8(sum[0][2 * j], upper, b.x, b.y);
          mma_s8(sum[1][2 * j], lower, b.x, b.y);
          if (2 * j + 1 < NT) {
            mma_s8(sum[0][(2 * j + 1) % NT], upper, b.z, b.w);
            mma_s8(sum[1][(2 * j + 1) % NT], lower, b.z, b.w);
          }
        }
      }
    }

    const float inverse[4] = {inverse4.x, inverse4.y, inverse4.z, inverse4.w};
    float half[4] = {half4.x, half4.y, half4.z, half4.w};
#pragma unroll
    for (int r = 0; r < 4; ++r) half[r] = fmaf(fabsf(half[r]), -a.half_reach, half[r]);
    const auto as_float = [&](int v) {
      return wide ? static_cast<float>(v) : __int_as_float(v) - __int_as_float(kMagic);
    };
    if (a.sample) {
      float scale[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) scale[r] = inverse[r] > 1e-37f ? 1.0f / inverse[r] : 0.0f;
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int query = 8 * j + 2 * t + c;
          float* to = s.most + query * kBuckets + warp * 8 + g;
          float most = *to;
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const float v = fmaf(-half[r], s.per_scale[query], as_float(sum[r >> 1][j][2 * (r & 1) + c])) * scale[r];
            if ((valid >> r & 1) && scale[r] > 0) most = fmaxf(most, v);
          }
          *to = most;
        }
      continue;
    }
    unsigned failing[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) failing[w] = ~0u;
    const auto compare = [&](auto convert, auto shifted) {
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const float2 bar = *reinterpret_cast<const float2*>(s.bars + 8 * j + 2 * t);
        const float2 unit = *reinterpret_cast<const float2*>(s.per_scale + 8 * j + 2 * t);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int r = 2 * m + e / 2;
            float v = convert(sum[m][j][e]);
            if (shifted.value) v = fmaf(-half[r], e & 1 ? unit.y : unit.x, v);
            v = fmaf(-inverse[r], e & 1 ? bar.y : bar.x, v);
            failing[j / 4] = failing[j / 4] << 1 | static_cast<unsigned>(__float_as_int(v)) >> 31;
          }
      }
    };
    if (wide)
      compare([](int v) { return static_cast<float>(v); }, std::true_type());
    else if (a.use_half)
      compare([](int v) { return __int_as_float(v) - __int_as_float(kMagic); }, std::true_type());
    else
      compare([](int v) { return __int_as_float(v) - __int_as_float(kMagic); }, std::false_type());
    // A byte of a word is 2 bits, of two queries, for each row, the first row's on top.
    unsigned pattern = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r)
      if (valid >> r & 1) pattern |= 0x03030303u << (6 - 2 * r);
    unsigned any = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) any |= ~failing[w] & pattern;
    if (!__any_sync(kFullWarp, any != 0)) continue;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      constexpr int kTop = 8 * (NT < 4 ? NT : 4) - 1;  // the bit of the word's first score
      unsigned left = ~failing[w] & pattern;
      for (;;) {
        const unsigned votes = __ballot_sync(kFullWarp, left != 0);
        if (!votes) break;
        if (waiting + __popc(votes) > kWaiting) flush<NT>(a, s, q0, waiting), waiting = 0;
        if (left) {
          const int bit = 31 - __clz(static_cast<int>(left)), at = kTop - bit;
          left ^= 1u << bit;
          const int query = 32 * w + (at >> 3) * 8 + 2 * t + (at & 1);
          const int64_t row = row0 + (at >> 1 & 3);
          s.waiting[waiting + __popc(votes & ((1u << lane) - 1))] =
              make_uint2(static_cast<unsigned>(row), static_cast<unsigned>(query));
        }
        waiting += __popc(votes);
      }
    }
  }
  if (!a.sample) {
    if (waiting) flush<NT>(a, s, q0, waiting);
    return;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kQueries * kBuckets; i += kThreads)
    a.sample[(q0 + i / kBuckets) * a.sample_pitch + blockIdx.y * kBuckets + i % kBuckets] = s.most[i];
}

template <int NT>
void run(const Int8Scan& a, int64_t parts, const Launch& l) {
  const dim3 grid(grid_x(div_up(a.nq, 8 * NT)), static_cast<unsigned>(parts));
  launch("knn_screened", scan_kernel<NT>, grid, kThreads,
         static_cast<size_t>(Shared<NT>::bytes(a.d, a.sample != nullptr)), l, a);
}

}  // namespace

int screen_width(int64_t nq, int64_t d, bool sample, int device) {
  const int64_t room = shared_limit(device);
  if (nq > 64 && Shared<16>::bytes(d, sample) <= room) return 128;
  if (nq > 32 && Shared<8>::bytes(d, sample) <= room) return 64;
  if (nq > 8 && Shared<4>::bytes(d, sample) <= room) return 32;
  return Shared<1>::bytes(d, sample) <= room ? 8 : 0;
}

int screen_blocks(int width, int64_t d, int device) {
  const int64_t bytes = (width == 8    ? Shared<1>::bytes(d, false)
                         : width == 32 ? Shared<4>::bytes(d, false)
                         : width == 64 ? Shared<8>::bytes(d, false)
                                       : Shared<16>::bytes(d, false)) +
                        1024;
  const int64_t fit = shared_limit(device) / bytes;
  const int64_t most = width == 128 ? 1 : 2;
  return static_cast<int>(fit < 1 ? 1 : fit < most ? fit : most);
}

void screen_scan(const Int8Scan& a, int width, int64_t parts, const Launch& l) {
  if (width == 128) return run<16>(a, parts, l);
  if (width == 64) return run<8>(a, parts, l);
  if (width == 32) return run<4>(a, parts, l);
  run<1>(a, parts, l);
}

}  // namespace cuda
}  // namespace lutra
