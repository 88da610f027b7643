// Where the pieces of rows lie: addresses from stored codes or from arithmetic on ids. See pieces.h.
#pragma once
#include "common/parallel.h"
#include "common/simd.h"
#include "gather/entries.h"
#include "gather/pieces.h"

#define LUTRA_UNROLL_16 _Pragma("GCC unroll 16")

namespace lutra {
namespace LUTRA_NS {

// x div d and x mod d for x below 2^31 by multiplication with 2^64 / d (Lemire, Kaser, Kurz, arXiv 1902.01961).
struct Divisor {
  uint64_t d, inverse;
  explicit Divisor(int64_t n) : d(static_cast<uint64_t>(n)), inverse(~uint64_t{0} / d + 1) {}
  uint64_t div(uint64_t x) const {
    return d == 1 ? x : static_cast<uint64_t>((static_cast<unsigned __int128>(inverse) * x) >> 64);
  }
  uint64_t mod(uint64_t x) const {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(inverse * x) * d) >> 64);
  }
};

// Codes and factors lie at random places and little is done with each, so that many must be under way at once: far
// ahead and into the second-level cache, which waits for more misses than the first (see rows.h). 82,000 codes of 16
// bytes out of 16 MB: 5.5 ms with 32 ahead into the first level.
constexpr int64_t kCodesAhead = 128;
LUTRA_INLINE void prefetch_codes(const PieceSource& s, int64_t id) {
  const uint8_t* c = s.codes + id * s.code_bytes;
  for (int64_t i = 0; i < s.code_bytes; i += 64) __builtin_prefetch(c + i, 0, 2);
  if ((reinterpret_cast<uintptr_t>(c) & 63) + static_cast<uint64_t>(s.code_bytes & 63) > 64)
    __builtin_prefetch(c + s.code_bytes - 1, 0, 2);
}

// put(e, j, row, sign) for each id index[e] and each piece j in [j0, j1), e by e; sign is 1 or (robe) -1. False where
// a stored address lies outside the table.
template <class Put>
LUTRA_INLINE bool piece_rows(const PieceSource& s, const int64_t* index, int64_t n, int64_t j0, int64_t j1,
                             const Put& put) {
  const int64_t* a = s.numbers;
  switch (s.kind) {
    case PieceKind::codes: {
      const int bits = static_cast<int>(a[1]);
      const int64_t ksub = int64_t{1} << bits;
      for (int64_t e = 0; e < n; ++e) {
        const uint8_t* c = s.codes + index[e] * s.code_bytes;
        if (e + kCodesAhead < n) prefetch_codes(s, index[e + kCodesAhead]);
        if (bits == 8) {
          for (int64_t j = j0; j < j1; ++j) put(e, j, j * 256 + c[j], 1);
        } else if (bits == 4) {
          for (int64_t j = j0; j < j1; ++j) put(e, j, j * 16 + (c[j >> 1] >> (j & 1) * 4 & 15), 1);
        } else {
          for (int64_t j = j0; j < j1; ++j) {
            const int64_t first = j * bits >> 3, last = (j * bits + bits - 1) >> 3;
            uint32_t word = 0;
            for (int64_t i = last; i >= first; --i) word = word << 8 | c[i];
            put(e, j, j * ksub + (word >> (j * bits & 7) & static_cast<uint32_t>(ksub - 1)), 1);
          }
        }
      }
      return true;
    }
    case PieceKind::digits: {
      const Divisor q(a[1]);
      for (int64_t e = 0; e < n; ++e) {
        uint64_t x = static_cast<uint64_t>(index[e]);
        for (int64_t j = 0; j < j1; ++j) {
          const uint64_t above = j + 1 < s.m ? q.div(x) : 0;  // the last digit is all that is left
          if (j >= j0) put(e, j, j * a[2] + static_cast<int64_t>(x - above * q.d), 1);
          x = above;
        }
      }
      return true;
    }
    case PieceKind::qr: {
      const Divisor c(a[0]);
      for (int64_t e = 0; e < n; ++e) {
        const uint64_t x = static_cast<uint64_t>(index[e]), above = c.div(x);
        if (j0 == 0) put(e, 0, static_cast<int64_t>(above), 1);
        if (j1 == 2) put(e, 1, a[1] + static_cast<int64_t>(x - above * c.d), 1);
      }
      return true;
    }
    case PieceKind::hash: {
      const Divisor size(a[1]);
      for (int64_t e = 0; e < n; ++e) {
        const uint64_t x = static_cast<uint64_t>(index[e]) % kPiecePrime;
        for (int64_t j = j0; j < j1; ++j) {
          const uint64_t h =
              (static_cast<uint64_t>(a[2 + j]) * x + static_cast<uint64_t>(a[2 + a[0] + j])) % kPiecePrime;
          put(e, j, static_cast<int64_t>(size.mod(h)), 1);
        }
      }
      return true;
    }
    case PieceKind::robe: {
      const Divisor size(a[1]);
      for (int64_t e = 0; e < n; ++e) {
        const uint64_t x = static_cast<uint64_t>(index[e]) % kPiecePrime;
        const uint64_t h0 = static_cast<uint64_t>(a[2]) * x + static_cast<uint64_t>(a[4]);
        const uint64_t g0 = static_cast<uint64_t>(a[5]) * x + static_cast<uint64_t>(a[7]);
        for (int64_t j = j0; j < j1; ++j) {
          const uint64_t h = (h0 + static_cast<uint64_t>(a[3]) * static_cast<uint64_t>(j)) % kPiecePrime;
          const uint64_t g = (g0 + static_cast<uint64_t>(a[6]) * static_cast<uint64_t>(j)) % kPiecePrime;
          put(e, j, static_cast<int64_t>(size.mod(h)), g & 1 ? -1 : 1);
        }
      }
      return true;
    }
    case PieceKind::modulo: {
      const Divisor size(a[0]);
      for (int64_t e = 0; e < n; ++e) put(e, 0, static_cast<int64_t>(size.mod(static_cast<uint64_t>(index[e]))), 1);
      return true;
    }
    default: {
      const Divisor size(a[0]);
      for (int64_t e = 0; e < n; ++e) {
        const uint64_t x = static_cast<uint64_t>(index[e]), block = size.div(x);
        if (e + 32 < n) __builtin_prefetch(s.remap + size.div(static_cast<uint64_t>(index[e + 32])));
        const int64_t row = static_cast<int64_t>(s.remap[block]) * a[0] + static_cast<int64_t>(x - block * size.d);
        if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(s.table_rows)) return false;
        put(e, 0, row, 1);
      }
      return true;
    }
  }
}

// The addresses of stored codes, times `scale`, in 32 bits: at (n, m). What piece_rows gives, by vectors. `known` ids
// follow at index, of which n are wanted now; those behind are prefetched.
LUTRA_INLINE void code_offsets(const PieceSource& s, const int64_t* index, int64_t n, int64_t known, uint32_t scale,
                               uint32_t* at) {
  const int bits = static_cast<int>(s.numbers[1]);
  const int64_t m = s.m, bytes = s.code_bytes;
  const uint32_t step = scale << bits, mask = (1u << bits) - 1;
  const uint8_t* end = s.codes + s.rows * bytes;
  for (int64_t e = 0; e < n; ++e, at += m) {
    const uint8_t* c = s.codes + index[e] * bytes;
    if (e + kCodesAhead < known) prefetch_codes(s, index[e + kCodesAhead]);
    if (bits == 8) {
      for (int64_t j = 0; j < m; ++j) at[j] = static_cast<uint32_t>(j) * step + c[j] * scale;
    } else if (bits == 4) {
      const int64_t pairs = m / 2;
      for (int64_t i = 0; i < pairs; ++i) {
        at[2 * i] = static_cast<uint32_t>(2 * i) * step + (c[i] & 15u) * scale;
        at[2 * i + 1] = static_cast<uint32_t>(2 * i + 1) * step + (c[i] >> 4) * scale;
      }
      if (m & 1) at[m - 1] = static_cast<uint32_t>(m - 1) * step + (c[pairs] & 15u) * scale;
    } else if (bits < 8) {  // eight codes are a word of as many bytes as a code has bits
      for (int64_t j = 0; j < m; j += 8, c += bits) {
        uint64_t word = 0;
        if (c + 8 <= end)
          memcpy(&word, c, 8);
        else
          for (int64_t i = 0; c + i < end; ++i) word |= static_cast<uint64_t>(c[i]) << 8 * i;
        const int64_t some = m - j < 8 ? m - j : 8;
        for (int64_t k = 0; k < some; ++k)
          at[j + k] = static_cast<uint32_t>(j + k) * step + (static_cast<uint32_t>(word >> k * bits) & mask) * scale;
      }
    } else {
      for (int64_t j = 0; j < m; ++j) {
        const int64_t first = j * bits >> 3, last = (j * bits + bits - 1) >> 3;
        uint32_t word = 0;
        for (int64_t i = last; i >= first; --i) word = word << 8 | c[i];
        at[j] = static_cast<uint32_t>(j) * step + (word >> (j * bits & 7) & mask) * scale;
      }
    }
  }
}

// All addresses times `scale` in 32 bits: at (n, m).
LUTRA_INLINE bool piece_offsets(const PieceSource& s, const int64_t* index, int64_t n, int64_t known, uint32_t scale,
                                uint32_t* at) {
  if (s.kind == PieceKind::codes) {
    code_offsets(s, index, n, known, scale, at);
    return true;
  }
  return piece_rows(s, index, n, 0, s.m, [&](int64_t e, int64_t j, int64_t row, int) {
    at[e * s.m + j] = static_cast<uint32_t>(row) * scale;
  });
}

// ---- small vectors: M lanes, at most W
template <int M>
struct Lanes {
  typedef float type __attribute__((vector_size(M * 4)));
  typedef float unaligned __attribute__((vector_size(M * 4), aligned(4), may_alias));
};
template <>
struct Lanes<1> {
  typedef float type;
  typedef float unaligned __attribute__((may_alias));
};

template <class T>
struct is_half {
  static constexpr bool value = false;
};
template <>
struct is_half<F16> {
  static constexpr bool value = true;
};

template <class T, int M>
struct LanesOf {
  typedef typename Lanes<M>::type V;
  LUTRA_INLINE V load(const uint16_t* p) {
    float x[M];
    if constexpr (M == W) {
      return T::load(p);
    } else if constexpr (M < 4) {
      for (int i = 0; i < M; ++i) x[i] = T::get(p + i);
#if defined(LUTRA_LEVEL_v3) || defined(LUTRA_LEVEL_v4)
    } else if constexpr (M == 4) {
      const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      if constexpr (is_half<T>::value)
        return (V)_mm_cvtph_ps(h);
      else
        return (V)_mm_slli_epi32(_mm_cvtepu16_epi32(h), 16);
    } else if constexpr (M == 8) {
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (is_half<T>::value)
        return (V)_mm256_cvtph_ps(h);
      else
        return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#endif
    } else {
      for (int i = 0; i < M; ++i) x[i] = T::get(p + i);
    }
    return *reinterpret_cast<const typename Lanes<M>::unaligned*>(x);
  }
};
template <int M>
struct LanesOf<F32, M> {
  typedef typename Lanes<M>::type V;
  LUTRA_INLINE V load(const float* p) { return *reinterpret_cast<const typename Lanes<M>::unaligned*>(p); }
};
template <int M>
LUTRA_INLINE void store_lanes(float* p, typename Lanes<M>::type v) {
  *reinterpret_cast<typename Lanes<M>::unaligned*>(p) = v;
}

// The number of lanes that a piece of so many columns takes: a power of two.
LUTRA_INLINE int lanes_for(int64_t width) {
  int lanes = 1;
  while (lanes < width) lanes *= 2;
  return lanes;
}

}  // namespace LUTRA_NS
}  // namespace lutra
