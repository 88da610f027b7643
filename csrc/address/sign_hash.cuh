// The sign hash of one chunk, by one thread: what sign_hash and the fused memory layer share. Formula: sign_hash.h.
#pragma once
#include "common/device.cuh"

namespace lutra {
namespace cuda {

constexpr float kLog2e = 1.4426950408889634f;
inline float hash_scale(float temperature) { return -2.0f * kLog2e / temperature; }

struct ChunkHash {
  int32_t code = 0;
  float product = 1, total = 0;  // of 1 + exp(-2 |z| / t); of |z|
  __device__ __forceinline__ float weight(bool scaled) const { return (scaled ? total : 1.0f) / product; }
};

// z: `bits` values, a multiple of VEC, aligned to VEC of them. scale: hash_scale(temperature).
template <class T, int VEC>
__device__ __forceinline__ ChunkHash hash_chunk(const T* z, int bits, float scale) {
  ChunkHash h;
#pragma unroll 8 / VEC
  for (int i = 0; i < bits; i += VEC) {
    const auto v = load_pack<T, VEC>(z + i);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float a = fabsf(v[j]);
      h.code |= static_cast<int32_t>(v[j] >= 0) << (i + j);
      h.product *= 1.0f + exp2f(a * scale);
      h.total += a;
    }
  }
  return h;
}

}  // namespace cuda
}  // namespace lutra
