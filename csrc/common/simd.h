// Vectors at a SIMD level, written with the compiler's vector extensions: `vf` holds W floats.
// Everything lives in LUTRA_NS, so that no level borrows another's instructions.
#pragma once
#include "common/levels.h"
#include "common/types.h"

#include <string.h>

#include <cstdint>

#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
#include <immintrin.h>
#elif defined(__SSE4_1__)
#include <smmintrin.h>
#endif

#define LUTRA_INLINE static inline __attribute__((always_inline))

namespace lutra {
namespace LUTRA_NS {

#if defined(LUTRA_LEVEL_v4)
constexpr int W = 16;
#elif defined(LUTRA_LEVEL_v3)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4), aligned(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4), aligned(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4), aligned(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2)));
typedef uint8_t vb __attribute__((vector_size(W), aligned(1)));
typedef int8_t vsb __attribute__((vector_size(W), aligned(1)));
typedef float vf_unaligned __attribute__((vector_size(W * 4), aligned(4)));
typedef int32_t vi_unaligned __attribute__((vector_size(W * 4), aligned(4)));

LUTRA_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
LUTRA_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
LUTRA_INLINE vf splat(float x) { return x - (vf){}; }

// ---- scalar 16-bit conversions (round to nearest even; NaN stays NaN)
LUTRA_INLINE float bf16_to_float(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
LUTRA_INLINE uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
LUTRA_INLINE float half_to_float(uint16_t h) {
#if defined(LUTRA_LEVEL_v3) || defined(LUTRA_LEVEL_v4)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  uint32_t u;
  float f;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    u = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else {  // a float with the exponent moved by 112; the product also normalises subnormals
    u = magnitude << 13;
    memcpy(&f, &u, 4);
    f *= 5.192296858534828e33f;  // 2^112
    memcpy(&u, &f, 4);
    u |= sign;
  }
  memcpy(&f, &u, 4);
  return f;
#endif
}
LUTRA_INLINE uint16_t float_to_half(float f) {
#if defined(LUTRA_LEVEL_v3) || defined(LUTRA_LEVEL_v4)
  return static_cast<uint16_t>(_cvtss_sh(f, 0));
#else
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (u < 0x38800000u) {  // subnormal: let the adder round at the right bit
    float a, magic;
    const uint32_t magic_bits = 0x3f000000u;  // 0.5: its last bit is 2^-24
    memcpy(&a, &u, 4);
    memcpy(&magic, &magic_bits, 4);
    a += magic;
    memcpy(&u, &a, 4);
    return static_cast<uint16_t>(sign | (u - magic_bits));
  }
  u += 0xfffu + ((u >> 13) & 1);
  return static_cast<uint16_t>(sign | ((u - 0x38000000u) >> 13));
#endif
}

// ---- element types: how a stored value becomes a float, one at a time and W at a time
struct F32 {
  typedef float type;
  LUTRA_INLINE float get(const type* p) { return *p; }
  LUTRA_INLINE void put(type* p, float f) { *p = f; }
  LUTRA_INLINE vf load(const type* p) { return LUTRA_NS::load(p); }
  LUTRA_INLINE void store(type* p, vf v) { LUTRA_NS::store(p, v); }
};
struct BF16 {
  typedef uint16_t type;
  LUTRA_INLINE float get(const type* p) { return bf16_to_float(*p); }
  LUTRA_INLINE void put(type* p, float f) { *p = float_to_bf16(f); }
  LUTRA_INLINE vf load(const type* p) {
#if defined(LUTRA_LEVEL_v4)  // gcc 12 makes two halves of __builtin_convertvector here
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#else
    const vh h = *reinterpret_cast<const vh*>(p);
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
  }
  LUTRA_INLINE void store(type* p, vf v) {
    const vu u = (vu)v;
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const vu quiet = (u >> 16) | 0x40u;
    const vu nan = (vu)((u & 0x7fffffffu) > (vu){} + 0x7f800000u);
    const vu bits = (rounded & ~nan) | (quiet & nan);
#if defined(LUTRA_LEVEL_v4)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)bits));
#else
    *reinterpret_cast<vh*>(p) = __builtin_convertvector(bits, vh);
#endif
  }
};
struct F16 {
  typedef uint16_t type;
  LUTRA_INLINE float get(const type* p) { return half_to_float(*p); }
  LUTRA_INLINE void put(type* p, float f) { *p = float_to_half(f); }
#if defined(LUTRA_LEVEL_v4)
  LUTRA_INLINE vf load(const type* p) {
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  LUTRA_INLINE void store(type* p, vf v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
  }
#elif defined(LUTRA_LEVEL_v3)
  LUTRA_INLINE vf load(const type* p) {
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  LUTRA_INLINE void store(type* p, vf v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
  }
#else
  LUTRA_INLINE vf load(const type* p) {
    vf v;
    for (int i = 0; i < W; ++i) v[i] = half_to_float(p[i]);
    return v;
  }
  LUTRA_INLINE void store(type* p, vf v) {
    for (int i = 0; i < W; ++i) p[i] = float_to_half(v[i]);
  }
#endif
};
// W bytes as integers. gcc 12 takes __builtin_convertvector apart byte by byte here, hence the intrinsics.
#if defined(LUTRA_LEVEL_v4)
LUTRA_INLINE vi widen_u8(const uint8_t* p) {
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LUTRA_INLINE vi widen_i8(const int8_t* p) {
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#elif defined(LUTRA_LEVEL_v3)
LUTRA_INLINE vi widen_u8(const uint8_t* p) {
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
LUTRA_INLINE vi widen_i8(const int8_t* p) {
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
#elif defined(__SSE4_1__)
LUTRA_INLINE __m128i four_bytes(const void* p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return _mm_cvtsi32_si128(bits);
}
LUTRA_INLINE vi widen_u8(const uint8_t* p) { return (vi)_mm_cvtepu8_epi32(four_bytes(p)); }
LUTRA_INLINE vi widen_i8(const int8_t* p) { return (vi)_mm_cvtepi8_epi32(four_bytes(p)); }
#else
LUTRA_INLINE vi widen_u8(const uint8_t* p) { return vi{p[0], p[1], p[2], p[3]}; }
LUTRA_INLINE vi widen_i8(const int8_t* p) { return vi{p[0], p[1], p[2], p[3]}; }
#endif
struct U8 {
  typedef uint8_t type;
  LUTRA_INLINE float get(const type* p) { return static_cast<float>(*p); }
  LUTRA_INLINE vf load(const type* p) { return __builtin_convertvector(widen_u8(p), vf); }
};
struct I8 {
  typedef int8_t type;
  LUTRA_INLINE float get(const type* p) { return static_cast<float>(*p); }
  LUTRA_INLINE vf load(const type* p) { return __builtin_convertvector(widen_i8(p), vf); }
};

LUTRA_INLINE float reduce_add(vf v) {  // a fixed order: halves, then halves of halves
#if defined(LUTRA_LEVEL_v4)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float t[W];
  store(t, v);
  for (int w = W / 2; w; w /= 2)
    for (int i = 0; i < w; ++i) t[i] += t[i + w];
  return t[0];
#endif
}

// n < W values and zeros behind them.
LUTRA_INLINE vf load_first(const float* p, int n) {
#if defined(LUTRA_LEVEL_v4)
  return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  float t[W] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
#endif
}

// One bit for each lane where !(a <= b): a is greater, or one of them is NaN.
LUTRA_INLINE uint32_t bits_not_le(vf a, vf b) {
#if defined(LUTRA_LEVEL_v4)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
#elif defined(LUTRA_LEVEL_v3)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ)));
#else
  const vi m = ~(a <= b);
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= (static_cast<uint32_t>(m[i]) >> 31) << i;
  return bits;
#endif
}

// One bit for each lane of a comparison's result.
LUTRA_INLINE uint32_t mask_bits(vi m) {
#if defined(LUTRA_LEVEL_v4)
  return _mm512_movepi32_mask((__m512i)m);
#elif defined(LUTRA_LEVEL_v3)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)m));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= (static_cast<uint32_t>(m[i]) >> 31) << i;
  return bits;
#endif
}

}  // namespace LUTRA_NS
}  // namespace lutra
