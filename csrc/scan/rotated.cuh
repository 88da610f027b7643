// Look-ups in shared memory without bank conflicts, for rows of byte codes that are taken 16 bytes at a time.
//
// Tables come in units: 16 tables of E entries for W queries, fp32. Entry e of all 16 lies in the 128 bytes (W = 4:
// 256) from 256 e on, table j in banks of its own. A lane takes the 16 codes of a row in an order of its own, at step s
// look-up s ^ lane (modulo 16, or modulo 8 where W = 4 queries share a read of 16 bytes), so that the lanes that are
// served together always read different banks; with W = 1 the half-warps have a copy each. The codes are brought into
// that order once a row, and one byte permutation makes an address of a code and the lane's place.
#pragma once
#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace rotated {

// Where unit u begins, in bytes of shared memory: with W < 4 two units lie side by side.
template <int W, int E>
__host__ __device__ constexpr int unit_at(int u) {
  return W == 4 ? u * E * 256 : (u >> 1) * E * 256 + (u & 1) * 128;
}
__host__ __device__ constexpr int64_t unit_bytes(int width, int entries, int units) {
  return static_cast<int64_t>(width == 4 ? units : (units + 1) / 2) * entries * 256;
}

// Copies units from device memory, [units][E][16][W], to shared memory. THREADS threads of a block.
template <int W, int E, int THREADS>
__device__ __forceinline__ void fill(const float* image, int units, char* shared) {
  const float4* from = reinterpret_cast<const float4*>(image);
  for (int i = threadIdx.x; i < units * E * 4 * W; i += THREADS) {
    const int u = i / (E * 4 * W), e = i / (4 * W) % E, f = i % (4 * W);
    char* to = shared + unit_at<W, E>(u) + e * 256 + f * 16;
    const float4 v = from[i];
    *reinterpret_cast<float4*>(to) = v;
    if (W == 1) *reinterpret_cast<float4*>(to + 64) = v;
  }
}

// What a lane needs to know of its order.
struct Lane {
  uint32_t place[4];  // byte b of word i: where the table of step 4 i + b (modulo 8 where W = 4) lies
  unsigned bytes;     // for __byte_perm: byte b comes from byte b ^ (lane & 3)
  int lane;
};

template <int W>
__device__ __forceinline__ Lane lane_of() {
  Lane l;
  l.lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    l.place[i] = 0;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int s = 4 * i + b;
      const int at =
          W == 4 ? 16 * ((s & 7) ^ (l.lane & 7)) : 4 * W * (s ^ (l.lane & 15)) + (W == 1 ? (l.lane & 16) * 4 : 0);
      l.place[i] |= static_cast<uint32_t>(at) << (8 * b);  // at most 127: its sign is 0
    }
  }
  l.bytes = 0;
#pragma unroll
  for (int b = 0; b < 4; ++b) l.bytes |= static_cast<unsigned>(b ^ (l.lane & 3)) << (4 * b);
  // Kept in registers: the compiler would rather work them out again in every turn of the loop.
#pragma unroll
  for (int i = 0; i < 4; ++i) opaque(l.place[i]);
  opaque(l.bytes);
  return l;
}

// 16 codes in a lane's order: byte s becomes byte s ^ (lane modulo 16, or 8).
template <int W>
__device__ __forceinline__ void reorder(const Lane& l, uint32_t (&v)[4]) {
  if (W != 4) {
    const bool far = l.lane & 8;
    const uint32_t a = far ? v[2] : v[0], b = far ? v[3] : v[1], c = far ? v[0] : v[2], d = far ? v[1] : v[3];
    v[0] = a, v[1] = b, v[2] = c, v[3] = d;
  }
  const bool odd = l.lane & 4;
  const uint32_t a = odd ? v[1] : v[0], b = odd ? v[0] : v[1], c = odd ? v[3] : v[2], d = odd ? v[2] : v[3];
  v[0] = __byte_perm(a, 0, l.bytes), v[1] = __byte_perm(b, 0, l.bytes);
  v[2] = __byte_perm(c, 0, l.bytes), v[3] = __byte_perm(d, 0, l.bytes);
}

// sum += the look-ups of R rows in the unit at `look`, entries of 4 bytes; v in the lane's order.
template <int W, int R, class T>
__device__ __forceinline__ void add_up(const Lane& l, const char* look, const uint32_t (&v)[R][4], T (&sum)[R][W]) {
#pragma unroll
  for (int s = 0; s < 16; ++s) {
    const unsigned b = s & 3;
    // byte 0: the lane's place; byte 1: the code; bytes 2 and 3: the sign of the place, 0
    const unsigned pick = (4 + b) | b << 4 | (12 + b) << 8 | (12 + b) << 12;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const uint32_t at = permuted(v[r][s >> 2], l.place[s >> 2], pick);
      const auto word = *reinterpret_cast<const typename Word<4 * W>::type*>(look + at + (W == 4 && s >= 8 ? 128 : 0));
      T t[W];
      memcpy(t, &word, sizeof(t));
#pragma unroll
      for (int w = 0; w < W; ++w) sum[r][w] += t[w];
    }
  }
}

}  // namespace rotated
}  // namespace cuda
}  // namespace lutra
