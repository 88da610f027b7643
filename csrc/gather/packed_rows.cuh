// Decoding packed rows (gather/packed.h) inside CUDA kernels, 8 neighbouring columns a thread.
//
//   PackedSource<K, FAST> t = packed_source<K, FAST>(table);
//   const PackedLane at = t.lane(column);     // column a multiple of 8 below dim; where codes and scales lie in a row
//   PackedRaw raw = t.load(row, at);          // loads only
//   t.values(raw, v);                         // 8 floats; those beyond dim are unspecified
//
// No group ends within 8 columns, since groups are multiples of 16. A row of 136 bytes (int8, 128 columns) at a
// multiple of 8 bytes touches 5 sectors of 32 bytes on average, one of 68 (int4) 3: that is what a read costs.
// FAST: codes lie such that a thread's are one access. Else what is as aligned as rows are is put together.
//
// Codes become floats without conversions (a quarter of the rate of other instructions): as the mantissa of a float
// whose exponent is fixed.
#pragma once
#include "common/device.cuh"
#include "gather/packed.h"

namespace lutra {
namespace cuda {

constexpr int kPackedColumns = 8;  // of a thread

__device__ __constant__ const float kNf4Levels[16] = {LUTRA_NF4_LEVELS};

// What codes and scales must be multiples of to be read fast: rows of nf4 have an odd number of halves as a rule.
__host__ __device__ constexpr int packed_step(Packed k) { return k == Packed::nf4 ? 2 : packed_bits(k); }

struct PackedLane {
  uint32_t code, tail;  // bytes from the beginning of a row
  int bytes;            // of codes; fewer at the row's end
};
struct PackedRaw {
  uint32_t code[2];
  uint32_t tail[2];
};

// BYTES (2, 4 or 8) at p, which lies at a multiple of `align`.
template <int BYTES>
__device__ __forceinline__ void load_bytes(const uint8_t* p, int align, uint32_t (&w)[2]) {
  if (BYTES == 8) {
    if (align >= 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      w[0] = v.x, w[1] = v.y;
      return;
    }
    if (align == 4) {
      w[0] = *reinterpret_cast<const uint32_t*>(p);
      w[1] = *reinterpret_cast<const uint32_t*>(p + 4);
      return;
    }
  }
  if (BYTES == 4 && align >= 4) {
    w[0] = *reinterpret_cast<const uint32_t*>(p);
    return;
  }
  if (align >= 2) {
#pragma unroll
    for (int i = 0; i < BYTES; i += 4) {
      w[i / 4] = *reinterpret_cast<const uint16_t*>(p + i);
      if (BYTES > 2) w[i / 4] |= static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(p + i + 2)) << 16;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < BYTES; i += 4) {
    w[i / 4] = 0;
#pragma unroll
    for (int b = 0; b < (BYTES < 4 ? BYTES : 4); ++b) w[i / 4] |= static_cast<uint32_t>(p[i + b]) << (8 * b);
  }
}

template <Packed K, bool FAST>
struct PackedSource {
  static constexpr int bits = packed_bits(K), bytes = kPackedColumns * bits / 8, tail_bytes = packed_group_bytes(K);
  const uint8_t* data;
  int64_t rows, dim, group;
  uint32_t row_bytes;
  int align;

  __device__ __forceinline__ PackedLane lane(int64_t column) const {
    const int64_t code = column * bits / 8, all = packed_code_bytes(K, dim);
    const int64_t g = group >= dim ? 0 : column / group;
    return PackedLane{static_cast<uint32_t>(code), static_cast<uint32_t>(all + g * tail_bytes),
                      all - code < bytes ? static_cast<int>(all - code) : bytes};
  }

  __device__ __forceinline__ PackedRaw load(uint32_t row, const PackedLane& at) const {
    PackedRaw raw;
    const uint8_t* p = data + static_cast<uint64_t>(row) * row_bytes;
    if (FAST) {
      load_bytes<bytes>(p + at.code, packed_step(K), raw.code);
      load_bytes<tail_bytes>(p + at.tail, tail_bytes < packed_step(K) ? tail_bytes : packed_step(K), raw.tail);
      return raw;
    }
    if (at.bytes == bytes) {
      load_bytes<bytes>(p + at.code, align, raw.code);
    } else {
      raw.code[0] = raw.code[1] = 0;
#pragma unroll
      for (int b = 0; b < bytes; ++b)
        if (b < at.bytes) raw.code[b / 4] |= static_cast<uint32_t>(p[at.code + b]) << (8 * (b & 3));
    }
    load_bytes<tail_bytes>(p + at.tail, align, raw.tail);
    return raw;
  }

  __device__ __forceinline__ float scale(const PackedRaw& raw) const {
    if (packed_half_scales(K)) return __half2float(__ushort_as_half(static_cast<unsigned short>(raw.tail[0])));
    return __uint_as_float(raw.tail[0]) * (K == Packed::e4m3 ? 256.0f : 1.0f);
  }
  __device__ __forceinline__ float minimum(const PackedRaw& raw) const {
    if (!packed_affine(K)) return 0;
    if (packed_half_scales(K)) return __half2float(__ushort_as_half(static_cast<unsigned short>(raw.tail[0] >> 16)));
    return __uint_as_float(raw.tail[1]);
  }

  // Codes as floats, to be multiplied by `scale`. `levels`: kNf4Levels in shared memory, nf4 only.
  __device__ __forceinline__ void codes(const PackedRaw& raw, const float* levels, float (&v)[kPackedColumns]) const {
    if (K == Packed::int8) {
#pragma unroll
      for (int j = 0; j < 8; ++j)  // 2^23 + code
        v[j] = __uint_as_float(__byte_perm(raw.code[j / 4], 0x4b000000u, 0x7540u + (j & 3))) - 8388608.0f;
    } else if (K == Packed::int4 || K == Packed::int2) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t code = raw.code[0] >> (bits * j) & ((1u << bits) - 1);
        v[j] = __uint_as_float(code | 0x4b000000u) - 8388608.0f;
      }
    } else if (K == Packed::nf4) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = levels[raw.code[0] >> (4 * j) & 15];
    } else {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        // Two bytes as the upper halves of two f16. e5m2 is f16 without its last byte; e4m3 has an exponent of one bit
        // less: moved down by one it is an f16, 256 times too small, subnormals included.
        uint32_t h = __byte_perm(raw.code[i / 4], 0, (i & 3) == 0 ? 0x1404 : 0x3424);
        bool nan0 = false, nan1 = false;
        if (K == Packed::e4m3) {
          nan0 = (h & 0x7f00u) == 0x7f00u, nan1 = (h & 0x7f000000u) == 0x7f000000u;
          h = (h & 0x80008000u) | (h >> 1 & 0x3f803f80u);
        }
        const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&h));
        v[i] = nan0 ? quiet_nan() : f.x;
        v[i + 1] = nan1 ? quiet_nan() : f.y;
      }
    }
  }

  __device__ __forceinline__ void values(const PackedRaw& raw, const float* levels, float (&v)[kPackedColumns]) const {
    codes(raw, levels, v);
    const float s = scale(raw), m = minimum(raw);
#pragma unroll
    for (int j = 0; j < kPackedColumns; ++j) v[j] = packed_affine(K) ? fmaf(s, v[j], m) : s * v[j];
  }

  // sum += w * row / kUnit; the minimum goes to what all columns share. An int8 row may span more than the largest
  // float: its halves do not.
  static constexpr float kUnit = K == Packed::int8 ? 2.0f : 1.0f;
  __device__ __forceinline__ void add(const PackedRaw& raw, const float* levels, float w, float (&sum)[kPackedColumns],
                                      float* shift) const {
    float v[kPackedColumns];
    codes(raw, levels, v);
    if (K == Packed::int8) w *= 0.5f;
    const float s = w * scale(raw);
#pragma unroll
    for (int j = 0; j < kPackedColumns; ++j) sum[j] = fmaf(s, v[j], sum[j]);
    if (packed_affine(K)) *shift = fmaf(w, minimum(raw), *shift);
  }
};

// What addresses of codes and scales are multiples of, at most 8.
inline int packed_align(const PackedTable& t) {
  const int64_t codes = packed_code_bytes(t.kind, t.dim);
  uintptr_t all = reinterpret_cast<uintptr_t>(t.data) | static_cast<uintptr_t>(t.row_bytes) |
                  static_cast<uintptr_t>(codes) | static_cast<uintptr_t>(8);
  if (t.group < t.dim) all |= static_cast<uintptr_t>(packed_group_bytes(t.kind));
  all |= static_cast<uintptr_t>(packed_bits(t.kind));  // codes of a thread: 8, 4 or 2 bytes
  return static_cast<int>(all & (~all + 1));
}

inline bool packed_fast(const PackedTable& t) {
  return t.dim % kPackedColumns == 0 && packed_align(t) >= packed_step(t.kind);
}

template <Packed K, bool FAST>
PackedSource<K, FAST> packed_source(const PackedTable& t) {
  if (t.rows > 0xffffffff || t.row_bytes > 0xffffffff)
    throw std::length_error("lutra: packed rows on CUDA: fewer than 2^32 rows, of fewer than 2^32 bytes");
  return {t.data, t.rows, t.dim, t.group, static_cast<uint32_t>(t.row_bytes), packed_align(t)};
}

// nf4: the levels in shared memory, where 32 threads read 16 words without conflicts. All threads of a block call it.
template <Packed K>
__device__ __forceinline__ const float* packed_levels(float* shared16) {
  if (K != Packed::nf4) return nullptr;
  if (threadIdx.x < 16) shared16[threadIdx.x] = kNf4Levels[threadIdx.x];
  __syncthreads();
  return shared16;
}

}  // namespace cuda
}  // namespace lutra
