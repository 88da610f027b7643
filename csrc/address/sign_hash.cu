// Sign hash on CUDA; the formula is in sign_hash.h.
//
// One thread per chunk: it reads its `bits` values (16 bytes at a time where bits and alignment allow), builds
// the code in an integer and multiplies 1 + exp(-2 |z| / t). Neighbouring threads read neighbouring chunks, so a
// warp's reads cover whole lines whatever the number of bits; what one access leaves of a line is found in L1 by
// the next. The limit is reading x.
//
// Overflow: exp2f's argument is <= 0, so each factor lies in [1, 2] and a product of 16 of them in [1, 65536];
// indices are 64-bit.
#include "address/sign_hash.h"

#include "address/sign_hash.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct Shape {
  int64_t chunks, tables, ldx;  // chunks = rows * tables
  int bits;
  bool scaled, dense;  // dense: ldx == tables * bits, chunk c begins at c * bits
  __device__ __forceinline__ int64_t begin(int64_t c) const {
    return dense ? c * bits : (c / tables) * ldx + (c % tables) * bits;
  }
};

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* x, Shape s, float scale, int32_t* codes, float* weights) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= s.chunks) return;
  const ChunkHash h = hash_chunk<T, VEC>(x + s.begin(c), s.bits, scale);
  codes[c] = h.code;
  weights[c] = h.weight(s.scaled);
}

// The values are read twice, the second time from L1: keeping up to 16 of them would cost a register each.
template <class T, int VEC>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* x, Shape s, float scale, float inverse_t, const float* grad_weights, T* grad_x) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= s.chunks) return;
  const T* z = x + s.begin(c);
  float product = 1, total = 0;
  for (int i = 0; i < s.bits; i += VEC) {
    const auto v = load_pack<T, VEC>(z + i);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float a = fabsf(v[j]);
      product *= 1.0f + exp2f(a * scale);
      total += a;
    }
  }
  const float gp = grad_weights[c] / product;
  T* out = grad_x + c * s.bits;
  for (int i = 0; i < s.bits; i += VEC) {
    const auto v = load_pack<T, VEC>(z + i);
    float g[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      // sign z - tanh(z / t) = sign z * 2 e / (1 + e) with e = exp(-2 |z| / t)
      const float e = exp2f(fabsf(v[j]) * scale);
      const float sign = v[j] > 0 ? 1.0f : v[j] < 0 ? -1.0f : v[j];
      const float u = sign * (2.0f * e / (1.0f + e)) * inverse_t;
      g[j] = gp * (s.scaled ? sign + total * u : u);
    }
    store_pack<T, VEC>(out + i, g);
  }
}

template <class Args>
Shape shape_of(const Args& a) {
  return Shape{a.rows * a.tables, a.tables, a.ldx, a.bits, a.score == Score::scaled, a.ldx == a.tables * a.bits};
}

// Whether every chunk can be read `vec` values at a time.
bool fits(const Shape& s, const void* x, int vec, size_t size) {
  return s.bits % vec == 0 && (s.dense || s.ldx % vec == 0) && aligned(x, vec * size);
}

template <class T, int WIDE>
void forward(const SignHashArgs& a, const Launch& l) {
  const Shape s = shape_of(a);
  const auto* x = static_cast<const T*>(a.x);
  const unsigned blocks = grid_x(div_up(s.chunks, kThreads));
  const float scale = hash_scale(a.temperature);
  const auto kernel = fits(s, x, WIDE, sizeof(T)) ? forward_kernel<T, WIDE> : forward_kernel<T, 1>;
  launch("sign_hash", kernel, blocks, kThreads, 0, l, x, s, scale, a.codes, a.weights);
}

template <class T, int WIDE>
void backward(const SignHashBackwardArgs& a, const Launch& l) {
  const Shape s = shape_of(a);
  const auto* x = static_cast<const T*>(a.x);
  auto* out = static_cast<T*>(a.grad_x);
  const unsigned blocks = grid_x(div_up(s.chunks, kThreads));
  const float scale = hash_scale(a.temperature);
  const bool wide = fits(s, x, WIDE, sizeof(T)) && aligned(out, WIDE * sizeof(T));
  const auto kernel = wide ? backward_kernel<T, WIDE> : backward_kernel<T, 1>;
  launch("sign_hash_backward", kernel, blocks, kThreads, 0, l, x, s, scale, 1.0f / a.temperature, a.grad_weights, out);
}

}  // namespace

void sign_hash(const SignHashArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.dtype) {
    case DType::f16: return forward<__half, 8>(a, l);
    case DType::bf16: return forward<__nv_bfloat16, 8>(a, l);
    default: return forward<float, 4>(a, l);
  }
}

void sign_hash_backward(const SignHashBackwardArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.dtype) {
    case DType::f16: return backward<__half, 8>(a, l);
    case DType::bf16: return backward<__nv_bfloat16, 8>(a, l);
    default: return backward<float, 4>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
