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

#include "scan/any_k.cuh"
#include "scan/packed_logits.cuh"
#include "scan/packed_logits_scan.cuh"

namespace lutra {
namespace cuda {
namespace {

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
  // Fewer tiles than warps of all blocks are spread over the multiprocessors (the kernel deals them out that way).
  const int64_t slots = parts_for(groups, tiles, multiprocessors(l.device), 1);
  launch("packed_logits", logits_kernel<K, WIDE, TERMS, TILES>, grid_x(groups * slots), 32 * warps,
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
