// The language of device code for a C++ compiler: qualifiers, vector types, intrinsics, exchanges within a warp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulate/machine.h"
#include "emulate/races.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (::emulate::place.thread)
#define blockIdx (::emulate::place.block)
#define blockDim (::emulate::place.block_size)
#define gridDim (::emulate::place.grid)

// ---- vector types
#define LUTRA_VECTOR(T, NAME)                                                        \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                 \
  struct NAME##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) NAME##4 { T x, y, z, w; }; \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                         \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                 \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
LUTRA_VECTOR(int, int)
LUTRA_VECTOR(unsigned, uint)
LUTRA_VECTOR(float, float)
LUTRA_VECTOR(short, short)
LUTRA_VECTOR(unsigned short, ushort)
LUTRA_VECTOR(signed char, char)
LUTRA_VECTOR(unsigned char, uchar)
LUTRA_VECTOR(double, double)
LUTRA_VECTOR(long long, longlong)
LUTRA_VECTOR(unsigned long long, ulonglong)
#undef LUTRA_VECTOR

// ---- bits
namespace emulate {
template <class To, class From>
inline To bits(const From& v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To out;
  memcpy(&out, &v, sizeof(out));
  return out;
}
}  // namespace emulate
inline float __int_as_float(int v) { return emulate::bits<float>(v); }
inline float __uint_as_float(unsigned v) { return emulate::bits<float>(v); }
inline int __float_as_int(float v) { return emulate::bits<int>(v); }
inline unsigned __float_as_uint(float v) { return emulate::bits<unsigned>(v); }
inline double __longlong_as_double(long long v) { return emulate::bits<double>(v); }
inline long long __double_as_longlong(double v) { return emulate::bits<long long>(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64; }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned pick) {
  const uint64_t v = uint64_t{y} << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<unsigned>(v >> (8 * (pick >> (4 * i) & 7)) & 255) << (8 * i);
  return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  by &= 31;
  return by ? high << by | low >> (32 - by) : high;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  by &= 31;
  return by ? high << (32 - by) | low >> by : low;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<signed char>(a >> 8 * i) * static_cast<signed char>(b >> 8 * i);
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
  return c;
}

// ---- arithmetic. The named roundings are never fused with what is around them.
namespace emulate {
template <class T>
inline T alone(T v) {
  asm volatile("" : "+x"(v));
  return v;
}
}  // namespace emulate
inline float __fadd_rn(float a, float b) { return emulate::alone(a + b); }
inline float __fsub_rn(float a, float b) { return emulate::alone(a - b); }
inline float __fmul_rn(float a, float b) { return emulate::alone(a * b); }
inline float __fdiv_rn(float a, float b) { return emulate::alone(a / b); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline double __dadd_rn(double a, double b) { return emulate::alone(a + b); }
inline double __dsub_rn(double a, double b) { return emulate::alone(a - b); }
inline double __dmul_rn(double a, double b) { return emulate::alone(a * b); }
inline double __drcp_rn(double a) { return 1.0 / a; }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
inline int __float2int_rn(float a) {
  if (std::isnan(a)) return 0;
  return a >= 2147483648.0f ? 2147483647 : a <= -2147483648.0f ? -2147483647 - 1 : static_cast<int>(std::nearbyint(a));
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline float fdividef(float a, float b) { return a / b; }
inline void sincospif(float a, float* s, float* c) {
  *s = static_cast<float>(std::sin(M_PI * a));
  *c = static_cast<float>(std::cos(M_PI * a));
}
// A NaN of any kind is left out, as FMNMX does; the C library makes more of a signalling one.
inline float emulated_fminf(float a, float b) { return std::isnan(a) ? b : std::isnan(b) ? a : b < a ? b : a; }
inline float emulated_fmaxf(float a, float b) { return std::isnan(a) ? b : std::isnan(b) ? a : a < b ? b : a; }
#define fminf emulated_fminf
#define fmaxf emulated_fmaxf
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
#define LUTRA_MIXED(A, B, R)                                                                                       \
  inline R max(A a, B b) { return static_cast<R>(a) > static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); } \
  inline R min(A a, B b) { return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); }
LUTRA_MIXED(int, unsigned, unsigned)
LUTRA_MIXED(unsigned, int, unsigned)
LUTRA_MIXED(long long, long, long long)
LUTRA_MIXED(long, long long, long long)
#undef LUTRA_MIXED

// ---- 16-bit floats
inline uint16_t emulated_half(float v) { return emulate::bits<uint16_t>(static_cast<_Float16>(v)); }
inline uint16_t emulated_bfloat16(float v) {
  if (std::isnan(v)) return 0x7fff;
  const unsigned u = __float_as_uint(v);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
struct __half {
  uint16_t b;
  __half() = default;
  explicit __half(float v) : b(emulated_half(v)) {}
};
struct __nv_bfloat16 {
  uint16_t b;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float v) : b(emulated_bfloat16(v)) {}
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __half2float(__half h) { return static_cast<float>(emulate::bits<_Float16>(h)); }
inline __half __float2half_rn(float v) { return __half(v); }
inline __half __float2half(float v) { return __half(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<unsigned>(v.b) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
inline __half2 __hsub2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) - __half2float(b.x), __half2float(a.y) - __half2float(b.y));
}
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
inline __half __ushort_as_half(unsigned short s) { return emulate::bits<__half>(s); }
inline unsigned short __half_as_ushort(__half h) { return h.b; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short s) { return emulate::bits<__nv_bfloat16>(s); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.b; }

// ---- memory
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
inline void __stcg(T* p, T v) {
  *p = v;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulate::wait(); }
inline long long clock64() { return 0; }
[[noreturn]] inline void __trap() { emulate::fail("__trap"); }

#define LUTRA_ATOMIC(NAME, NEW)                                    \
  template <class T, class V>                                      \
  inline T NAME(T* p, V value) {                                   \
    const emulate::races::As atomic(emulate::races::Kind::atomic); \
    const T old = *p, v = static_cast<T>(value);                   \
    *p = NEW;                                                      \
    return old;                                                    \
  }
LUTRA_ATOMIC(atomicAdd, static_cast<T>(old + v))
LUTRA_ATOMIC(atomicSub, static_cast<T>(old - v))
LUTRA_ATOMIC(atomicMax, old > v ? old : v)
LUTRA_ATOMIC(atomicMin, old < v ? old : v)
LUTRA_ATOMIC(atomicOr, static_cast<T>(old | v))
LUTRA_ATOMIC(atomicAnd, static_cast<T>(old& v))
LUTRA_ATOMIC(atomicXor, static_cast<T>(old ^ v))
LUTRA_ATOMIC(atomicExch, v)
#undef LUTRA_ATOMIC
template <class T>
inline T atomicCAS(T* p, T compare, T value) {
  const emulate::races::As atomic(emulate::races::Kind::atomic);
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}

// ---- barriers and exchanges
inline void __syncthreads() { emulate::block_barrier(0, 0); }
inline int __syncthreads_or(int p) { return emulate::block_barrier(0, p); }
inline int __syncthreads_and(int p) { return emulate::block_barrier(1, p); }
inline int __syncthreads_count(int p) { return emulate::block_barrier(2, p); }
// The lanes that happen to run together: each one alone.
inline unsigned __activemask() { return 1u << emulate::lane(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulate::collective(emulate::Exchange::sync, mask, 0, [](const auto&, unsigned) { return 0; });
}
namespace emulate {
// The value of lane `from`, which must take part; the lane's own where `inside` is false.
template <class T>
inline T shuffle(unsigned mask, const T& v, int from, bool inside) {
  return collective(Exchange::shuffle, mask, v, [&](const auto& of, unsigned present) -> T {
    if (!inside) return v;
    if (!(present >> from & 1)) fail("a shuffle reads a lane that does not take part");
    return of(from);
  });
}
}  // namespace emulate
template <class T>
inline T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  return emulate::shuffle(mask, v, (emulate::lane() & -width) | (from & (width - 1)), true);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32) {
  const int l = emulate::lane(), from = l ^ by;
  return emulate::shuffle(mask, v, from, from < (l & -width) + width);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
  const int l = emulate::lane(), from = l - static_cast<int>(by);
  return emulate::shuffle(mask, v, from, from >= (l & -width));
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
  const int l = emulate::lane(), from = l + static_cast<int>(by);
  return emulate::shuffle(mask, v, from, from < (l & -width) + width);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  return emulate::collective(emulate::Exchange::ballot, mask, p != 0, [](const auto& of, unsigned present) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i)
      if ((present >> i & 1) && of(i)) r |= 1u << i;
    return r;
  });
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }
template <class T>
inline unsigned __match_any_sync(unsigned mask, T v) {
  return emulate::collective(emulate::Exchange::match, mask, v, [&](const auto& of, unsigned present) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i)
      if ((present >> i & 1) && of(i) == v) r |= 1u << i;
    return r;
  });
}
#define LUTRA_REDUCE(NAME, FOLD)                                                                                \
  template <class T>                                                                                            \
  inline T NAME(unsigned mask, T v) {                                                                           \
    return emulate::collective(emulate::Exchange::reduce, mask, v, [&](const auto& of, unsigned present) -> T { \
      T r = v;                                                                                                  \
      bool first = true;                                                                                        \
      for (int i = 0; i < 32; ++i)                                                                              \
        if (present >> i & 1) {                                                                                 \
          const T o = of(i);                                                                                    \
          r = first ? o : static_cast<T>(FOLD);                                                                 \
          first = false;                                                                                        \
        }                                                                                                       \
      return r;                                                                                                 \
    });                                                                                                         \
  }
LUTRA_REDUCE(__reduce_add_sync, r + o)
LUTRA_REDUCE(__reduce_max_sync, r > o ? r : o)
LUTRA_REDUCE(__reduce_min_sync, r < o ? r : o)
LUTRA_REDUCE(__reduce_or_sync, r | o)
LUTRA_REDUCE(__reduce_and_sync, r& o)
LUTRA_REDUCE(__reduce_xor_sync, r ^ o)
#undef LUTRA_REDUCE
