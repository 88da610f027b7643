// Products of queries with all rows of a packed table on CUDA, written out or selected; see packed_logits.h.
//
// Codes are multiplied as they are, by tensor cores: integers of 8, 4 or 2 bits (counted from the code nearest to the
// value 0, so that nothing large cancels), 8-bit floats are f16 values exactly, levels of nf4 are two of them. A token
// is multiplied by a power of two that makes its largest value some 2^14 and is the sum of two f16 terms, which hold 23
// bits; values of f16 or bf16 are one term. Sums are fp32, of 256 bytes of codes in the tensor cores (which do not
// round to nearest), then in registers, where scale and minimum of a group come in: <h, row> = scale <h, code - zero> +
// (minimum + scale zero) sum(h).
//
// A warp takes 16 rows; 256 bytes of each at a time come to shared memory (cp.async, 16 bytes a copy, wherever rows
// begin), and each thread reads 4 bytes of a row as its part of a matrix of 16 x 16 codes. Which columns these are does
// not matter as long as the tokens are laid out alike (`column_of`): they are, in the order in which threads read them,
// so that they come from the L1 cache, which the codes do not pass through.
//
// Limits: few tokens: reading the packed rows once, or for 2 bits and nf4 the instructions that decode.
// Tokens are taken 32 at a time, by blocks side by side, whose rows come from the L2 cache.
// k > 0: scores are written and selected by radix (any_k.cuh). Fewer than 2^32 - 1 rows; offsets are 64-bit.
#include "scan/packed_logits.h"

#include "common/mma.cuh"
#include "gather/packed_rows.cuh"
#include "scan/any_k.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kChunk = 256, kPitch = kChunk + 16;  // bytes of a row in shared memory, and from row to row
constexpr int kTileRows = 16;

__host__ __device__ constexpr bool natural_order(Packed k) { return !packed_affine(k); }

// How the codes of a row are cut: units, of which a thread reads up to 4 bytes, steps of 16 columns in a unit. A group
// ends with a unit: where one does not end with 16 bytes, units are single steps.
template <Packed K, bool WIDE>
struct Cut {
  static constexpr int bits = packed_bits(K);
  static constexpr int unit = WIDE ? 16 : 2 * bits, steps = WIDE ? 8 / bits : 1, own = unit / 4;
  static constexpr int columns = 16 * steps;  // of a unit

  // Column i (0 to 3) of what the thread t of four multiplies in a step.
  __host__ __device__ static constexpr int64_t column_of(int64_t step, int t, int i) {
    const int s = static_cast<int>(step % steps), each = 4 * steps;
    const int at = natural_order(K) ? 4 * s + i : 2 * s + (i >> 1) + (i & 1) * (each / 2);
    return step / steps * columns + t * each + at;
  }
};

struct LogitsScan {
  PackedTable table;
  const uint2* image;  // [tokens / 8][steps][32][TERMS]
  const float* sums;   // [groups][padded]
  const float* units;  // [padded]
  const float* bias;
  void* out;
  uint32_t* all;  // instead of out: ordered_bits()
  DType dtype;
  int64_t tokens, padded, ldo, steps, groups, code_bytes;
  int token_groups, stages, align;
};

// ---- tokens in the order of threads: a block a token

__device__ __forceinline__ double block_sum(double v, double* shared) {
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) v += __shfl_xor_sync(kFullWarp, v, s);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x >> 5); ++w) sum += shared[w];
  return sum;
}

template <Packed K, bool WIDE, int TERMS>
__global__ void __launch_bounds__(256)
    image_kernel(const float* hidden, LogitsScan a, uint2* image, float* sums, float* units) {
  __shared__ double parts[8];
  __shared__ float most_of[8];
  const int64_t token = blockIdx.x, dim = a.table.dim, group = a.table.group;
  const float* h = hidden + token * dim;
  const bool real = token < a.tokens;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  float most = 0;
  for (int64_t c = threadIdx.x; real && c < dim; c += 256) {
    const float size = fabsf(h[c]);
    if (size < __int_as_float(0x7f800000)) most = fmaxf(most, size);
  }
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, s));
  if (lane == 0) most_of[warp] = most;
  __syncthreads();
  for (int w = 0; w < 8; ++w) most = fmaxf(most, most_of[w]);
  // 2^(14 - exponent of the largest), whose inverse is a normal number too
  int power = most > 0 ? 268 - static_cast<int>(__float_as_uint(most) >> 23) : 127;
  power = power > 253 ? 253 : power;
  const float factor = __uint_as_float(static_cast<uint32_t>(power) << 23);
  if (threadIdx.x == 0) units[token] = __uint_as_float(static_cast<uint32_t>(254 - power) << 23);

  if (packed_affine(K)) {
    if (a.groups == 1) {
      double sum = 0;
      for (int64_t c = threadIdx.x; real && c < dim; c += 256) sum += static_cast<double>(h[c]);
      sum = block_sum(sum, parts);
      if (threadIdx.x == 0) sums[token] = static_cast<float>(sum * factor);
    } else {
      for (int64_t g = warp; g < a.groups; g += 8) {
        const int64_t end = (g + 1) * group < dim ? (g + 1) * group : dim;
        double sum = 0;
        for (int64_t c = g * group + lane; real && c < end; c += 32) sum += static_cast<double>(h[c]);
#pragma unroll
        for (int s = 16; s > 0; s >>= 1) sum += __shfl_xor_sync(kFullWarp, sum, s);
        if (lane == 0) sums[g * a.padded + token] = static_cast<float>(sum * factor);
      }
    }
  }

  uint2* to = image + (token >> 3) * a.steps * 32 * TERMS;
  for (int64_t i = threadIdx.x; i < a.steps * 4; i += 256) {
    const int64_t step = i >> 2;
    const int t = static_cast<int>(i & 3);
    __half high[4], low[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t c = Cut<K, WIDE>::column_of(step, t, e);
      const float v = real && c < dim ? h[c] * factor : 0.0f;
      high[e] = __float2half_rn(v);
      low[e] = __float2half_rn(v - __half2float(high[e]));
    }
    const int64_t at = (step * 32 + (token & 7) * 4 + t) * TERMS;
    uint2 word;
    memcpy(&word, high, 8);
    to[at] = word;
    if (TERMS == 2) {
      memcpy(&word, low, 8);
      to[at + 1] = word;
    }
  }
}

// ---- codes as f16

__device__ __forceinline__ uint32_t subtract_halves(uint32_t a, uint32_t b) {
  const __half2 d = __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// The codes of a thread in step s of a unit: columns 0, 1 of column_of() in a[0], 2 and 3 in a[1]. Integers: less
// `zero`, which is twice in f16, 1024 larger. nf4: `low` receives what f16 does not hold of the levels.
template <Packed K, bool WIDE>
__device__ __forceinline__ void decode(uint32_t word, int s, uint32_t zero, const uint32_t* levels, uint32_t (&a)[2],
                                       uint32_t (&low)[2]) {
  constexpr int bits = packed_bits(K);
  if constexpr (packed_affine(K)) {
    // 1024 + code in f16 has the code in its lowest bits
    constexpr uint32_t base = 0x64006400u, one = (1u << bits) - 1, mask = one | one << 16;
    if constexpr (!WIDE) {  // four codes: the last two go to the upper half
      word &= (1u << (4 * bits)) - 1;
      word |= word << (16 - 2 * bits);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t codes;
      if constexpr (K == Packed::int8) {
        codes = __byte_perm(word, base >> 8 & 255, i == 0 ? 0x4240 : 0x4341);
      } else {
        codes = (word >> (bits * (2 * s + i)) & mask) | base;
      }
      a[i] = subtract_halves(codes, zero);
    }
  } else if constexpr (K == Packed::nf4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t x = levels[word >> (16 * s + 8 * i) & 15], y = levels[word >> (16 * s + 8 * i + 4) & 15];
      a[i] = __byte_perm(x, y, 0x5410);
      low[i] = __byte_perm(x, y, 0x7632);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t h = __byte_perm(word, 0, i == 0 ? 0x1404 : 0x3424);  // upper halves of f16
      if constexpr (K == Packed::e4m3) {                            // see packed_rows.cuh: 256 times too small
        const uint32_t nan = ((h & 0x7f007f00u) + 0x01000100u) & 0x80008000u;
        h = (h & 0x80008000u) | (h >> 1 & 0x3f803f80u) | (nan - (nan >> 6));
      }
      a[i] = h;
    }
  }
}

struct ScaleOf {
  float scale, rest;  // of a code, and of the zero
  uint32_t zero;
};
template <Packed K>
__device__ __forceinline__ ScaleOf scale_of(const PackedRaw& raw) {
  const PackedSource<K, false> source{};
  const float scale = source.scale(raw);
  if (!packed_affine(K)) return {scale, 0.0f, 0};
  const float minimum = source.minimum(raw), most = static_cast<float>((1 << packed_bits(K)) - 1);
  const float zero = fminf(fmaxf(rintf(-minimum / scale), 0.0f), most);  // of a NaN 0
  const uint32_t half = 0x6400u + static_cast<uint32_t>(zero);
  return {scale, fmaf(scale, zero, minimum), half | half << 16};
}

// ---- the scan

template <int TILES>
constexpr int warps_of() {
  return TILES == 1 ? 16 : 8;
}

template <Packed K, bool WIDE, int TERMS, int TILES>
__global__ void __launch_bounds__(32 * warps_of<TILES>(), 1) logits_kernel(LogitsScan a) {
  using C = Cut<K, WIDE>;
  constexpr int kWarps = warps_of<TILES>(), kStage = kTileRows * kPitch;
  constexpr bool two_levels = K == Packed::nf4;
  __shared__ uint32_t levels[16];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  if (two_levels) {
    if (threadIdx.x < 16) {
      const float level = kNf4Levels[threadIdx.x];
      const __half high = __float2half_rn(level), low = __float2half_rn(level - __half2float(high));
      levels[threadIdx.x] = static_cast<uint32_t>(__half_as_ushort(low)) << 16 | __half_as_ushort(high);
    }
    __syncthreads();
  }
  unsigned char* const stages = dynamic_shared<unsigned char>() + warp * a.stages * kStage;
  const PackedTable& p = a.table;
  const int64_t first = static_cast<int64_t>(blockIdx.x % a.token_groups) * 8 * TILES;  // token
  const int64_t tiles = (p.rows + kTileRows - 1) / kTileRows;
  const int64_t slot = blockIdx.x / a.token_groups, stride = static_cast<int64_t>(gridDim.x / a.token_groups) * kWarps;
  const int chunks = static_cast<int>((a.code_bytes + kChunk - 1) / kChunk);
  const uintptr_t data = reinterpret_cast<uintptr_t>(p.data), data_end = data + p.rows * p.row_bytes;

  int64_t load_tile = slot * kWarps + warp;
  int load_chunk = 0, load_stage = 0;
  const auto start = [&] {
    if (load_tile < tiles) {
      unsigned char* to = stages + load_stage * kStage;
      const int64_t left = a.code_bytes - static_cast<int64_t>(load_chunk) * kChunk;
      const int pieces = static_cast<int>(left < kChunk ? (left + 15) / 16 : kChunk / 16) + 1;
      const auto copy = [&](int row, int piece) {
        const int64_t id = load_tile * kTileRows + row;
        const uintptr_t from =
            ((data + id * p.row_bytes + static_cast<int64_t>(load_chunk) * kChunk) & ~static_cast<uintptr_t>(15)) +
            16 * piece;
        const bool here = id < p.rows && piece < pieces && from < data_end;
        const int64_t rest = static_cast<int64_t>(data_end - from);
        copy_part_16(to + row * kPitch + piece * 16,
                     reinterpret_cast<const void*>(here ? from : data & ~static_cast<uintptr_t>(15)),
                     !here       ? 0
                     : rest < 16 ? static_cast<int>(rest)
                                 : 16);
      };
#pragma unroll
      for (int i = 0; i < kTileRows / 2; ++i) copy(2 * i + (lane >> 4), lane & 15);
      if (lane < kTileRows) copy(lane, 16);
      if (++load_chunk == chunks) load_chunk = 0, load_tile += stride;
      load_stage = load_stage == a.stages - 1 ? 0 : load_stage + 1;
    }
    copy_commit();
  };
  for (int s = 0; s < a.stages - 1; ++s) start();

  const uint2* const image = a.image + first / 8 * a.steps * 32 * TERMS + lane * TERMS;
  const int64_t tile_pitch = a.steps * 32 * TERMS;
  const bool grouped = a.groups > 1;
  const int units_of_group = grouped ? static_cast<int>(p.group / C::columns) : 0;
  PackedRaw tail[2];
  const auto load_tail = [&](int64_t tile, int64_t group) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t id = tile * kTileRows + g + 8 * r, row = id < p.rows ? id : p.rows - 1;
      load_bytes<packed_tail_bytes(K)>(p.data + row * p.row_bytes + a.code_bytes + group * packed_tail_bytes(K),
                                       a.align, tail[r].tail);
    }
  };
  load_tail(slot * kWarps + warp, 0);
  int stage = 0;
  for (int64_t tile = slot * kWarps + warp; tile < tiles; tile += stride) {
    const int64_t ids[2] = {tile * kTileRows + g, tile * kTileRows + g + 8};  // this thread's rows
    // The scales of this group, and what was loaded of the next one's: of this tile, or of the next tile.
    ScaleOf of[2] = {scale_of<K>(tail[0]), scale_of<K>(tail[1])};
    load_tail(a.groups > 1 ? tile : tile + stride, a.groups > 1 ? 1 : 0);

    float total[TILES][4] = {}, sum[TILES][TERMS][4] = {};
    int units_left = units_of_group;
    int64_t group = 0;
    // What has been summed goes into the total, with the scale and the rest of its group.
    const auto close = [&](const float (&from)[TILES][4]) {
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        float2 sums = {0, 0};
        if (packed_affine(K))
          sums = *reinterpret_cast<const float2*>(a.sums + group * a.padded + first + 8 * n + 2 * t);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float v = of[e >> 1].scale * from[n][e] + of[e >> 1].rest * (e & 1 ? sums.y : sums.x);
          total[n][e] = grouped ? total[n][e] + v : v;
        }
      }
    };
    const auto take = [&](float (&to)[TILES][4]) {
#pragma unroll
      for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          to[n][e] = TERMS == 2 ? sum[n][0][e] + sum[n][TERMS - 1][e] : sum[n][0][e];
#pragma unroll
          for (int m = 0; m < TERMS; ++m) sum[n][m][e] = 0;
        }
    };

    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (a.stages == 2)
        copy_wait<0>();
      else if (a.stages == 3)
        copy_wait<1>();
      else
        copy_wait<2>();
      __syncwarp();
      start();
      const uint32_t* words[2];  // of this thread's part of its rows, which begins `bits` into the first
      int bits[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = static_cast<int>((data + (tile * kTileRows + g + 8 * r) * p.row_bytes) & 15) + t * C::own;
        words[r] = reinterpret_cast<const uint32_t*>(stages + stage * kStage + (g + 8 * r) * kPitch + (at & ~3));
        bits[r] = 8 * (at & 3);
      }
      const int64_t rest = a.code_bytes - static_cast<int64_t>(chunk) * kChunk;
      const int left = rest < kChunk ? static_cast<int>(rest) : kChunk, units = (left + C::unit - 1) / C::unit;
      const uint2* from = image + static_cast<int64_t>(chunk) * (kChunk / C::unit) * C::steps * 32 * TERMS;
      const auto product = [&](int u) {
        uint32_t word[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t* at = words[r] + u * (C::unit / 4);
          word[r] = __funnelshift_r(at[0], at[1], bits[r]);
          if (K == Packed::e4m3 || K == Packed::e5m2) {  // what lies behind the codes could be no number
            const int codes = left - u * C::unit - t * C::own;
            if (codes < 4) word[r] = codes <= 0 ? 0 : word[r] & (0xffffffffu >> (32 - 8 * codes));
          }
        }
#pragma unroll
        for (int s = 0; s < C::steps; ++s) {
          uint32_t codes[2][2], low[2][2];
#pragma unroll
          for (int r = 0; r < 2; ++r) decode<K, WIDE>(word[r], s, of[r].zero, levels, codes[r], low[r]);
          const uint32_t x[4] = {codes[0][0], codes[1][0], codes[0][1], codes[1][1]};
          const uint2* at = from + (u * C::steps + s) * 32 * TERMS;
#pragma unroll
          for (int n = 0; n < TILES; ++n) {
            uint2 h[TERMS];
            if constexpr (TERMS == 2) {
              const uint4 both = __ldg(reinterpret_cast<const uint4*>(at + n * tile_pitch));
              h[0] = {both.x, both.y}, h[TERMS - 1] = {both.z, both.w};
            } else {
              h[0] = __ldg(at + n * tile_pitch);
            }
#pragma unroll
            for (int m = 0; m < TERMS; ++m) mma_f16(sum[n][m], x, h[m].x, h[m].y);
            if constexpr (two_levels) {
              const uint32_t y[4] = {low[0][0], low[1][0], low[0][1], low[1][1]};
              mma_f16(sum[n][TERMS - 1], y, h[0].x, h[0].y);
            }
          }
        }
      };
      constexpr int kUnroll = C::steps >= 4 ? 1 : (TILES == 4 ? 2 : 4) / C::steps;
      for (int u = 0; u < units;) {
        const int end = grouped && units - u > units_left ? u + units_left : units;
        units_left -= end - u;
#pragma unroll kUnroll
        for (; u < end; ++u) product(u);
        if (!grouped || units_left > 0) continue;
        float now[TILES][4];
        take(now);
        close(now);
        units_left = units_of_group, ++group;
        if (group < a.groups) {
          of[0] = scale_of<K>(tail[0]), of[1] = scale_of<K>(tail[1]);
          const bool more = group + 1 < a.groups;
          load_tail(more ? tile : tile + stride, more ? group + 1 : 0);
        }
      }
      __syncwarp();  // before the stage is filled again
      stage = stage == a.stages - 1 ? 0 : stage + 1;
      if (!grouped) {
        float now[TILES][4];
        take(now);
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) total[n][e] += now[n][e];
      }
    }
    if (!grouped) {
      close(total);
    } else if (group < a.groups) {  // the last one is shorter
      float now[TILES][4];
      take(now);
      close(now);
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (ids[r] >= p.rows) continue;
      const float bias = a.bias ? a.bias[ids[r]] : 0.0f;
#pragma unroll
      for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t token = first + 8 * n + 2 * t + e;
          if (token >= a.tokens) continue;
          const float v = total[n][2 * r + e] * a.units[token] + bias;
          const int64_t at = token * a.ldo + ids[r];
          if (a.all)
            a.all[at] = ordered_bits(v);
          else if (a.dtype == DType::f32)
            static_cast<float*>(a.out)[at] = v;
          else if (a.dtype == DType::f16)
            static_cast<__half*>(a.out)[at] = __float2half_rn(v);
          else
            static_cast<__nv_bfloat16*>(a.out)[at] = __float2bfloat16_rn(v);
        }
    }
  }
}

// ---- host

constexpr int64_t kImageBytes = int64_t{64} << 20;  // of the workspace, about

struct LogitsPlan {
  bool wide;
  int terms, tiles;
  int64_t steps, groups, code_bytes;
  int64_t tokens, padded;  // of a launch
};

LogitsPlan plan_for(const PackedLogitsArgs& a) {
  LogitsPlan p{};
  const PackedTable& t = a.table;
  const int bits = packed_bits(t.kind);
  p.groups = t.group < t.dim ? div_up(t.dim, t.group) : 1;
  p.wide = p.groups == 1 || t.group % (128 / bits) == 0;
  p.terms = a.half_hidden ? 1 : 2;
  p.code_bytes = packed_code_bytes(t.kind, t.dim);
  const int unit = p.wide ? 16 : 2 * bits;
  p.steps = div_up(p.code_bytes, unit) * (p.wide ? 8 / bits : 1);
  const int64_t tokens = a.tokens > 0 ? a.tokens : 1;
  const int64_t fit = kImageBytes / (p.steps * 32 * p.terms + p.groups * 4 + 4) / 32 * 32;
  p.tokens = fit < 32 ? 32 : fit;
  if (a.k > 0) {
    const int64_t most = any_k_queries(tokens, t.rows);
    if (p.tokens > most) p.tokens = most;
  }
  if (p.tokens > tokens) p.tokens = tokens;
  p.tiles = p.tokens <= 8 ? 1 : p.tokens <= 16 ? 2 : 4;
  p.padded = round_up(p.tokens, 8 * p.tiles);
  return p;
}

struct Arrays {
  uint2* image;
  float *sums, *units;
  void* any;
};
Arrays arrays(const PackedLogitsArgs& a, const LogitsPlan& p, void* workspace, int64_t* bytes) {
  Carve c(workspace);
  Arrays w{};
  w.image = c.take<uint2>(p.padded * p.steps * 4 * p.terms);
  w.sums = c.take<float>(p.groups * p.padded);
  w.units = c.take<float>(p.padded);
  if (a.k > 0) w.any = c.take<unsigned char>(any_k_bytes(p.tokens, a.table.rows, a.k));
  if (bytes) *bytes = c.used();
  return w;
}

template <Packed K, bool WIDE, int TERMS, int TILES>
void scan_tiles(LogitsScan s, const Launch& l) {
  constexpr int warps = warps_of<TILES>();
  const int64_t stage = warps * kTileRows * kPitch, room = shared_limit(l.device) - 1024;
  const int64_t fit = room / stage;
  s.stages = fit >= 4 ? 4 : static_cast<int>(fit);
  if (s.stages < 2) throw std::runtime_error("lutra: packed_logits: a multiprocessor has too little shared memory");
  const int64_t groups = s.padded / (8 * TILES), tiles = div_up(s.table.rows, kTileRows);
  s.token_groups = static_cast<int>(groups);
  int64_t slots = multiprocessors(l.device) / groups;
  if (slots > div_up(tiles, warps)) slots = div_up(tiles, warps);
  launch("packed_logits", logits_kernel<K, WIDE, TERMS, TILES>, grid_x(groups * (slots > 1 ? slots : 1)), 32 * warps,
         static_cast<size_t>(s.stages * stage), l, s);
}

template <Packed K, bool WIDE, int TERMS>
void scan_terms(const float* hidden, const LogitsScan& s, int tiles, const Arrays& w, const Launch& l) {
  launch("packed_logits", image_kernel<K, WIDE, TERMS>, grid_x(s.padded), 256, 0, l, hidden, s, w.image, w.sums,
         w.units);
  if (tiles == 1) return scan_tiles<K, WIDE, TERMS, 1>(s, l);
  if (tiles == 2) return scan_tiles<K, WIDE, TERMS, 2>(s, l);
  scan_tiles<K, WIDE, TERMS, 4>(s, l);
}

template <Packed K>
void scan_kind(const float* hidden, const LogitsScan& s, const LogitsPlan& p, const Arrays& w, const Launch& l) {
  if constexpr (packed_bits(K) < 8) {
    if (!p.wide)
      return p.terms == 1 ? scan_terms<K, false, 1>(hidden, s, p.tiles, w, l)
                          : scan_terms<K, false, 2>(hidden, s, p.tiles, w, l);
  }
  p.terms == 1 ? scan_terms<K, true, 1>(hidden, s, p.tiles, w, l) : scan_terms<K, true, 2>(hidden, s, p.tiles, w, l);
}

void scan_rows(const float* hidden, const LogitsScan& s, const LogitsPlan& p, const Arrays& w, const Launch& l) {
  switch (s.table.kind) {
    case Packed::int8: return scan_kind<Packed::int8>(hidden, s, p, w, l);
    case Packed::int4: return scan_kind<Packed::int4>(hidden, s, p, w, l);
    case Packed::int2: return scan_kind<Packed::int2>(hidden, s, p, w, l);
    case Packed::nf4: return scan_kind<Packed::nf4>(hidden, s, p, w, l);
    case Packed::e4m3: return scan_kind<Packed::e4m3>(hidden, s, p, w, l);
    default: return scan_kind<Packed::e5m2>(hidden, s, p, w, l);
  }
}

}  // namespace

int64_t packed_logits_workspace(const PackedLogitsArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  int64_t bytes = 0;
  arrays(a, plan_for(a), nullptr, &bytes);
  return bytes;
}

void packed_logits(const PackedLogitsArgs& a, const Launch& l) {
  const PackedTable& t = a.table;
  if (t.rows > kMaxRows || t.row_bytes > 0x7fffff00)
    throw std::length_error("lutra: packed_logits on CUDA takes fewer than 2^32 - 1 rows of fewer than 2^31 bytes");
  if (t.dim < 1) throw std::invalid_argument("lutra: packed_logits on CUDA needs a column");
  const DeviceGuard guard(l.device);
  const LogitsPlan p = plan_for(a);
  const Arrays w = arrays(a, p, l.workspace, nullptr);
  for (int64_t first = 0; first < a.tokens; first += p.tokens) {
    LogitsScan s{};
    s.table = t;
    s.image = w.image, s.sums = w.sums, s.units = w.units, s.bias = a.bias;
    s.tokens = a.tokens - first < p.tokens ? a.tokens - first : p.tokens;
    s.padded = round_up(s.tokens, 8 * p.tiles);
    s.steps = p.steps, s.groups = p.groups, s.code_bytes = p.code_bytes;
    s.ldo = a.k > 0 ? t.rows : a.ldo;
    s.dtype = a.dtype;
    s.align = packed_align(t);
    AnyK best{};
    if (a.k > 0) {
      best = any_k_arrays(p.tokens, t.rows, a.k, w.any);
      s.all = best.scores;
    } else {
      s.out = static_cast<char*>(a.out) + first * a.ldo * (a.dtype == DType::f32 ? 4 : 2);
    }
    if (t.rows > 0) scan_rows(a.hidden + first * t.dim, s, p, w, l);
    if (a.k > 0) any_k(best, s.tokens, false, a.scores + first * a.k, a.ids + first * a.k, "packed_logits", l);
  }
}

}  // namespace cuda
}  // namespace lutra
