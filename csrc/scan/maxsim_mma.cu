// MaxSim on tensor cores for types that they multiply as they are: bfloat16 by bfloat16, float16 by float16 (sums in
// fp32), int8 by int8, and int8 documents by queries of floats in two int8 digits on a unit of their token's largest
// value (16 bits, as the CPU does with VNNI; integers are exact).
//
// A thread loads 16 bytes of a row at once and gives words (0, 1) to one step of mma.sync and (2, 3) to the next: which
// columns meet in which step does not matter as long as both operands agree, so a quad's 64 bytes of a row are two
// steps whatever the type. Chunks of odd rows are exchanged within 128 bytes (c ^ 4), so that the 8 rows of a load lie
// in different banks. Query tokens: 32 x 128 two-byte values are 64 registers.
//
// Limits: one query: the documents' bytes over bandwidth; many: the rate of mma.sync, about two thirds of wgmma's.
#include "common/mma.cuh"
#include "scan/maxsim_stream.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kStages = 4;  // granules of a ring

struct OfBf16 {
  using Sum = float;
  static constexpr int kSize = 2;
  static __device__ __forceinline__ void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(c, a, b0, b1);
  }
};
struct OfF16 {
  using Sum = float;
  static constexpr int kSize = 2;
  static __device__ __forceinline__ void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_f16(c, a, b0, b1);
  }
};
struct OfI8 {
  using Sum = int;
  static constexpr int kSize = 1;
  static __device__ __forceinline__ void mma(int* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_s8(c, a, b0, b1);
  }
};

__device__ __forceinline__ float query_value(const MaxsimArgs& a, int64_t at) {
  switch (a.q_type) {
    case DType::f16: return to_float(static_cast<const __half*>(a.q)[at]);
    case DType::bf16: return to_float(static_cast<const __nv_bfloat16*>(a.q)[at]);
    default: return static_cast<const float*>(a.q)[at];
  }
}

// The A operand of a chunk: [digit][half of the 32 tokens][64 bytes of a row][step, word, token g or g + 8].
template <class Op, int G, int D>
struct Operand {
  uint32_t words[D][2][G][2][4];
  float unit[4];  // of tokens g + 8 h

  __device__ __forceinline__ void put(int digit, int h, int grp, uint4 v) {
    // Through moves that the compiler does not see into: it would keep the words as they were loaded, four of a row
    // side by side, and put them in the order of the fragments anew at each product.
    uint32_t (&w)[2][4] = words[digit][h / 2][grp];
    const int half = h % 2;
    w[0][half] = opaque_copy(v.x);
    w[0][2 + half] = opaque_copy(v.y);
    w[1][half] = opaque_copy(v.z);
    w[1][2 + half] = opaque_copy(v.w);
  }
  __device__ void load(const MaxsimArgs& a, int64_t first, int64_t end) {
    const int lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const int64_t token = first + g + 8 * h;
      unit[h] = 1;
      if constexpr (D == 1) {
        const char* row = static_cast<const char*>(a.q) + token * a.ldq * Op::kSize;
#pragma unroll
        for (int grp = 0; grp < G; ++grp) {
          const int at = 64 * grp + 16 * t;
          const int bytes = token < end ? bytes_left(a.d * Op::kSize, at) : 0;
          put(0, h, grp, load_part_16(row + at, bytes, Op::kSize));
        }
      } else {
        float largest = 0, odd = 0;
#pragma unroll 1
        for (int grp = 0; grp < G; ++grp)
#pragma unroll 4
          for (int i = 0; i < 16; ++i) {
            const int k = 64 * grp + 16 * t + i;
            const float v = token < end && k < a.d ? fabsf(query_value(a, token * a.ldq + k)) : 0.0f;
            largest = fmaxf(largest, v);
            odd += v * 0.0f;  // NaN for what is not finite
          }
#pragma unroll
        for (int s = 1; s < 4; s <<= 1) {
          largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, s));
          odd += __shfl_xor_sync(kFullWarp, odd, s);
        }
        // 32630: below the largest whose digits are signed bytes. NaN: the plain kernel does it again.
        if (largest > 0) unit[h] = __fdiv_rn(largest, 32630.0f);
        const float inverse = __fdiv_rn(1.0f, unit[h]);
        if (odd != odd || unit[h] < 1e-30f) unit[h] = quiet_nan();
#pragma unroll
        for (int grp = 0; grp < G; ++grp) {
          uint32_t high[4] = {}, low[4] = {};
#pragma unroll
          for (int w = 0; w < 4; ++w)
#pragma unroll 1
            for (int i = 0; i < 4; ++i) {
              const int k = 64 * grp + 16 * t + 4 * w + i;
              const float v = token < end && k < a.d && odd == odd ? query_value(a, token * a.ldq + k) : 0.0f;
              const int whole = __float2int_rn(v * inverse), least = static_cast<int8_t>(whole & 255);
              high[w] |= static_cast<uint32_t>((whole - least) / 256 & 255) << i * 8;
              low[w] |= static_cast<uint32_t>(least & 255) << i * 8;
            }
          put(0, h, grp, make_uint4(high[0], high[1], high[2], high[3]));
          put(D - 1, h, grp, make_uint4(low[0], low[1], low[2], low[3]));
        }
      }
    }
  }
};

template <class Op, int G>
struct Ring {  // of one team, in shared memory
  char* bytes;
  float* scale;    // (kStages, rows)
  Granule* about;  // (kStages)
  float* part;     // (warps of the team)
  static __host__ __device__ size_t size(int rows, int team) {
    return static_cast<size_t>(kStages) * (static_cast<size_t>(rows) * (G * 64 + 4) + sizeof(Granule)) +
           (static_cast<size_t>(team) * 4 + 15) / 16 * 16;
  }
  __device__ Ring(char* at, int rows) {
    bytes = at;
    about = reinterpret_cast<Granule*>(bytes + kStages * rows * G * 64);
    scale = reinterpret_cast<float*>(about + kStages);
    part = scale + kStages * rows;
  }
  // Where chunk c (16 bytes) of a row lies.
  static __device__ __forceinline__ int place(int row, int c) {
    return row * (G * 64) + (G % 2 == 0 ? c ^ (row & 1) << 2 : c) * 16;
  }
};

// N: rows that are multiplied at a time, over 8; a granule has them once at least.
template <class Op, int G, int D, int N>
__global__ void __launch_bounds__(256, 1) maxsim_mma_kernel(const MaxsimArgs a, const MaxsimPlan p) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
  const int team = warp / p.team, member = warp % p.team;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * (p.warps / p.team) + team;
  const int64_t group = place % p.groups, stretch = place / p.groups;
  if (stretch >= p.stretches) return;  // the whole team
  const int64_t first = stretch * p.per_stretch;
  const int64_t last = first + p.per_stretch < p.columns ? first + p.per_stretch : p.columns;
  const int rows = p.rows;
  Ring<Op, G> ring(dynamic_shared<char>() + team * Ring<Op, G>::size(rows, p.team), rows);

  ChunkOfQuery q;
  q.init(a, p, group, member);
  const int passes = passes_of(a, p, group);
  Operand<Op, G, D> query;
  query.load(a, q.chunk(a, p, 0, member), q.t1);

  Stream stream;
  stream.start(a, q.there ? q.query : 0, first, last, passes, rows);
  // What this thread copies of a granule: one chunk of every `step`-th row.
  constexpr int kChunks = G * 4;
  const int own_row = (member * 32 + lane) / kChunks, own_chunk = (member * 32 + lane) % kChunks;
  const int step = p.team * 32 / kChunks > 0 ? p.team * 32 / kChunks : 1;
  const int64_t row_bytes = a.d * Op::kSize, pitch = a.ldx * Op::kSize;
  const char* const own = static_cast<const char*>(a.x) + own_row * pitch + own_chunk * 16;
  const int own_bytes = bytes_left(row_bytes, own_chunk * 16);
  const bool even = p.whole && row_bytes == G * 64;
  uint8_t seen[2] = {1, 1};  // the mask's bytes of this lane's rows of the next granule, lane and lane + 32
  const auto look = [&] {
    if (!a.x_mask || member != 0 || stream.over()) return;
#pragma unroll
    for (int w = 0; w < 2; ++w)
      if (lane + 32 * w < stream.count()) seen[w] = a.x_mask[stream.row + lane + 32 * w];
  };
  look();
  const auto fill = [&](int slot) {  // copies the next granule
    if (stream.over()) {
      if (member == 0 && lane == 0) ring.about[slot].flags = kEnd;
      return;
    }
    const int count = stream.count();
    char* const to = ring.bytes + slot * rows * G * 64;
    const char* from = own + stream.row * pitch;
    if (even && count == rows) {
#pragma unroll 4
      for (int r = own_row; r < rows; r += step, from += step * pitch)
        copy_16(to + Ring<Op, G>::place(r, own_chunk), from);
    } else {
#pragma unroll 1
      for (int r = own_row; r < rows; r += step, from += step * pitch) {
        void* there = to + Ring<Op, G>::place(r, own_chunk);
        const int bytes = r < count ? own_bytes : 0;
        if (p.whole)
          copy_part_16(there, bytes ? from : static_cast<const char*>(a.x), bytes);
        else
          *static_cast<uint4*>(there) = load_part_16(bytes ? from : static_cast<const char*>(a.x), bytes, Op::kSize);
      }
    }
    if (member == 0) {
      if (a.x_scale)
        for (int r = lane; r < count; r += 32)
          copy_async_4(ring.scale + slot * rows + r, a.x_scale + stream.row + r, true);
      uint64_t live = __ballot_sync(kFullWarp, lane < count && seen[0]);
      if (rows > 32) live |= static_cast<uint64_t>(__ballot_sync(kFullWarp, lane + 32 < count && seen[1])) << 32;
      if (lane == 0)
        ring.about[slot] = Granule{stream.row, stream.column, stream.document, live, 0, stream.flags(), stream.pass};
    }
    stream.advance(a);
    look();
  };
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) {
    fill(s);
    copy_commit();
  }

  Maxima best;
  float total = 0;
  const uint64_t all = all_rows(rows);
  for (int slot = 0;; slot = slot + 1 == kStages ? 0 : slot + 1) {
    copy_wait<kStages - 2>();
    team_sync(team, p.team);
    fill(slot == 0 ? kStages - 1 : slot - 1);
    copy_commit();
    const Granule& now = ring.about[slot];
    const int flags = now.flags;
    const uint64_t live = now.live;
    if (flags & kEnd) break;
    if (flags & kFirst) {
      best.clear();
      if (passes > 1) query.load(a, q.chunk(a, p, now.pass, member), q.t1);
    }
    const char* granule = ring.bytes + slot * rows * G * 64;
    for (int r0 = 0; r0 < rows; r0 += 8 * N) {
      if (!(live >> r0)) break;
      typename Op::Sum sum[D][2][N][4] = {};  // [digit][half of the tokens][8 rows]
#pragma unroll
      for (int grp = 0; grp < G; ++grp) {
        uint4 b[N];
#pragma unroll
        for (int n = 0; n < N; ++n)
          b[n] = *reinterpret_cast<const uint4*>(granule + Ring<Op, G>::place(r0 + n * 8 + g, grp * 4 + t));
#pragma unroll
        for (int i = 0; i < D; ++i)  // neighbouring products go to different sums
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int m = 0; m < 2; ++m) Op::mma(sum[i][m][n], query.words[i][m][grp][0], b[n].x, b[n].y);
#pragma unroll
        for (int i = 0; i < D; ++i)
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int m = 0; m < 2; ++m) Op::mma(sum[i][m][n], query.words[i][m][grp][1], b[n].z, b[n].w);
      }
      const auto value = [&](int h, int n, int e) {
        if constexpr (D == 2)
          return static_cast<float>(sum[0][h / 2][n][h % 2 * 2 + e] * 256 + sum[1][h / 2][n][h % 2 * 2 + e]);
        else
          return static_cast<float>(sum[0][h / 2][n][h % 2 * 2 + e]);
      };
      const float* scale = ring.scale + slot * rows + r0 + 2 * t;
      if (live == all && !a.argmax) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const float2 factor = a.x_scale ? *reinterpret_cast<const float2*>(scale + n * 8) : make_float2(1.0f, 1.0f);
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            best.best[h].value = max_or_nan(best.best[h].value, value(h, n, 0) * factor.x);
            best.best[h].value = max_or_nan(best.best[h].value, value(h, n, 1) * factor.y);
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int r = r0 + n * 8 + 2 * t + e;
            if (!(live >> r & 1)) continue;
            const float factor = a.x_scale ? scale[n * 8 + e] : 1.0f;
#pragma unroll
            for (int h = 0; h < 4; ++h) {
              const float v = value(h, n, e) * factor;
              if (a.argmax)
                best.see(h, v, static_cast<int32_t>(now.row + r));
              else
                best.best[h].value = max_or_nan(best.best[h].value, v);
            }
          }
      }
    }
    if (flags & kLast) {
      const float unit = t == 0 ? query.unit[0] : t == 1 ? query.unit[1] : t == 2 ? query.unit[2] : query.unit[3];
      finish_document(a, p, q, &best, now, unit, team, member, passes, ring.part, &total);
    }
  }
}

template <class Op, int G, int D, bool Wide>
bool run(const MaxsimArgs& a, int64_t first, int64_t count, Key* keys, const Launch& l) {
  for (int warps = 8; warps >= 2; warps /= 2) {
    MaxsimPlan p = maxsim_plan(a, warps, first, count, keys, l.device);
    p.whole = aligned(a.x, 16) && a.ldx * Op::kSize % 16 == 0;
    const int teams = p.warps / p.team;
    const size_t shared = Ring<Op, G>::size(p.rows, p.team) * static_cast<size_t>(teams);
    if (shared > static_cast<size_t>(shared_limit(l.device))) continue;
    const int64_t blocks = div_up(p.groups * p.stretches, teams);
    auto kernel = maxsim_mma_kernel<Op, G, D, 2>;
    if constexpr (Wide)
      if (p.rows >= 32) kernel = maxsim_mma_kernel<Op, G, D, 4>;
    launch("maxsim", kernel, dim3(grid_x(blocks)), p.warps * 32, shared, l, a, p);
    if (D == 2) maxsim_again(a, p, l);
    return true;
  }
  return false;
}

template <class Op, int D>
bool by_width(const MaxsimArgs& a, int64_t first, int64_t count, Key* keys, const Launch& l) {
  const int64_t groups = div_up(a.d * Op::kSize, 64);
  if (groups <= 1) return run<Op, 1, D, Op::kSize == 1>(a, first, count, keys, l);
  if (groups <= 2) return run<Op, 2, D, true>(a, first, count, keys, l);
  if constexpr (D == 1) {
    if (groups <= 4) return run<Op, 4, D, Op::kSize == 2>(a, first, count, keys, l);
    if constexpr (Op::kSize == 2)
      if (groups <= 8) return run<Op, 8, D, false>(a, first, count, keys, l);
  }
  return false;
}

}  // namespace

bool maxsim_mma(const MaxsimArgs& a, int64_t first, int64_t count, Key* keys, const Launch& l) {
  if (a.x_type == DType::bf16 && a.q_type == DType::bf16) return by_width<OfBf16, 1>(a, first, count, keys, l);
  if (a.x_type == DType::f16 && a.q_type == DType::f16) return by_width<OfF16, 1>(a, first, count, keys, l);
  if (a.x_type == DType::i8 && a.q_type == DType::i8) return by_width<OfI8, 1>(a, first, count, keys, l);
  if (a.x_type == DType::i8) return by_width<OfI8, 2>(a, first, count, keys, l);
  return false;
}

}  // namespace cuda
}  // namespace lutra
