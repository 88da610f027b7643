#include "address/random_rows.h"

#include "common/simd.h"
#include "common/team.h"
#include "gather/bag_ids.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int kLanes = 16, kGroup = 64, kRounds = kPhiloxRounds;
constexpr uint64_t kM0 = kPhiloxM0, kM1 = kPhiloxM1;
constexpr uint32_t kW0 = kPhiloxW0, kW1 = kPhiloxW1;

// A 32-bit number in the low half of each 64-bit lane; what is in the high half does not matter.
typedef uint64_t vw __attribute__((vector_size(W * 4), aligned(W * 4)));
typedef uint32_t vu_unaligned __attribute__((vector_size(W * 4), aligned(4)));

LUTRA_INLINE vw widen(uint64_t x) { return (vw){} + x; }
LUTRA_INLINE vw multiply(vw a, vw b) {
#if defined(LUTRA_LEVEL_v4)
  return (vw)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(LUTRA_LEVEL_v3)
  return (vw)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE4_1__)
  return (vw)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}
LUTRA_INLINE vf square_root(vf x) {
#if defined(LUTRA_LEVEL_v4)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(LUTRA_LEVEL_v3)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE4_1__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

struct Keys {
  uint64_t k0[kRounds], k1[kRounds];
  explicit Keys(uint64_t seed) {
    for (uint32_t i = 0; i < kRounds; ++i) {
      k0[i] = static_cast<uint32_t>(seed) + i * kW0;  // modulo 2^32
      k1[i] = static_cast<uint32_t>(seed >> 32) + i * kW1;
      k0[i] &= 0xffffffffu;
      k1[i] &= 0xffffffffu;
    }
  }
};

// The four words of W blocks: lane l of the vectors is block + l. Two halves, of the even and of the odd blocks, since
// a product of 32-bit numbers takes a lane of 64 bits.
LUTRA_INLINE void philox(const Keys& keys, uint32_t block, uint32_t token, uint64_t sequence, vu* out) {
  vw count;
  for (int i = 0; i < W / 2; ++i) count[i] = 2 * i;
  vw a0 = count + block, b0 = a0 + 1;
  vw a1 = widen(token), b1 = a1, a2 = widen(sequence & 0xffffffffu), b2 = a2, a3 = widen(sequence >> 32), b3 = a3;
  const vw m0 = widen(kM0), m1 = widen(kM1);
#pragma GCC unroll 10
  for (int i = 0; i < kRounds; ++i) {
    const vw k0 = widen(keys.k0[i]), k1 = widen(keys.k1[i]);
    const vw ap = multiply(a0, m0), aq = multiply(a2, m1), bp = multiply(b0, m0), bq = multiply(b2, m1);
    a0 = (aq >> 32) ^ a1 ^ k0;
    b0 = (bq >> 32) ^ b1 ^ k0;
    a2 = (ap >> 32) ^ a3 ^ k1;
    b2 = (bp >> 32) ^ b3 ^ k1;
    a1 = aq;
    b1 = bq;
    a3 = ap;
    b3 = bp;
  }
  const vw low = widen(0xffffffffu);
  out[0] = (vu)((a0 & low) | (b0 << 32));
  out[1] = (vu)((a1 & low) | (b1 << 32));
  out[2] = (vu)((a2 & low) | (b2 << 32));
  out[3] = (vu)((a3 & low) | (b3 << 32));
}

// sqrt(-2 ln u), 2^-32 <= u <= 1. u = 2^e (1 + x), x in [sqrt(1/2) - 1, sqrt(2) - 1); ln(1 + x) = x + x^2 p(x), p
// fitted to the smallest relative error.
LUTRA_INLINE vf radius(vf u) {
  const vi base = (vi){} + 0x3f3504f3;  // sqrt(1/2)
  const vi i = (vi)u - base;
  const vf e = __builtin_convertvector(i >> 23, vf);
  const vf x = (vf)((i & 0x7fffff) + base) - 1.0f;
  vf p = splat(ln_term(0));
#pragma GCC unroll 7
  for (int j = 1; j < 8; ++j) p = p * x + ln_term(j);
  const vf ln = (x * x) * p + x + e * 0.69314718f;
  return square_root(ln * -2.0f);
}

LUTRA_INLINE void normals(vu a, vu b, float scale, vf* first, vf* second) {
  const vf u = __builtin_convertvector((vi)(a >> 1), vf) * 0x1p-31f + 0x1p-32f;
  const vf t = __builtin_convertvector((vi)(b << 2), vf) * 0x1p-31f, tt = t * t;
  const vf r = radius(u) * scale;
  vf c = splat(cos_term(0)), s = splat(sin_term(0));
#pragma GCC unroll 3
  for (int j = 1; j < 4; ++j) {
    c = c * tt + cos_term(j);
    s = s * tt + sin_term(j);
  }
  c = (vf)((vu)(c * r) ^ (b & 0x80000000u));
  s = s * t * r;
  const vi swap = (vi)(b << 1) >> 31;  // all ones where bit 30 is set
  const vi difference = ((vi)c ^ (vi)s) & swap;
  *first = (vf)((vi)c ^ difference);
  *second = (vf)((vi)s ^ difference);
}

struct Words {
  typedef int32_t type;
  LUTRA_INLINE void store(type* p, vf v) { *reinterpret_cast<vu_unaligned*>(p) = (vu)v; }
  LUTRA_INLINE void put(type* p, float f) { memcpy(p, &f, 4); }
};

// The 64 values of one group into `to`, by `Store`, or the first n of them.
template <class T, bool Normal>
LUTRA_INLINE void group(const Keys& keys, uint32_t g, uint32_t token, uint64_t sequence, float scale,
                        typename T::type* to, int n) {
  alignas(64) float rest[kGroup];
  for (int l = 0; l < kLanes; l += W) {
    vu words[4];
    vf values[4];
    philox(keys, g * kLanes + static_cast<uint32_t>(l), token, sequence, words);
    if (Normal) {
      normals(words[0], words[1], scale, values, values + 1);
      if (n > 2 * kLanes) normals(words[2], words[3], scale, values + 2, values + 3);
    } else {
      for (int w = 0; w < 4; ++w) values[w] = (vf)words[w];
    }
    if (n == kGroup)
      for (int w = 0; w < 4; ++w) T::store(to + w * kLanes + l, values[w]);
    else
      for (int w = 0; w < 4; ++w)
        if (w * kLanes + l < n) LUTRA_NS::store(rest + w * kLanes + l, values[w]);
  }
  if (n < kGroup)
    for (int i = 0; i < n; ++i) T::put(to + i, rest[i]);
}

template <class T, bool Normal, class Id>
void rows(const RandomRowsArgs& a, const Keys& keys, int64_t begin, int64_t end, BadFirst* bad) {
  const auto* ids = static_cast<const Id*>(a.ids);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = ids[i];
    if (static_cast<uint64_t>(token) >> 32) return bad->report(i);
    const uint64_t sequence = a.sequences ? static_cast<uint64_t>(a.sequences[i / a.per_sequence]) : 0;
    auto* to = static_cast<typename T::type*>(a.out) + i * a.dim;
    int64_t d = 0;
    uint32_t g = 0;
    for (; d + kGroup <= a.dim; d += kGroup, ++g)
      group<T, Normal>(keys, g, static_cast<uint32_t>(token), sequence, a.scale, to + d, kGroup);
    if (d < a.dim)
      group<T, Normal>(keys, g, static_cast<uint32_t>(token), sequence, a.scale, to + d, static_cast<int>(a.dim - d));
  }
}

template <class T, bool Normal>
void all_rows(const RandomRowsArgs& a, BadFirst* bad) {
  const Keys keys(a.seed);
  const double each = 5 + static_cast<double>((a.dim + kGroup - 1) / kGroup * kGroup) * (W == 4 ? 3.0 : 0.8);
  const int64_t grain = static_cast<int64_t>(40e3 / each) + 1;
  team_ranges(a.n, grain, each * static_cast<double>(a.n), [&](int64_t begin, int64_t end) {
    if (a.id_type == DType::i32)
      rows<T, Normal, int32_t>(a, keys, begin, end, bad);
    else
      rows<T, Normal, int64_t>(a, keys, begin, end, bad);
  });
}

}  // namespace

void random_rows(const RandomRowsArgs& a) {
  BadFirst bad;
  if (a.output == RandomOutput::words) {
    all_rows<Words, false>(a, &bad);
  } else {
    switch (a.dtype) {
      case DType::f16: all_rows<F16, true>(a, &bad); break;
      case DType::bf16: all_rows<BF16, true>(a, &bad); break;
      default: all_rows<F32, true>(a, &bad); break;
    }
  }
  *a.bad = bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
