// Rows of a collection on their way into the screen (knn_screen.cuh): values of any type become tiles of bf16 terms,
// and what belongs to a row (r0, r1) comes from its sum of squares.
#pragma once
#include <type_traits>

#include "common/device.cuh"
#include "common/mma.cuh"
#include "scan/knn_screen.h"

namespace lutra {
namespace cuda {

constexpr float kPacked = 0x1p-17f;  // what a score may lose, of its size, by a number in its lowest bits

// ---- rows of the collection: 8 values at a time
template <class T>
struct Piece {
  static constexpr int kWords = sizeof(T) * 8 / 4;
  uint32_t word[kWords];
};

// 8 values at an address aligned to 16 bytes (8-bit values: 8), or zeros.
template <class T>
__device__ __forceinline__ Piece<T> load_vector(const T* from, bool here) {
  Piece<T> p;
#pragma unroll
  for (int i = 0; i < Piece<T>::kWords; ++i) p.word[i] = 0;
  if (!here) return p;
  if constexpr (sizeof(T) == 1) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    p.word[0] = v.x, p.word[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < Piece<T>::kWords; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from + i * 4 / sizeof(T));
      p.word[i] = v.x, p.word[i + 1] = v.y, p.word[i + 2] = v.z, p.word[i + 3] = v.w;
    }
  }
  return p;
}

// The first `columns` of 8 values, the rest 0; any address.
template <class T>
__device__ __forceinline__ Piece<T> load_values(const T* from, int columns) {
  Piece<T> p;
#pragma unroll
  for (int i = 0; i < Piece<T>::kWords; ++i) p.word[i] = 0;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if (c < columns) {
      uint32_t bits;
      if constexpr (sizeof(T) == 4) {
        bits = reinterpret_cast<const uint32_t*>(from)[c];
      } else if constexpr (sizeof(T) == 2) {
        bits = reinterpret_cast<const uint16_t*>(from)[c];
      } else {
        bits = reinterpret_cast<const uint8_t*>(from)[c];
      }
      p.word[c * sizeof(T) / 4] |= bits << (c * sizeof(T) % 4 * 8);
    }
  }
  return p;
}

template <class T>
__device__ __forceinline__ float piece_value(const Piece<T>& p, int i) {
  return value_of_word<T>(p.word[i * sizeof(T) / 4], i);
}

// Writes the piece as bf16 (and with RT = 2 what the rounding loses) to its places; adds the squares to *squares.
template <class T, int RT>
__device__ __forceinline__ void store_piece(const Piece<T>& p, unsigned char* high, unsigned char* low,
                                            float* squares) {
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = piece_value(p, i);
#pragma unroll
  for (int i = 0; i < 8; ++i) *squares = fmaf(v[i], v[i], *squares);
  uint4 h;
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    h = make_uint4(p.word[0], p.word[1], p.word[2], p.word[3]);
  } else {
    h = make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
  }
  *reinterpret_cast<uint4*>(high) = h;
  if constexpr (RT == 2) {
    const uint32_t w[4] = {h.x, h.y, h.z, h.w};
    uint32_t rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rest[i] = bf16_pair(v[2 * i] - __uint_as_float(w[i] << 16), v[2 * i + 1] - __uint_as_float(w[i] & 0xffff0000u));
    *reinterpret_cast<uint4*>(low) = make_uint4(rest[0], rest[1], rest[2], rest[3]);
  }
}

// r0 and r1 of a row from its sum of squares (of d values; fp32, any order of summation).
template <class T, bool NEAREST>
__device__ __forceinline__ float2 row_terms(const ScreenArgs& a, int64_t row, float squares) {
  const float infinity = __int_as_float(0x7f800000);
  const bool cosine = a.mode == kScreenCosine;
  const bool valid = row < a.n && (!a.keep || (a.keep[row >> 3] >> (row & 7) & 1));
  // Finite for the nearest: best_of_tile would count the row beside it twice for each NaN.
  if (NEAREST && !valid) return make_float2(0, -3e38f);
  if (!valid) return cosine ? make_float2(0, -infinity) : make_float2(-infinity, 0);
  const float slack = static_cast<float>(a.d + 16) * 0x1p-24f;
  if (!cosine) {
    // 1e-17 for what squares lose below 1e-38; the sum of squares is right to a part in `slack`.
    const float norm = fmaf(sqrtf(squares), 1.0f + slack + 0x1p-20f, 1e-17f);
    float shift = 0;
    if (a.l2) shift = -0.5f * squares * (1.0f - 2 * slack - (NEAREST ? kPacked : 0x1p-20f));
    if (NEAREST && !(squares < kPlainSquares)) *a.nearest.broken = 1;
    if (a.bias) shift = fmaf(fabsf(a.bias[row]), 0x1p-20f, a.bias[row]);
    return make_float2(norm, shift);
  }
  if (squares > 1e-30f && squares < 1e37f) return make_float2(rsqrtf(squares), 0);
  if (squares == 0) {
    const T* x = static_cast<const T*>(a.x) + row * a.ldx;
    bool zero = true;
    for (int k = 0; k < a.d; ++k) zero = zero && to_float(x[k]) == 0;
    if (zero) return make_float2(0, 0);
  }
  return make_float2(0, infinity);  // always a candidate: its norm is not known well enough
}

}  // namespace cuda
}  // namespace lutra
