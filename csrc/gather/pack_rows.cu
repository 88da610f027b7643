// Coding rows on CUDA: a warp takes a row; codes, scales and random bits are those of pack_rows.cc. See packed.h.
//
// Limit: reading the table twice and writing the codes; a table read for the second time is mostly in the L2 cache row
// by row.
#include "common/device.cuh"
#include "gather/packed_rows.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Values {
  const void* p;
  DType dtype;
  __device__ __forceinline__ float operator[](int64_t i) const {
    if (dtype == DType::f32) return static_cast<const float*>(p)[i];
    if (dtype == DType::f16) return to_float(static_cast<const __half*>(p)[i]);
    return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  }
};

__device__ __forceinline__ float half_value(uint32_t h) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(h)));
}
__device__ __forceinline__ uint32_t half_bits(float f) { return __half_as_ushort(__float2half_rn(f)); }
__device__ __forceinline__ uint32_t half_below(float f) {
  const uint32_t h = half_bits(f);
  if (!(half_value(h) > f)) return h;
  return h & 0x8000u ? h + 1 : h ? h - 1 : 0x8001u;
}
__device__ __forceinline__ uint32_t half_above(float f) {  // f >= 0
  const uint32_t h = half_bits(f);
  return half_value(h) < f ? h + 1 : h;
}

struct Noise {  // of a row
  bool on;
  uint64_t key;
  __device__ __forceinline__ Noise(bool stochastic, uint64_t seed, int64_t row)
      : on(stochastic), key(packed_noise_key(seed, row)) {}
  __device__ __forceinline__ uint32_t bits(int64_t column) const { return packed_noise(key, column); }
};
__device__ __forceinline__ float unit(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }

// An 8-bit float with M bits of mantissa, whose smallest normal number is 2^Low and whose largest is `most`.
template <int M, int Low>
__device__ __forceinline__ uint32_t float_code(float t, float most, const Noise& noise, int64_t j) {
  constexpr int kDrop = 23 - M;
  constexpr uint32_t kBase = static_cast<uint32_t>(127 + Low - 1) << M;
  const float per_ulp = __uint_as_float(static_cast<uint32_t>(127 - Low + M) << 23);  // 1 / the smallest subnormal
  const float smallest = __uint_as_float(static_cast<uint32_t>(127 + Low) << 23);
  float a = t < 0 ? -t : t;
  a = a < most ? a : most;
  uint32_t u = __float_as_uint(a);
  const uint32_t r = noise.on ? noise.bits(j) : 0;
  u += noise.on ? r & ((1u << kDrop) - 1) : (1u << (kDrop - 1)) - 1 + ((u >> kDrop) & 1);
  const uint32_t normal = (u >> kDrop) - kBase;
  const float flat = noise.on ? floorf(a * per_ulp + unit(r)) : rintf(a * per_ulp);
  const uint32_t code = a < smallest ? static_cast<uint32_t>(flat) : normal;
  return code | (t < 0 ? 0x80u : 0u);
}

template <Packed K>
__device__ __forceinline__ uint32_t code_of(float x, float scale, float minimum, const Noise& noise, int64_t j) {
  constexpr float kMost = K == Packed::int8 ? 255 : K == Packed::int4 ? 15 : 3;
  if (packed_affine(K)) {  // halves: a row from -2e38 to 2e38 must not overflow
    const float t = (x * 0.5f - minimum * 0.5f) / (scale * 0.5f);
    float c = noise.on ? floorf(t + unit(noise.bits(j))) : rintf(t);
    c = c > 0 ? c : 0;
    c = c < kMost ? c : kMost;
    return static_cast<uint32_t>(c);
  }
  const float t = x / (scale > 0 ? scale : 1.0f);
  if (K == Packed::e4m3) return float_code<3, -6>(t, 448.0f, noise, j);
  if (K == Packed::e5m2) return float_code<2, -14>(t, 57344.0f, noise, j);
  uint32_t c = 0;
  const float u = noise.on ? unit(noise.bits(j)) : 0;
  for (int k = 0; k < 15; ++k) {  // with noise a level is passed with the probability of the way to it that was made
    const float low = kNf4Levels[k], high = kNf4Levels[k + 1];
    c += noise.on ? t - low > u * (high - low) : t > (low + high) * 0.5f;
  }
  return c;
}

template <Packed K>
__global__ void __launch_bounds__(kThreads, 2)
    pack_kernel(Values x, int64_t n, uint8_t* data, int64_t dim, int64_t group, int64_t row_bytes, const int64_t* ids,
                bool stochastic, uint64_t seed, const float* given_scale, const float* given_minimum) {
  constexpr float kMost = K == Packed::int8 ? 255 : K == Packed::int4 ? 15 : 3;
  constexpr int kPer = 8 / packed_bits(K);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (i >= n) return;
  const int64_t row = ids ? ids[i] : i, at = i * dim;
  uint8_t* out = data + row * row_bytes;
  uint8_t* tail = out + packed_code_bytes(K, dim);
  const Noise noise(stochastic, seed, row);
  const int64_t groups = (dim + group - 1) / group;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * group, end = begin + group < dim ? begin + group : dim;
    float low = x[at + begin], high = low;
    for (int64_t j = begin + lane; j < end; j += 32) {
      const float v = x[at + j];
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) {
      low = fminf(low, __shfl_xor_sync(kFullWarp, low, s));
      high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, s));
    }
    const float magnitude = -low > high ? -low : high;  // never -0, which fmaxf may give
    float scale = 0, minimum = 0;
    if (given_scale) {
      scale = given_scale[i * groups + g];
      if (packed_affine(K))
        minimum = given_minimum ? given_minimum[i * groups + g] : -scale * (kMost == 255 ? 128.0f : (kMost + 1) * 0.5f);
      if (packed_half_scales(K)) {
        const uint32_t h = half_bits(scale);
        scale = half_value(h ? h : 1);
        minimum = half_value(half_bits(minimum));
      }
    } else if (K == Packed::int8) {
      minimum = low;
      scale = high / 255.0f - low / 255.0f;
    } else if (packed_affine(K)) {
      minimum = half_value(half_below(low));
      scale = half_value(half_above((high - minimum) / kMost));
    } else if (K == Packed::nf4) {
      scale = half_value(half_above(magnitude));
    } else {
      scale = magnitude / (K == Packed::e4m3 ? 448.0f : 57344.0f);
    }
    if (packed_affine(K) && !(scale >= 1e-37f)) scale = 1;            // a (nearly) constant row: code 0, its minimum
    for (int64_t b = begin / kPer + lane; b * kPer < end; b += 32) {  // whole bytes, zeros behind the last code
      uint32_t byte = 0;
#pragma unroll
      for (int k = 0; k < kPer; ++k) {
        const int64_t j = b * kPer + k;
        if (j < end) byte |= code_of<K>(x[at + j], scale, minimum, noise, j) << (k * packed_bits(K));
      }
      out[b] = static_cast<uint8_t>(byte);
    }
    if (lane < packed_group_bytes(K)) {
      uint32_t word[2] = {__float_as_uint(scale), __float_as_uint(minimum)};
      if (packed_half_scales(K)) word[0] = half_bits(scale) | half_bits(minimum) << 16;
      tail[g * packed_group_bytes(K) + lane] = static_cast<uint8_t>(word[lane / 4] >> (8 * (lane & 3)));
    }
  }
}

// bad[0]: the first row with NaN or infinity, bad[1]: the first with a value above 65504. Both begin at n.
__global__ void __launch_bounds__(kThreads) check_kernel(Values x, int64_t n, int64_t dim, unsigned long long* bad) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (i >= n) return;
  uint32_t most = 0;  // of the magnitudes' bits, which are ordered as the magnitudes are
  for (int64_t j = lane; j < dim; j += 32) most = max(most, __float_as_uint(x[i * dim + j]) & 0x7fffffffu);
  most = __reduce_max_sync(kFullWarp, most);
  if (lane) return;
  if (most >= 0x7f800000u)
    atomicMin(bad, static_cast<unsigned long long>(i));
  else if (__uint_as_float(most) > 65504.0f)
    atomicMin(bad + 1, static_cast<unsigned long long>(i));
}

__global__ void begin_kernel(unsigned long long* bad, int64_t n) {
  bad[threadIdx.x] = static_cast<unsigned long long>(n);
}

template <Packed K>
void run(const PackRowsArgs& a, const Launch& l) {
  launch("pack_rows", pack_kernel<K>, grid_x(div_up(a.n, kWarps)), kThreads, 0, l, Values{a.table, a.dtype}, a.n,
         const_cast<uint8_t*>(a.out.data), a.out.dim, a.out.group, a.out.row_bytes, a.ids, a.stochastic, a.seed,
         a.scale, a.minimum);
}

}  // namespace

void check_rows(const PackRowsArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  auto* bad = reinterpret_cast<unsigned long long*>(a.bad);
  launch("pack_rows", begin_kernel, 1, 2, 0, l, bad, a.n);
  launch("pack_rows", check_kernel, grid_x(div_up(a.n, kWarps)), kThreads, 0, l, Values{a.table, a.dtype}, a.n,
         a.out.dim, bad);
}

void pack_rows(const PackRowsArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  if (a.n == 0 || a.out.dim == 0) return;
  switch (a.out.kind) {
    case Packed::int8: return run<Packed::int8>(a, l);
    case Packed::int4: return run<Packed::int4>(a, l);
    case Packed::int2: return run<Packed::int2>(a, l);
    case Packed::nf4: return run<Packed::nf4>(a, l);
    case Packed::e4m3: return run<Packed::e4m3>(a, l);
    default: return run<Packed::e5m2>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
