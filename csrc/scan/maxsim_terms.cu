// MaxSim on tensor cores with the accuracy of fp32: every number is the sum of up to three bfloat16 terms of 8 bits,
// x = x0 + x1 + x2 exactly, and of the nine products of terms the six of at least 2^-16 of the largest are summed in
// fp32 (what is left out is below 2^-25 of |q||x|, half a rounding of a product in fp32). For float32 documents or
// queries, mixed types, and residual codes.
//
// Query tokens lie in shared memory as terms, in the layout of the A operand, each warp's own or one query's for all;
// rows come into the ring as they are in memory and are split when they are read. A centroid is copied into the ring in
// place of a row of floats, its code beside it; the norm is summed from the same registers. Where a value is infinite
// or overflows in bfloat16 its terms are NaN: pairs with a NaN score are done again by the plain kernel.
//
// Limits: a sixth of the rate of mma.sync, about 1.5 times that of fp32 multiply-adds; one query: bandwidth.
#include "scan/maxsim_stream.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kStages = 3;  // granules of a ring

enum class From : int { f32, f16, bf16, codes };

__device__ __forceinline__ void mma(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  const uint32_t words[4] = {a.x, a.y, a.z, a.w};
  mma_bf16(c, words, b0, b1);
}

// Two floats as pairs of bfloat16: the next term of each, which is taken away from them.
__device__ __forceinline__ uint32_t next_terms(float& low, float& high) {
  const uint32_t pair = bf16_pair(low, high);
  low -= __uint_as_float(pair << 16);
  high -= __uint_as_float(pair & 0xffff0000u);
  return pair;
}

__device__ __forceinline__ float query_value(const MaxsimArgs& a, int64_t at) {
  switch (a.q_type) {
    case DType::f16: return to_float(static_cast<const __half*>(a.q)[at]);
    case DType::bf16: return to_float(static_cast<const __nv_bfloat16*>(a.q)[at]);
    case DType::i8: return to_float(static_cast<const int8_t*>(a.q)[at]);
    default: return static_cast<const float*>(a.q)[at];
  }
}

template <From F>
struct Layout {
  static constexpr bool kWide = F == From::f32 || F == From::codes;  // rows of floats in the ring
  static constexpr int kSize = kWide ? 4 : 2;
  // The first of the four columns that a quad's thread t has in step s of 16.
  static __device__ __forceinline__ int column(int s, int t) {
    return kWide ? s * 16 + t * 4 : s / 2 * 32 + t * 8 + s % 2 * 4;
  }
  int steps, pitch, code_pitch, rows;  // pitch: bytes of a row in the ring, a multiple of 128
  __host__ __device__ Layout(const MaxsimArgs& a, int rows_) : rows(rows_) {
    steps = static_cast<int>((a.d + 31) / 32 * 2);
    pitch = steps * 16 * kSize;
    code_pitch = F == From::codes ? static_cast<int>((a.d * a.bits + 7) / 8 + 15) / 16 * 16 : 0;
  }
  __host__ __device__ size_t query_bytes() const { return static_cast<size_t>(steps) * 3 * 2 * 512; }
  __host__ __device__ size_t ring_bytes(int team) const {
    return static_cast<size_t>(kStages) * (static_cast<size_t>(rows) * (pitch + code_pitch) + sizeof(Granule)) +
           (static_cast<size_t>(team) * 4 + 15) / 16 * 16;
  }
  // Chunk c (16 bytes) of a row; two rows that follow one another lie in different halves of 128 bytes.
  __device__ __forceinline__ int place(int row, int c) const {
    return row * pitch + ((kWide || pitch % 128 == 0 ? c ^ (row & 1) << 2 : c) << 4);
  }
};

// The terms of a chunk's tokens, [step][half of the tokens][term][lane] x 16 bytes; every `by`-th step from s0 on.
template <From F>
__device__ void load_query(const MaxsimArgs& a, const Layout<F>& f, int64_t first, int64_t end, uint4* words, int s0,
                           int by) {
  const int lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
  for (int s = s0; s < f.steps; s += by)
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float v[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = first + 16 * m + 8 * half + g;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t k = Layout<F>::column(s, t) + i;
          v[half][i] = token < end && k < a.d ? query_value(a, token * a.ldq + k) : 0.0f;
        }
      }
#pragma unroll
      for (int term = 0; term < 3; ++term) {
        uint4 w;
        w.x = next_terms(v[0][0], v[0][1]);
        w.y = next_terms(v[1][0], v[1][1]);
        w.z = next_terms(v[0][2], v[0][3]);
        w.w = next_terms(v[1][2], v[1][3]);
        words[((s * 2 + m) * 3 + term) * 32 + lane] = w;
      }
    }
}

template <From F>
__global__ void __launch_bounds__(256, 1) maxsim_terms_kernel(const MaxsimArgs a, const MaxsimPlan p) {
  __shared__ float table[256];  // the values of codes
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
  if constexpr (F == From::codes) {
    for (int i = threadIdx.x; i < 1 << a.bits; i += blockDim.x) table[i] = a.values[i];
    __syncthreads();
  }
  const Layout<F> f(a, p.rows);
  uint4* const words = reinterpret_cast<uint4*>(dynamic_shared<char>() + (p.one_query ? 0 : warp * f.query_bytes()));
  if (p.one_query) {  // for all warps
    ChunkOfQuery q;
    q.init(a, p, 0, 0);
    load_query<F>(a, f, q.t0, q.t1, words, warp, p.warps);
    __syncthreads();
  }
  const int team = warp / p.team, member = warp % p.team;
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * (p.warps / p.team) + team;
  const int64_t group = mine % p.groups, stretch = mine / p.groups;
  if (stretch >= p.stretches) return;  // the whole team
  const int64_t first = stretch * p.per_stretch;
  const int64_t last = first + p.per_stretch < p.columns ? first + p.per_stretch : p.columns;
  const int rows = p.rows;
  char* const ring =
      dynamic_shared<char>() + (p.one_query ? 1 : p.warps) * f.query_bytes() + team * f.ring_bytes(p.team);
  Granule* const about = reinterpret_cast<Granule*>(ring + kStages * rows * f.pitch);
  char* const codes = reinterpret_cast<char*>(about + kStages);
  float* const part = reinterpret_cast<float*>(codes + kStages * rows * f.code_pitch);

  ChunkOfQuery q;
  q.init(a, p, group, member);
  const int passes = passes_of(a, p, group);
  const int64_t first_token = q.chunk(a, p, 0, member);
  if (!p.one_query) load_query<F>(a, f, first_token, q.t1, words, 0, 1);
  __syncwarp();

  Stream stream;
  stream.start(a, q.there ? q.query : 0, first, last, passes, rows);
  const int64_t code_bytes = (a.d * a.bits + 7) / 8;
  const char* x = static_cast<const char*>(a.x);
  uint8_t seen = 1;      // the mask's byte of this lane's row of the next granule,
  int32_t centroid = 0;  // and its centroid
  const auto look = [&] {
    if (stream.over() || lane >= stream.count()) return;
    if (a.x_mask) seen = a.x_mask[stream.row + lane];
    if constexpr (F == From::codes) centroid = a.centroid_ids[stream.row + lane];
  };
  look();
  const bool even = p.whole && a.d * Layout<F>::kSize == f.pitch;
  const int64_t pitch = a.ldx * Layout<F>::kSize;
  // 16 bytes of a row of memory to the ring.
  const auto put = [&](void* there, const char* from, int bytes, bool whole, int size) {
    if (whole)
      copy_part_16(there, from, bytes);
    else
      *static_cast<uint4*>(there) = load_part_16(from, bytes, size);
  };
  const auto fill = [&](int slot) {  // copies the next granule
    if (stream.over()) {
      if (member == 0 && lane == 0) about[slot].flags = kEnd;
      return;
    }
    const int count = stream.count(), chunks = f.pitch / 16;
    const bool good = centroid >= 0 && centroid < a.centroid_count;
    char* to = ring + slot * rows * f.pitch;
    if (F != From::codes && even && count == rows) {
      const char* from = x + (stream.row + member) * pitch + lane * 16;
#pragma unroll 4
      for (int r = member; r < rows; r += p.team, from += p.team * pitch)
        for (int c = lane; c < chunks; c += 32) copy_16(to + f.place(r, c), from + (c - lane) * 16);
    } else {
#pragma unroll 1
      for (int r = member; r < rows; r += p.team) {
        int64_t source = stream.row + r;
        bool there = r < count;
        if constexpr (F == From::codes) {
          source = __shfl_sync(kFullWarp, centroid, r);
          there = there && source >= 0 && source < a.centroid_count;
        }
        const char* from =
            F == From::codes ? reinterpret_cast<const char*>(a.centroids + source * a.d) : x + source * pitch;
        if (there && even) {
          for (int c = lane; c < chunks; c += 32) copy_16(to + f.place(r, c), from + c * 16);
          continue;
        }
        for (int c = lane; c < chunks; c += 32) {
          const int bytes = there ? bytes_left(a.d * Layout<F>::kSize, c * 16) : 0;
          put(to + f.place(r, c), bytes ? from + c * 16 : x, bytes, p.whole, Layout<F>::kSize);
        }
      }
    }
    if constexpr (F == From::codes) {
      char* beside = codes + slot * rows * f.code_pitch;
      const int each = f.code_pitch / 16;
      const bool whole = a.ldx % 16 == 0 && (reinterpret_cast<uintptr_t>(a.x) & 15) == 0;
      for (int i = member * 32 + lane; i < rows * each; i += p.team * 32) {
        const int r = i / each, c = i % each;
        const int bytes = r < count ? bytes_left(code_bytes, c * 16) : 0;
        put(beside + i * 16, bytes ? x + (stream.row + r) * a.ldx + c * 16 : x, bytes, whole, 1);
      }
    }
    if (member == 0) {
      const uint32_t live = __ballot_sync(kFullWarp, lane < count && seen);
      const uint32_t odd = F == From::codes ? __ballot_sync(kFullWarp, lane < count && seen && !good) : 0;
      if (lane == 0)
        about[slot] = Granule{stream.row, stream.column, stream.document, live, odd, stream.flags(), stream.pass};
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
    const Granule& now = about[slot];
    const int flags = now.flags;
    const uint64_t live = now.live;
    if (flags & kEnd) break;
    if (flags & kFirst) {
      best.clear();
      if (passes > 1) {
        __syncwarp();
        load_query<F>(a, f, q.chunk(a, p, now.pass, member), q.t1, words, 0, 1);
        __syncwarp();
      }
    }
    const char* granule = ring + slot * rows * f.pitch;
    for (int r0 = 0; r0 < rows; r0 += 16) {
      if (!(live >> r0)) break;
      float sum[2][2][4] = {};  // [half of the tokens][8 rows]
      float square[2] = {};
#pragma unroll 2
      for (int s = 0; s < f.steps; ++s) {
        uint32_t b[2][3][2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int r = r0 + n * 8 + g;
          float v[4];
          if constexpr (Layout<F>::kWide) {
            const float4 four = *reinterpret_cast<const float4*>(granule + f.place(r, s * 4 + t));
            v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
          } else {
            const uint2 four = *reinterpret_cast<const uint2*>(granule + f.place(r, s / 2 * 4 + t) + s % 2 * 8);
            if constexpr (F == From::bf16) {
              b[n][0][0] = four.x, b[n][0][1] = four.y;
            } else {
              const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&four.x));
              const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&four.y));
              v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
            }
          }
          if constexpr (F == From::codes) {
            const uint8_t* code = reinterpret_cast<const uint8_t*>(codes + (slot * rows + r) * f.code_pitch);
            const int k = s * 16 + t * 4, at = k * a.bits;  // four codes never cross four bytes
            uint32_t bits = 0;
            if (k < a.d) {
              if (a.bits == 8)
                bits = *reinterpret_cast<const uint32_t*>(code + k);
              else if (a.bits == 4)
                bits = *reinterpret_cast<const uint16_t*>(code + at / 8);
              else
                bits = code[at / 8] >> at % 8;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (k + i < a.d) {
                v[i] += table[bits >> i * a.bits & ((1 << a.bits) - 1)];
                square[n] += v[i] * v[i];
              }
          }
          if constexpr (F != From::bf16) {
#pragma unroll
            for (int term = 0; term < (F == From::f16 ? 2 : 3); ++term) {
              b[n][term][0] = next_terms(v[0], v[1]);
              b[n][term][1] = next_terms(v[2], v[3]);
            }
          }
        }
        // The smallest first; neighbouring products go to different sums.
        const auto products = [&](int of_query, int of_row) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const uint4 w = words[(s * 2 + m) * 96 + of_query * 32 + lane];
#pragma unroll
            for (int n = 0; n < 2; ++n) mma(sum[m][n], w, b[n][of_row][0], b[n][of_row][1]);
          }
        };
        products(2, 0);
        if constexpr (F != From::bf16) products(1, 1);
        if constexpr (Layout<F>::kWide) products(0, 2);
        products(1, 0);
        if constexpr (F != From::bf16) products(0, 1);
        products(0, 0);
      }
      float factor[2][2];  // of rows 2 t and 2 t + 1
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        factor[n][0] = factor[n][1] = 1;
        if constexpr (F == From::codes) {
          float inverse = 1;
          if (a.unit) {
            float s = square[n];
            s += __shfl_xor_sync(kFullWarp, s, 1);
            s += __shfl_xor_sync(kFullWarp, s, 2);
            inverse = s == 0 ? 0.0f : __fdiv_rn(1.0f, __fsqrt_rn(s));  // of row g
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            factor[n][e] = __shfl_sync(kFullWarp, inverse, (2 * t + e) * 4);
            if (now.odd >> (r0 + n * 8 + 2 * t + e) & 1) factor[n][e] = quiet_nan();
          }
        }
      }
      if (live == all && !a.argmax) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int h = 0; h < 4; ++h)
              best.best[h].value = max_or_nan(best.best[h].value, sum[h / 2][n][h % 2 * 2 + e] * factor[n][e]);
      } else {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int r = r0 + n * 8 + 2 * t + e;
            if (!(live >> r & 1)) continue;
#pragma unroll
            for (int h = 0; h < 4; ++h) {
              const float v = sum[h / 2][n][h % 2 * 2 + e] * factor[n][e];
              if (a.argmax)
                best.see(h, v, static_cast<int32_t>(now.row + r));
              else
                best.best[h].value = max_or_nan(best.best[h].value, v);
            }
          }
      }
    }
    if (flags & kLast) finish_document(a, p, q, &best, now, 1.0f, team, member, passes, part, &total);
  }
}

template <From F>
bool run(const MaxsimArgs& a, int64_t first, int64_t count, Key* keys, bool whole, const Launch& l) {
  for (int warps = 8; warps >= 1; warps /= 2) {
    MaxsimPlan p = maxsim_plan(a, warps, first, count, keys, l.device);
    p.whole = whole;
    if (p.rows > 32) p.rows = 32;
    p.one_query = count == 1 && a.q_rows <= kChunk;  // and one chunk
    const Layout<F> f(a, p.rows);
    const int teams = p.warps / p.team;
    const size_t shared = f.query_bytes() * (p.one_query ? 1 : p.warps) + f.ring_bytes(p.team) * teams;
    if (shared + 1024 > static_cast<size_t>(shared_limit(l.device))) continue;
    const int64_t blocks = div_up(p.groups * p.stretches, teams);
    launch("maxsim", maxsim_terms_kernel<F>, dim3(grid_x(blocks)), p.warps * 32, shared, l, a, p);
    maxsim_again(a, p, l);
    return true;
  }
  return false;
}

}  // namespace

bool maxsim_terms(const MaxsimArgs& a, int64_t first, int64_t count, Key* keys, const Launch& l) {
  const bool whole = aligned(a.x, 16);
  switch (a.x_type) {
    case DType::f32: return run<From::f32>(a, first, count, keys, whole && a.ldx % 4 == 0, l);
    case DType::f16: return run<From::f16>(a, first, count, keys, whole && a.ldx % 8 == 0, l);
    case DType::bf16: return run<From::bf16>(a, first, count, keys, whole && a.ldx % 8 == 0, l);
    case DType::u8: return run<From::codes>(a, first, count, keys, aligned(a.centroids, 16) && a.d % 4 == 0, l);
    default: return false;
  }
}

}  // namespace cuda
}  // namespace lutra
