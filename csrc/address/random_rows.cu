// Random rows on CUDA; the contract is in random_rows.h.
//
// A thread computes 4 blocks of Philox that follow one another: 4 words of each, so 4 runs of 4 values, which it writes
// as 4 accesses; 4 threads make a group of 64 dimensions. A block of threads takes rows in turn, so that what a token
// and a sequence are is read once. Tokens out of range: NaN, or -1 for words.
//
// Limit: writing for float32 (about 25 instructions a value: 4 bytes take as long); arithmetic for 16 bits.
#include "address/random_rows.h"

#include <type_traits>

#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct Words4 {
  uint32_t w[4];
};

__device__ __forceinline__ Words4 philox(uint32_t k0, uint32_t k1, uint32_t block, uint32_t token, uint64_t sequence) {
  uint32_t c0 = block, c1 = token, c2 = static_cast<uint32_t>(sequence), c3 = static_cast<uint32_t>(sequence >> 32);
#pragma unroll
  for (int i = 0; i < kPhiloxRounds; ++i) {
    const uint64_t p = static_cast<uint64_t>(c0) * kPhiloxM0, q = static_cast<uint64_t>(c2) * kPhiloxM1;
    c0 = static_cast<uint32_t>(q >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(q);
    c3 = static_cast<uint32_t>(p);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return Words4{{c0, c1, c2, c3}};
}

// sqrt(-2 ln u); the polynomial and the order of its terms are the CPU's.
__device__ __forceinline__ float radius(float u) {
  const int base = 0x3f3504f3;  // sqrt(1/2)
  const int i = __float_as_int(u) - base;
  const float e = static_cast<float>(i >> 23), x = __int_as_float((i & 0x7fffff) + base) - 1.0f;
  float p = ln_term(0);
#pragma unroll
  for (int j = 1; j < 8; ++j) p = fmaf(p, x, ln_term(j));
  const float ln = fmaf(e, 0.69314718f, fmaf(x * x, p, x));
  return sqrt_approx(ln * -2.0f);
}

__device__ __forceinline__ void normals(uint32_t a, uint32_t b, float scale, float* first, float* second) {
  const float u = static_cast<float>(static_cast<int>(a >> 1)) * 0x1p-31f + 0x1p-32f;
  const float t = static_cast<float>(static_cast<int>(b << 2)) * 0x1p-31f, tt = t * t;
  const float r = radius(u) * scale;
  float c = cos_term(0), s = sin_term(0);
#pragma unroll
  for (int j = 1; j < 4; ++j) {
    c = fmaf(c, tt, cos_term(j));
    s = fmaf(s, tt, sin_term(j));
  }
  c = __uint_as_float(__float_as_uint(c * r) ^ (b & 0x80000000u));
  s = s * t * r;
  const bool swap = b >> 30 & 1;
  *first = swap ? s : c;
  *second = swap ? c : s;
}

struct WordOut {};  // of words

template <class T>
struct Value {
  using type = T;
};
template <>
struct Value<WordOut> {
  using type = int32_t;
};

// Four values to to[0..4).
template <class T>
__device__ __forceinline__ void put4(T* to, const float* v) {
  store_pack<T, 4>(to, v);
}
__device__ __forceinline__ void put4(int32_t* to, const float* v) {
  *reinterpret_cast<int4*>(to) =
      make_int4(__float_as_int(v[0]), __float_as_int(v[1]), __float_as_int(v[2]), __float_as_int(v[3]));
}
template <class T>
__device__ __forceinline__ void put1(T* to, float v) {
  *to = from_float<T>(v);
}
__device__ __forceinline__ void put1(int32_t* to, float v) { *to = __float_as_int(v); }

// whole: every row begins where four values can be written at once.
template <class T>
__global__ void __launch_bounds__(kThreads) random_rows_kernel(RandomRowsArgs a, int quads, int64_t units, bool whole) {
  using Out = typename Value<T>::type;
  constexpr bool kNormal = !std::is_same<T, WordOut>::value;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= units) return;
  const int64_t row = units <= 0xffffffff ? static_cast<uint32_t>(at) / static_cast<uint32_t>(quads) : at / quads;
  const int quad = static_cast<int>(at - row * quads);
  const int64_t token =
      a.id_type == DType::i32 ? static_cast<const int32_t*>(a.ids)[row] : static_cast<const int64_t*>(a.ids)[row];
  const uint64_t sequence = a.sequences ? static_cast<uint64_t>(a.sequences[row / a.per_sequence]) : 0;
  const bool good = static_cast<uint64_t>(token) >> 32 == 0;
  const float scale = good ? a.scale : quiet_nan();
  float v[4][4];  // [word][block]
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Words4 w = philox(static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32),
                            static_cast<uint32_t>(quad * 4 + i), static_cast<uint32_t>(token), sequence);
    if constexpr (kNormal) {
      normals(w.w[0], w.w[1], scale, &v[0][i], &v[1][i]);
      normals(w.w[2], w.w[3], scale, &v[2][i], &v[3][i]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j][i] = __uint_as_float(good ? w.w[j] : 0xffffffffu);
    }
  }
  const int64_t d = static_cast<int64_t>(quad / 4) * 64 + quad % 4 * 4;  // of word 0
  Out* to = static_cast<Out*>(a.out) + row * a.dim + d;
  if (whole && a.dim - d >= 52) {
#pragma unroll
    for (int j = 0; j < 4; ++j) put4(to + j * 16, v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (d + j * 16 + i < a.dim) put1(to + j * 16 + i, v[j][i]);
  }
}

template <class T>
void run(const RandomRowsArgs& a, const Launch& l) {
  const int size = static_cast<int>(sizeof(typename Value<T>::type));
  const int64_t quads = div_up(a.dim, 64) * 4, units = a.n * quads;
  const bool whole = a.dim % 4 == 0 && aligned(a.out, static_cast<size_t>(size) * 4);
  launch("random_rows", random_rows_kernel<T>, dim3(grid_x(div_up(units, kThreads))), kThreads, 0, l, a,
         static_cast<int>(quads), units, whole);
}

}  // namespace

void random_rows(const RandomRowsArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  if (a.output == RandomOutput::words) return run<WordOut>(a, l);
  switch (a.dtype) {
    case DType::f16: return run<__half>(a, l);
    case DType::bf16: return run<__nv_bfloat16>(a, l);
    default: return run<float>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
