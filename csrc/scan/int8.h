// Products of 8-bit codes in registers, at a SIMD level: what the screened scan (screen.cc) and the screened
// assignment to centroids (address/assign.cc) share.
//
// A vector x (d) becomes codes in [-limit, limit] and a scale: x ~ scale * code, scale = max |x_j| / limit.
// "Rows" lie in blocks of 16 with 4 dimensions side by side, (ceil(d / 4), 16 rows, 4) bytes, stored as code + 128 in
// [1, 255]; "queries" keep their sign, and their 4 bytes of a step are broadcast. One instruction (vpdpbusd) then adds
// 4 products to each of 16 sums; sum (code + 128) q = sum code q + 128 sum q, and the last term is known for each
// query, so that it is where the sums start. Without VNNI, pmaddubsw adds two products into 16 bits, with saturation:
// queries are then coded with limit 63, for 2 * 255 * 63 < 2^15, and lose one bit. The sums themselves cannot overflow:
// |sum| <= d * 255 * 127 < 2^31 for d <= 66,000.
//
// What the codes lose is known, and bounds every score: with x = x^ + r, |r| = `lost`, and the same for q,
//   <q, x> = <q^, x^> + <q, r_x> + <r_q, x^>,   so   |<q, x> - <q^, x^>| <= |q| lost_x + lost_q |x^|.
#pragma once
#include "common/parallel.h"
#include "common/simd.h"
#include "scan/metric.h"

namespace lutra {
namespace LUTRA_NS {
namespace int8 {

constexpr int kBlock = 16;           // rows of a block
constexpr int kParts = kBlock / W;   // vectors of sums for a block and a query
constexpr int64_t kMaxDims = 65536;  // above, sums could leave 32 bits

static inline int64_t steps_of(int64_t d) { return (d + 3) / 4; }

#if defined(LUTRA_LEVEL_v4)
// In assembly, because an attribute would have to be given to every caller up to the loop. Used where has_vnni() says.
struct Vnni {
  static constexpr int kLimit = 127;
  LUTRA_INLINE vi add(vi sum, vi rows, vi query) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(rows), "v"(query));
    return sum;
  }
};
#endif
struct Pairs {
  static constexpr int kLimit = 63;
  LUTRA_INLINE vi add(vi sum, vi rows, vi query) {
#if defined(LUTRA_LEVEL_v4)
    const __m512i two = _mm512_maddubs_epi16((__m512i)rows, (__m512i)query);
    return sum + (vi)_mm512_madd_epi16(two, _mm512_set1_epi16(1));
#elif defined(LUTRA_LEVEL_v3)
    const __m256i two = _mm256_maddubs_epi16((__m256i)rows, (__m256i)query);
    return sum + (vi)_mm256_madd_epi16(two, _mm256_set1_epi16(1));
#elif defined(__SSSE3__)
    const __m128i two = _mm_maddubs_epi16((__m128i)rows, (__m128i)query);
    return sum + (vi)_mm_madd_epi16(two, _mm_set1_epi16(1));
#else
    uint8_t r[4 * W];
    int8_t q[4 * W];
    memcpy(r, &rows, sizeof r);
    memcpy(q, &query, sizeof q);
    for (int i = 0; i < W; ++i)
      for (int b = 0; b < 4; ++b) sum[i] += static_cast<int32_t>(r[4 * i + b]) * q[4 * i + b];
    return sum;
#endif
  }
};

// R blocks of rows (each `steps` * 64 bytes, one after another) with Q queries, whose bytes lie as (steps, Q, 4).
// Ahead: the blocks behind them are fetched meanwhile, for they come from memory.
template <class Dot, int R, int Q, bool Ahead = false>
LUTRA_INLINE void products(const uint8_t* rows, const int8_t* queries, int64_t steps, vi sum[R * kParts][Q]) {
  for (int64_t g = 0; g < steps; ++g) {
    if (Ahead)
      for (int r = 0; r < R; ++r) __builtin_prefetch(rows + (R * steps + g * R + r) * (4 * kBlock));
    vi x[R * kParts];
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < kParts; ++p)
        x[r * kParts + p] = *reinterpret_cast<const vi_unaligned*>(rows + (r * steps + g) * (4 * kBlock) + p * (4 * W));
    for (int i = 0; i < Q; ++i) {
      int32_t four;
      memcpy(&four, queries + (g * Q + i) * 4, 4);
      const vi q = (vi){} + four;
      for (int v = 0; v < R * kParts; ++v) sum[v][i] = Dot::add(sum[v][i], x[v], q);
    }
  }
}

// Where a bias is divided by scales, they are not smaller: the quotients stay in the range of floats.
constexpr float kLeastScale = 1e-15f;

struct Quantized {
  float scale;    // x ~ scale * code
  float square;   // |x|^2
  float norm;     // |x|
  float lost;     // |x - scale * code|
  float length;   // |code|
  int32_t total;  // sum of the codes
};

// v = x * factor - mean (null: 0), into codes of at most `limit`. `work` has room for d + W floats, `bytes` for
// d + W codes; behind the d-th they are zero. The norms are rounded up a little: they are used in bounds. A scale can
// be given that suits several vectors; values beyond its limit are then cut off, and counted as lost.
static inline Quantized quantize(const float* x, float factor, const float* mean, int64_t d, float limit, float* work,
                                 int8_t* bytes, float scale = 0) {
  const int64_t padded = (d + W - 1) / W * W;
  vf top = {}, square = {};
  const vi positive = (vi){} + 0x7fffffff;
  int64_t j = 0;
  for (; j < padded; j += W) {
    vf v;
    if (j + W <= d) {
      v = load(x + j) * factor;
      if (mean) v -= load(mean + j);
    } else {
      v = load_first(x + j, static_cast<int>(d - j)) * factor;
      if (mean) v -= load_first(mean + j, static_cast<int>(d - j));
    }
    store(work + j, v);
    const vf size = (vf)((vi)v & positive);
    top = size > top ? size : top;
    square += v * v;
  }
  float most[W], largest = 0;
  store(most, top);
  for (int i = 0; i < W; ++i) largest = most[i] > largest ? most[i] : largest;
  Quantized out;
  out.scale = scale > 0 ? scale : largest > 1e-30f ? largest / limit : 1e-30f;
  const float inverse = 1.0f / out.scale;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  vf lost = {}, length = {};
  vi total = {};
  for (j = 0; j < padded; j += W) {
    const vf v = load(work + j);
    vf units = v * inverse;
    if (scale > 0) {
      units = units > splat(limit) ? splat(limit) : units;
      units = units < splat(-limit) ? splat(-limit) : units;
    }
    const vf shifted = units + magic, whole = shifted - magic;
    const vi code = (vi)shifted - (vi)magic;
    const vf rest = v - whole * out.scale;
    lost += rest * rest;
    length += whole * whole;
    total += code;
#if defined(LUTRA_LEVEL_v4)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + j), _mm512_cvtepi32_epi8((__m512i)code));
#else
    for (int i = 0; i < W; ++i) bytes[j + i] = static_cast<int8_t>(code[i]);
#endif
  }
  const float up = 1.00001f;
  out.square = reduce_add(square);
  out.norm = sqrtf(out.square) * up;
  out.lost = sqrtf(reduce_add(lost)) * up + out.norm * 2e-7f;
  out.length = sqrtf(reduce_add(length)) * up;
  uint32_t sum = 0;  // unsigned: codes of NaN, whose rows the caller reports, may sum to anything
  for (int i = 0; i < W; ++i) sum += static_cast<uint32_t>(total[i]);
  out.total = static_cast<int32_t>(sum);
  return out;
}

// The codes of one row into its place of a block.
static inline void put_row(const int8_t* bytes, int64_t steps, int row, uint8_t* block) {
  for (int64_t g = 0; g < steps; ++g) {
    uint32_t four;
    memcpy(&four, bytes + 4 * g, 4);
    four ^= 0x80808080u;
    memcpy(block + (g * kBlock + row) * 4, &four, 4);
  }
}

// The codes of one query into place i of a group of `width`.
static inline void put_query(const int8_t* bytes, int64_t steps, int i, int width, int8_t* group) {
  for (int64_t g = 0; g < steps; ++g) memcpy(group + (g * width + i) * 4, bytes + 4 * g, 4);
}

}  // namespace int8
}  // namespace LUTRA_NS
}  // namespace lutra
