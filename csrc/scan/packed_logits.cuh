// How the codes of packed rows are cut for tensor cores and decoded to f16; see packed_logits.cu.
#pragma once
#include "common/mma.cuh"
#include "gather/packed_rows.cuh"
#include "scan/packed_logits.h"

namespace lutra {
namespace cuda {

constexpr int kChunk = 256, kPitch = kChunk + 16;  // bytes of a row in shared memory, and from row to row
constexpr int kTileRows = 16;

__host__ __device__ constexpr bool natural_order(Packed k) { return !packed_affine(k); }

// How the codes of a row are cut: units, of which a thread reads up to 4 bytes, steps of 16 columns in a unit. A group
// ends with a unit: where one does not end with 16 bytes, units are single steps.
template <Packed K, bool WIDE>
struct Cut {
  static constexpr int bits = packed_bits(K);
  static constexpr int unit = WIDE ? 16 : 2 * bits, steps = WIDE ? 8 / bits : 1, own = unit / 4;
  static constexpr int columns = 16 * steps;  // of a unit

  // Column i (0 to 3) of what the thread t of four multiplies in a step.
  __host__ __device__ static constexpr int64_t column_of(int64_t step, int t, int i) {
    const int s = static_cast<int>(step % steps), each = 4 * steps;
    const int at = natural_order(K) ? 4 * s + i : 2 * s + (i >> 1) + (i & 1) * (each / 2);
    return step / steps * columns + t * each + at;
  }
};

struct LogitsScan {
  PackedTable table;
  const uint2* image;  // [tokens / 8][steps][32][TERMS]
  const float* sums;   // [groups][padded]
  const float* units;  // [padded]
  const float* bias;
  void* out;
  uint32_t* all;  // instead of out: ordered_bits()
  DType dtype;
  int64_t tokens, padded, ldo, steps, groups, code_bytes;
  int token_groups, stages, align;
};

// ---- codes as f16

__device__ __forceinline__ uint32_t subtract_halves(uint32_t a, uint32_t b) {
  const __half2 d = __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// The codes of a thread in step s of a unit: columns 0, 1 of column_of() in a[0], 2 and 3 in a[1]. Integers: less
// `zero`, which is twice in f16, 1024 larger. nf4: `low` receives what f16 does not hold of the levels.
template <Packed K, bool WIDE>
__device__ __forceinline__ void decode(uint32_t word, int s, uint32_t zero, const uint32_t* levels, uint32_t (&a)[2],
                                       uint32_t (&low)[2]) {
  constexpr int bits = packed_bits(K);
  if constexpr (packed_affine(K)) {
    // 1024 + code in f16 has the code in its lowest bits
    constexpr uint32_t base = 0x64006400u, one = (1u << bits) - 1, mask = one | one << 16;
    if constexpr (!WIDE) {  // four codes: the last two go to the upper half
      word &= (1u << (4 * bits)) - 1;
      word |= word << (16 - 2 * bits);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t codes;
      if constexpr (K == Packed::int8) {
        codes = __byte_perm(word, base >> 8 & 255, i == 0 ? 0x4240 : 0x4341);
      } else {
        codes = (word >> (bits * (2 * s + i)) & mask) | base;
      }
      a[i] = subtract_halves(codes, zero);
    }
  } else if constexpr (K == Packed::nf4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t x = levels[word >> (16 * s + 8 * i) & 15], y = levels[word >> (16 * s + 8 * i + 4) & 15];
      a[i] = __byte_perm(x, y, 0x5410);
      low[i] = __byte_perm(x, y, 0x7632);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t h = __byte_perm(word, 0, i == 0 ? 0x1404 : 0x3424);  // upper halves of f16
      if constexpr (K == Packed::e4m3) {                            // see packed_rows.cuh: 256 times too small
        const uint32_t nan = ((h & 0x7f007f00u) + 0x01000100u) & 0x80008000u;
        h = (h & 0x80008000u) | (h >> 1 & 0x3f803f80u) | (nan - (nan >> 6));
      }
      a[i] = h;
    }
  }
}

struct ScaleOf {
  float scale, rest;  // of a code, and of the zero
  uint32_t zero;
};
template <Packed K>
__device__ __forceinline__ ScaleOf scale_of(const PackedRaw& raw) {
  const PackedSource<K, false> source{};
  const float scale = source.scale(raw);
  if (!packed_affine(K)) return {scale, 0.0f, 0};
  const float minimum = source.minimum(raw), most = static_cast<float>((1 << packed_bits(K)) - 1);
  const float zero = fminf(fmaxf(rintf(-minimum / scale), 0.0f), most);  // of a NaN 0
  const uint32_t half = 0x6400u + static_cast<uint32_t>(zero);
  return {scale, fmaf(scale, zero, minimum), half | half << 16};
}

}  // namespace cuda
}  // namespace lutra
