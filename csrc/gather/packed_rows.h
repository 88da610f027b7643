// Decoding packed rows (gather/packed.h) inside kernels, W columns at a time.
//
//   typedef PackedCodes<Packed::int4> C;
//   const Affine a = C::group(t, row, c / t.group);
//   vf x = C::load(row, c) * a.scale + a.minimum;       // columns [c, c + W), c a multiple of W
//   vf y = C::load_part(row, c, n) * ...;               // the last n < W columns; what is behind them is unspecified
//
// No group ends within a vector, since W divides 16. Where `load_mixed` is cheaper than `load` it gives the columns
// in another order, and `sort` puts a vector (an accumulator, say) right. At AVX-512 the 4- and 2-bit kinds are
// one broadcast from memory, one shift by lane and one permutation of a table in a register that takes the code from
// the lowest four bits of each lane: no code is taken out of its byte by itself.
//
// load reads only bytes of its W codes, load_part only bytes of its n.
#pragma once
#include "common/simd.h"
#include "gather/packed.h"

namespace lutra {
namespace LUTRA_NS {

struct Affine {
  float scale, minimum;  // value = scale * code + minimum
};

alignas(64) static const float kNF4[16] = {LUTRA_NF4_LEVELS};

LUTRA_INLINE float packed_f16(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return half_to_float(h);
}
LUTRA_INLINE float packed_f32(const uint8_t* p) {
  float f;
  memcpy(&f, p, 4);
  return f;
}

// Bytes of a vector of W codes, in the lowest part of an integer.
template <int Bits>
struct CodeBytes {
  static constexpr int bytes = W * Bits / 8;
  LUTRA_INLINE uint64_t load(const uint8_t* p) {  // at most 8 bytes
    uint64_t u = 0;
    memcpy(&u, p, bytes <= 8 ? bytes : 8);
    return u;
  }
  LUTRA_INLINE uint64_t load_part(const uint8_t* p, int n) {
    const int count = (n * Bits + 7) / 8;
#if defined(LUTRA_LEVEL_v4)
    return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), p)));
#else
    uint64_t u = 0;
    for (int i = 0; i < count && i < 8; ++i) u |= static_cast<uint64_t>(p[i]) << (8 * i);
    return u;
#endif
  }
};

// The n < W bytes at p, zeros behind them.
struct FewBytes {
  alignas(16) uint8_t b[W];
  FewBytes(const uint8_t* p, int n) {
#if defined(LUTRA_LEVEL_v4)
    _mm_store_si128(reinterpret_cast<__m128i*>(b), _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p));
#else
    for (int i = 0; i < W; ++i) b[i] = i < n ? p[i] : 0;
#endif
  }
};

// ---- 4 and 2 bits: the codes of a vector as lanes of integers
#if defined(LUTRA_LEVEL_v4)
LUTRA_INLINE __m512i lanes_of_4(uint64_t u) {  // in the lowest four bits of a lane; what is above them is not cleared
  const __m512i word = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i by = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i both = _mm512_castsi128_si512(_mm_cvtsi64_si128(static_cast<int64_t>(u)));
  return _mm512_srlv_epi32(_mm512_permutexvar_epi32(word, both), by);
}
// The even lanes hold columns 0 to 7, the odd ones 8 to 15: what a broadcast of 64 bits gives for nothing.
LUTRA_INLINE __m512i lanes_of_4_mixed(uint64_t u) {
  const __m512i by = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  return _mm512_srlv_epi32(_mm512_set1_epi64(static_cast<int64_t>(u)), by);
}
LUTRA_INLINE __m512i lanes_of_2(uint64_t u) {  // two codes in the lowest four bits, the lane's own below
  const __m512i by = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int32_t>(u)), by);
}
LUTRA_INLINE vf sort_lanes_of_4(vf v) {
  const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  return (vf)_mm512_permutexvar_ps(from, (__m512)v);
}
LUTRA_INLINE vf pick(__m512i lanes, __m512 table) { return (vf)_mm512_permutexvar_ps(lanes, table); }
LUTRA_INLINE __m512 ramp(int mask) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(mask)));
}
LUTRA_INLINE vf int4_of(__m512i lanes) { return pick(lanes, ramp(15)); }
LUTRA_INLINE vf int2_of(__m512i lanes) { return pick(lanes, ramp(3)); }
LUTRA_INLINE vf nf4_of(__m512i lanes) { return pick(lanes, _mm512_load_ps(kNF4)); }
#else
#if defined(LUTRA_LEVEL_v3)
LUTRA_INLINE vi lanes_of_4(uint64_t u) {
  const __m256i by = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  return (vi)_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int32_t>(u)), by) & 15;
}
LUTRA_INLINE vi lanes_of_2(uint64_t u) {
  const __m256i by = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  return (vi)_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int32_t>(u)), by) & 3;
}
LUTRA_INLINE vf nf4_of(vi lanes) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(kNF4), (__m256i)lanes);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(kNF4 + 8), (__m256i)lanes);
  return (vf)_mm256_blendv_ps(low, high, (__m256)(lanes << 28));
}
#else  // no shift by lane: multiply, which moves each code to the same place
LUTRA_INLINE vi lanes_of_4(uint64_t u) {
  return (((vi){} + static_cast<int32_t>(u)) * vi{1 << 12, 1 << 8, 1 << 4, 1} >> 12) & 15;
}
LUTRA_INLINE vi lanes_of_2(uint64_t u) {
  return (((vi){} + static_cast<int32_t>(u)) * vi{1 << 6, 1 << 4, 1 << 2, 1} >> 6) & 3;
}
LUTRA_INLINE vf nf4_of(vi lanes) { return vf{kNF4[lanes[0]], kNF4[lanes[1]], kNF4[lanes[2]], kNF4[lanes[3]]}; }
#endif
LUTRA_INLINE vi lanes_of_4_mixed(uint64_t u) { return lanes_of_4(u); }
LUTRA_INLINE vf sort_lanes_of_4(vf v) { return v; }
LUTRA_INLINE vf int4_of(vi lanes) { return __builtin_convertvector(lanes, vf); }
LUTRA_INLINE vf int2_of(vi lanes) { return __builtin_convertvector(lanes, vf); }
#endif

// ---- 8-bit floats: an f16 with the same fields is the value, of e4m3 256 times too small, subnormals included
#if defined(LUTRA_LEVEL_v4)
LUTRA_INLINE vf e5m2_of(const uint8_t* p) {
  const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (vf)_mm512_cvtph_ps(_mm256_slli_epi16(b, 8));
}
LUTRA_INLINE vf e4m3_of(const uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i w = _mm256_slli_epi16(_mm256_cvtepi8_epi16(b), 7);  // the sign twice, at bits 15 and 14
  const __m256i h = _mm256_and_si256(w, _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
  const __mmask16 nan = _mm_testn_epi8_mask(_mm_andnot_si128(b, _mm_set1_epi8(0x7f)), _mm_set1_epi8(0x7f));
  return (vf)_mm512_mask_blend_ps(nan, _mm512_cvtph_ps(h), _mm512_set1_ps(__builtin_nanf("")));
}
#else
LUTRA_INLINE vf e5m2_of(const uint8_t* p) {
#if defined(LUTRA_LEVEL_v3)
  const __m128i b = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return (vf)_mm256_cvtph_ps(_mm_slli_epi16(b, 8));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = half_to_float(static_cast<uint16_t>(p[i] << 8));
  return v;
#endif
}
LUTRA_INLINE vf e4m3_of(const uint8_t* p) {
  const vi code = widen_u8(p), magnitude = code & 0x7f;
  // As a float with the exponent moved by 112 = 120 - 8; the product also normalises subnormals.
  const vf value = (vf)((magnitude << 20) | ((code & 0x80) << 24)) * 5.192296858534828e33f;  // 2^112
  return magnitude == 0x7f ? splat(__builtin_nanf("")) : value;
}
#endif

// What the kinds share: where the codes and the groups lie.
template <Packed K>
struct PackedGroups {
  static constexpr int bits = packed_bits(K);
  static constexpr bool has_minimum = packed_affine(K);

  LUTRA_INLINE const uint8_t* groups(const PackedTable& t, const uint8_t* row) {
    return row + packed_code_bytes(K, t.dim);
  }
  // Scale and minimum of group g; scale is per unit of `load`.
  LUTRA_INLINE Affine group_at(const uint8_t* groups, int64_t g) {
    const uint8_t* p = groups + g * packed_group_bytes(K);
    if (packed_half_scales(K)) return Affine{packed_f16(p), has_minimum ? packed_f16(p + 2) : 0.0f};
    return Affine{packed_f32(p) * (K == Packed::e4m3 ? 256.0f : 1.0f), has_minimum ? packed_f32(p + 4) : 0.0f};
  }
  LUTRA_INLINE Affine group(const PackedTable& t, const uint8_t* row, int64_t g) { return group_at(groups(t, row), g); }
};

template <Packed K>
struct PackedCodes;

template <>
struct PackedCodes<Packed::int8> : PackedGroups<Packed::int8> {
  LUTRA_INLINE vf load(const uint8_t* row, int64_t c) { return U8::load(row + c); }
  LUTRA_INLINE vf load_part(const uint8_t* row, int64_t c, int n) { return U8::load(FewBytes(row + c, n).b); }
  LUTRA_INLINE vf load_mixed(const uint8_t* row, int64_t c) { return load(row, c); }
  LUTRA_INLINE vf load_mixed_part(const uint8_t* row, int64_t c, int n) { return load_part(row, c, n); }
  LUTRA_INLINE vf sort(vf v) { return v; }
};

template <>
struct PackedCodes<Packed::int4> : PackedGroups<Packed::int4> {
  typedef CodeBytes<4> B;
  LUTRA_INLINE vf load(const uint8_t* row, int64_t c) { return int4_of(lanes_of_4(B::load(row + c / 2))); }
  LUTRA_INLINE vf load_part(const uint8_t* row, int64_t c, int n) {
    return int4_of(lanes_of_4(B::load_part(row + c / 2, n)));
  }
  LUTRA_INLINE vf load_mixed(const uint8_t* row, int64_t c) { return int4_of(lanes_of_4_mixed(B::load(row + c / 2))); }
  LUTRA_INLINE vf load_mixed_part(const uint8_t* row, int64_t c, int n) {
    return int4_of(lanes_of_4_mixed(B::load_part(row + c / 2, n)));
  }
  LUTRA_INLINE vf sort(vf v) { return sort_lanes_of_4(v); }
};

template <>
struct PackedCodes<Packed::nf4> : PackedGroups<Packed::nf4> {
  typedef CodeBytes<4> B;
  LUTRA_INLINE vf load(const uint8_t* row, int64_t c) { return nf4_of(lanes_of_4(B::load(row + c / 2))); }
  LUTRA_INLINE vf load_part(const uint8_t* row, int64_t c, int n) {
    return nf4_of(lanes_of_4(B::load_part(row + c / 2, n)));
  }
  LUTRA_INLINE vf load_mixed(const uint8_t* row, int64_t c) { return nf4_of(lanes_of_4_mixed(B::load(row + c / 2))); }
  LUTRA_INLINE vf load_mixed_part(const uint8_t* row, int64_t c, int n) {
    return nf4_of(lanes_of_4_mixed(B::load_part(row + c / 2, n)));
  }
  LUTRA_INLINE vf sort(vf v) { return sort_lanes_of_4(v); }
};

template <>
struct PackedCodes<Packed::int2> : PackedGroups<Packed::int2> {
  typedef CodeBytes<2> B;
  LUTRA_INLINE vf load(const uint8_t* row, int64_t c) { return int2_of(lanes_of_2(B::load(row + c / 4))); }
  LUTRA_INLINE vf load_part(const uint8_t* row, int64_t c, int n) {
    return int2_of(lanes_of_2(B::load_part(row + c / 4, n)));
  }
  LUTRA_INLINE vf load_mixed(const uint8_t* row, int64_t c) { return load(row, c); }
  LUTRA_INLINE vf load_mixed_part(const uint8_t* row, int64_t c, int n) { return load_part(row, c, n); }
  LUTRA_INLINE vf sort(vf v) { return v; }
};

template <>
struct PackedCodes<Packed::e4m3> : PackedGroups<Packed::e4m3> {
  LUTRA_INLINE vf load(const uint8_t* row, int64_t c) { return e4m3_of(row + c); }
  LUTRA_INLINE vf load_part(const uint8_t* row, int64_t c, int n) { return e4m3_of(FewBytes(row + c, n).b); }
  LUTRA_INLINE vf load_mixed(const uint8_t* row, int64_t c) { return load(row, c); }
  LUTRA_INLINE vf load_mixed_part(const uint8_t* row, int64_t c, int n) { return load_part(row, c, n); }
  LUTRA_INLINE vf sort(vf v) { return v; }
};

template <>
struct PackedCodes<Packed::e5m2> : PackedGroups<Packed::e5m2> {
  LUTRA_INLINE vf load(const uint8_t* row, int64_t c) { return e5m2_of(row + c); }
  LUTRA_INLINE vf load_part(const uint8_t* row, int64_t c, int n) { return e5m2_of(FewBytes(row + c, n).b); }
  LUTRA_INLINE vf load_mixed(const uint8_t* row, int64_t c) { return load(row, c); }
  LUTRA_INLINE vf load_mixed_part(const uint8_t* row, int64_t c, int n) { return load_part(row, c, n); }
  LUTRA_INLINE vf sort(vf v) { return v; }
};

// The values of codes. An int8 row may span more than the largest float: scale * code is then beyond it where the value
// is not, and a multiplication that is not fused with the addition (SSE2) would give infinity. Halves stay below.
template <Packed K>
LUTRA_INLINE vf packed_values(vf codes, Affine a) {
  if (K != Packed::int8) return codes * a.scale + a.minimum;
  const vf half = codes * (0.5f * a.scale) + 0.5f * a.minimum;
  return half + half;
}

// Columns [first, first + n) of a row as T (F32, F16, BF16); first is a multiple of 16.
template <Packed K, class T>
LUTRA_INLINE void decode_columns(const PackedTable& t, const uint8_t* row, int64_t first, int64_t n,
                                 typename T::type* out) {
  typedef PackedCodes<K> C;
  const uint8_t* groups = C::groups(t, row);
  const int64_t last = first + n;
  for (int64_t c = first; c < last;) {
    const int64_t g = c / t.group, end = (g + 1) * t.group < last ? (g + 1) * t.group : last;
    const Affine a = C::group_at(groups, g);
    for (; c + W <= end; c += W) T::store(out + (c - first), packed_values<K>(C::load(row, c), a));
    if (c < end) {
      const int part = static_cast<int>(end - c);
      typename T::type padded[W];
      T::store(padded, packed_values<K>(C::load_part(row, c, part), a));
      memcpy(out + (c - first), padded, part * sizeof(padded[0]));
      c = end;
    }
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
