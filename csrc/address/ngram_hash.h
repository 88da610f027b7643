// The hashes of fastText and sent2vec (Bojanowski et al. 2017; Pagliardini et al. 2018), shared by text and token
// n-grams. Everything is static, so that each SIMD level keeps a copy of its own.
#pragma once
#include <cstdint>

#include "common/host_device.h"

namespace lutra {

// Rolling hash over token values: h = v_i; h = h * kNgramStep + v_j. Wraps at 2^64.
constexpr uint64_t kNgramStep = 116049371;

// 32-bit FNV-1a, one byte at a time. fastText's variant: the byte is a signed char, sign-extended.
constexpr uint32_t kFnvStart = 2166136261u, kFnvPrime = 16777619u;
static inline uint32_t fnv1a(uint32_t h, unsigned char byte) {
  return (h ^ static_cast<uint32_t>(static_cast<int32_t>(static_cast<signed char>(byte)))) * kFnvPrime;
}

// h mod n without a division: `inverse` is floor((2^64 - 1) / n). Then h/n - 1 < h * inverse / 2^64 <= h/n, so the
// quotient is at most one too small.
struct Modulus {
  uint64_t n, inverse;
};
static inline Modulus modulus(uint64_t n) { return Modulus{n, ~uint64_t{0} / n}; }
// The quotient, of which *rest is left over.
LUTRA_SHARED uint64_t divide(uint64_t h, Modulus m, uint64_t* rest) {
#ifdef __CUDA_ARCH__
  const uint64_t q = __umul64hi(h, m.inverse);
#else
  const uint64_t q = static_cast<uint64_t>((static_cast<unsigned __int128>(h) * m.inverse) >> 64);
#endif
  const uint64_t r = h - q * m.n;
  *rest = r >= m.n ? r - m.n : r;
  return r >= m.n ? q + 1 : q;
}
LUTRA_SHARED uint64_t mod(uint64_t h, Modulus m) {
  uint64_t rest;
  divide(h, m, &rest);
  return rest;
}

// Ids of the n-grams of 2..order values, by start, then by length; returns the end of what it wrote.
static inline int64_t* put_ngrams(const int64_t* values, int64_t count, int64_t order, int64_t first, Modulus m,
                                  int64_t* ids) {
  if (order < 2) return ids;
  if (order == 2) {  // the common case: independent iterations, which the processor overlaps
    for (int64_t i = 0; i + 1 < count; ++i) {
      const uint64_t h = static_cast<uint64_t>(values[i]) * kNgramStep + static_cast<uint64_t>(values[i + 1]);
      ids[i] = first + static_cast<int64_t>(mod(h, m));
    }
    return count > 1 ? ids + count - 1 : ids;
  }
  for (int64_t i = 0; i + 1 < count; ++i) {
    const int64_t end = count - i < order ? count : i + order;
    uint64_t h = static_cast<uint64_t>(values[i]);
    for (int64_t j = i + 1; j < end; ++j) {
      h = h * kNgramStep + static_cast<uint64_t>(values[j]);
      *ids++ = first + static_cast<int64_t>(mod(h, m));
    }
  }
  return ids;
}

}  // namespace lutra
