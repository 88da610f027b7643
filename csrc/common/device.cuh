// Small device helpers: scalar types, vector loads, warp sums, scratch layout.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/launch.cuh"
#include "common/types.h"

namespace lutra {
namespace cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// ---- scalars
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(uint8_t v) { return static_cast<float>(v); }
__device__ __forceinline__ float to_float(int8_t v) { return static_cast<float>(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two floats rounded to bfloat16, `low` in the lower half.
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  uint32_t pair;
  memcpy(&pair, &v, sizeof(pair));
  return pair;
}

// Values of a type that is known when the kernel runs.
__device__ __forceinline__ float load_as(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::f16: return to_float(static_cast<const __half*>(p)[i]);
    case DType::bf16: return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}
__device__ __forceinline__ void store_as(void* p, DType type, int64_t i, float v) {
  switch (type) {
    case DType::f16: static_cast<__half*>(p)[i] = from_float<__half>(v); break;
    case DType::bf16: static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(v); break;
    default: static_cast<float*>(p)[i] = v;
  }
}

__device__ __forceinline__ float quiet_nan() { return __int_as_float(0x7fc00000); }

// ---- N neighbouring values, moved as one access of sizeof(T) * N bytes (1, 2, 4, 8 or 16)
template <int BYTES>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <class T, int N>
struct Pack {
  typename Word<sizeof(T) * N>::type word;
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (std::is_same<T, __nv_bfloat16>::value && N >= 2) {
      // One instruction a value: the compiler would cut the upper half out before it shifts it back.
      uint32_t pairs[N / 2];
      memcpy(pairs, &word, sizeof(pairs));
      return __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
    } else {
      T v[N];
      memcpy(v, &word, sizeof(v));
      return to_float(v[i]);
    }
  }
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {  // p aligned to the access
  return {*reinterpret_cast<const typename Word<sizeof(T) * N>::type*>(p)};
}

// The i-th value of a row, of the 4 bytes that hold it.
template <class T>
__device__ __forceinline__ float value_of_word(uint32_t word, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(word);
  } else if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    return __uint_as_float(i & 1 ? word & 0xffff0000u : word << 16);
  } else if constexpr (std::is_same<T, __half>::value) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(i & 1 ? word >> 16 : word)));
  } else if constexpr (std::is_same<T, int8_t>::value) {
    return static_cast<float>(static_cast<int8_t>(word >> (i & 3) * 8));
  } else {
    return static_cast<float>(word >> (i & 3) * 8 & 255);
  }
}

// values[0..N) rounded to T, written 16 bytes at a time at most
template <class T, int N>
__device__ __forceinline__ void store_pack(T* p, const float* values) {
  constexpr int M = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
  using W = typename Word<sizeof(T) * M>::type;
#pragma unroll
  for (int i = 0; i < N; i += M) {
    T v[M];
#pragma unroll
    for (int j = 0; j < M; ++j) v[j] = from_float<T>(values[i + j]);
    W w;
    memcpy(&w, v, sizeof(w));
    *reinterpret_cast<W*>(p + i) = w;
  }
}

// ---- sums over a warp, the same tree every time
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) v += __shfl_xor_sync(kFullWarp, v, s);
  return v;
}

// The last of the stretches low .. high - 1 that begins at or before p; the first of them if none does.
__device__ __forceinline__ int64_t last_before(const int64_t* starts, int64_t low, int64_t high, int64_t p) {
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= p)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// ---- ids of either width
struct Ids {
  const void* p;
  bool wide;
  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
  }
};

// ---- host side
inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
// Bytes of a value of a row: floats and 8-bit integers.
inline int64_t element_bytes(DType t) { return t == DType::f32 ? 4 : t == DType::f16 || t == DType::bf16 ? 2 : 1; }
inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }
inline int power_of_two(int64_t at_least, int limit) {
  int p = 1;
  while (p < at_least && p < limit) p <<= 1;
  return p;
}
inline int log2_of(int power) {
  int b = 0;
  while ((1 << b) < power) ++b;
  return b;
}
// A grid of at most 2^31 - 1 blocks along x, or a clear error.
inline unsigned grid_x(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::length_error("lutra: the arrays need more than 2^31 - 1 CUDA blocks");
  return static_cast<unsigned>(blocks);
}

// Cuts a workspace into arrays. With a null base it only adds up their sizes.
class Carve {
 public:
  explicit Carve(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace cuda
}  // namespace lutra
