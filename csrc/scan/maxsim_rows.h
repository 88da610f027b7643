// Documents of scan/maxsim.cc as rows that can be multiplied: where they lie, or converted and decoded into scratch.
#pragma once
#include "common/parallel.h"
#include "scan/maxsim.h"
#include "scan/maxsim_tile.h"
#include "scan/metric.h"

namespace lutra {
namespace LUTRA_NS {
namespace late {

enum class Read { where_they_lie, copied, converted, decoded };

// `Bits` wide codes of W dimensions from j on, a multiple of W; all of them are there.
template <int Bits>
LUTRA_INLINE vi codes_at(const uint8_t* row, int64_t j) {
  const uint8_t* p = row + j * Bits / 8;
  if constexpr (Bits == 8) return widen_u8(p);
#if defined(LUTRA_LEVEL_v4)
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if constexpr (Bits == 4) {
    int32_t two[2];
    memcpy(two, p, 8);
    const vi words = lane < 8 ? (vi){} + two[0] : (vi){} + two[1];
    return words >> (lane % 8 * 4) & 15;
  } else {
    int32_t word = 0;
    memcpy(&word, p, 2 * Bits);
    return ((vi){} + word) >> (lane * Bits) & ((1 << Bits) - 1);
  }
#elif defined(LUTRA_LEVEL_v3)
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
  int32_t word = 0;
  memcpy(&word, p, Bits);
  return ((vi){} + word) >> (lane * Bits) & ((1 << Bits) - 1);
#else
  vi codes;
  for (int i = 0; i < W; ++i) codes[i] = row[(j + i) * Bits / 8] >> ((j + i) * Bits % 8) & ((1 << Bits) - 1);
  return codes;
#endif
}

// values[code] of each lane; `values` has room for 16 and more.
template <int Bits>
LUTRA_INLINE vf look_up(const float* values, vi code) {
#if defined(LUTRA_LEVEL_v4)
  if constexpr (Bits == 8) return (vf)_mm512_i32gather_ps((__m512i)code, values, 4);
  return (vf)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(values));
#elif defined(LUTRA_LEVEL_v3)
  if constexpr (Bits == 8) return (vf)_mm256_i32gather_ps(values, (__m256i)code, 4);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), (__m256i)code);
  if constexpr (Bits < 4) return (vf)low;
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values + 8), (__m256i)code);
  return (vf)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)code, 28)));
#else
  vf found;
  for (int i = 0; i < W; ++i) found[i] = values[code[i]];
  return found;
#endif
}

template <int Bits>
static inline void decode(const MaxsimArgs& a, const float* values, int64_t begin, int64_t count, float* out,
                          float* factor, int64_t* bad) {
  for (int64_t i = 0; i < count; ++i, out += a.d) {
    const uint8_t* code = static_cast<const uint8_t*>(a.x) + (begin + i) * a.ldx;
    int64_t id = a.centroid_ids[begin + i];
    if (id < 0 || id >= a.centroid_count) {
      if (*bad < 0 || begin + i < *bad) *bad = begin + i;
      memset(out, 0, static_cast<size_t>(a.d) * 4);
      if (factor) factor[i] = 0;
      continue;
    }
    if (i + 4 < count) {
      const int64_t next = a.centroid_ids[begin + i + 4];
      if (next >= 0 && next < a.centroid_count)
        for (int64_t j = 0; j < a.d; j += 16) __builtin_prefetch(a.centroids + next * a.d + j);
    }
    const float* centroid = a.centroids + id * a.d;
    int64_t j = 0;
    for (; j + W <= a.d; j += W) store(out + j, load(centroid + j) + look_up<Bits>(values, codes_at<Bits>(code, j)));
    for (; j < a.d; ++j) out[j] = centroid[j] + values[code[j * Bits / 8] >> (j * Bits % 8) & ((1 << Bits) - 1)];
    if (factor) factor[i] = inverse_norm(out, a.d);
  }
}

template <class T>
static inline void convert(const typename T::type* x, int64_t ldx, int64_t d, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i, x += ldx, out += d) {
    int64_t j = 0;
    for (; j + W <= d; j += W) store(out + j, T::load(x + j));
    for (; j < d; ++j) out[j] = T::get(x + j);
  }
}

// The sum of a row's codes.
LUTRA_INLINE int32_t total_of(const int8_t* x, int64_t d) {
  int64_t j = 0;
  int32_t total = 0;
#if defined(LUTRA_LEVEL_v4)  // where it is called there is VNNI
  const vi ones = (vi){} + 0x01010101;
  vi sum = {};
  for (; j < d; j += 64) {
    const __mmask64 mask = d - j >= 64 ? ~0ull : (1ull << (d - j)) - 1;
    const vi codes = (vi)_mm512_maskz_loadu_epi8(mask, x + j);
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(ones), "v"(codes));
  }
  total = _mm512_reduce_add_epi32((__m512i)sum);
#endif
  for (; j < d; ++j) total += x[j];
  return total;
}

struct Scratch {  // of one thread, for `rows` rows
  char* rows;
  float* factor;
  int32_t* total;
};

class Source {
 public:
  const MaxsimArgs& a;
  Read how;
  bool integers;          // rows are multiplied as bytes
  int64_t steps, stride;  // of a row in scratch, in bytes

  Source(const MaxsimArgs& args, int64_t steps_, bool bfloats, bool integers_)
      : a(args), integers(integers_), steps(steps_), stride(4 * steps_) {
    const int64_t bytes = a.x_type == DType::f32 ? 4 * a.d : bfloats ? 2 * a.d : a.d;
    if (a.x_type == DType::u8)
      how = Read::decoded;
    else if (a.x_type == DType::f32 || bfloats || integers)
      how = bytes == stride ? Read::where_they_lie : Read::copied;
    else
      how = Read::converted;
    if (a.x_type == DType::u8) {
      for (int i = 0; i < 256; ++i) values_[i] = i < 1 << a.bits ? a.values[i] : 0.0f;
    }
  }
  int64_t scratch_bytes(int64_t rows) const { return how == Read::where_they_lie ? 0 : rows * stride; }

  // The rows from `begin` on will be read soon. Not where they are converted, one after another.
  void fetch(int64_t begin) const {
    if (how != Read::where_they_lie) return;
    const int64_t bytes = row_bytes(), rows = a.x_rows - begin < 16 ? a.x_rows - begin : 16;
    const char* x = static_cast<const char*>(a.x) + begin * a.ldx * element();
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(x + i * a.ldx * element() + b);
  }

  // Rows [begin, begin + count) of x; the first of them goes to place `at` of the scratch.
  Rows prepare(int64_t begin, int64_t count, const Scratch& s, int64_t at, int64_t* bad) const {
    Rows r;
    r.steps = steps;
    r.count = count;
    r.mask = a.x_mask ? a.x_mask + begin : nullptr;
    r.factor = a.x_scale ? a.x_scale + begin : nullptr;
    r.total = nullptr;
    r.first = begin;
    r.ahead = how == Read::where_they_lie;
    const int64_t size = element();
    const char* x = static_cast<const char*>(a.x) + begin * a.ldx * size;
    char* out = s.rows + at * stride;
    r.x = r.ahead ? x : out;
    r.stride = r.ahead ? a.ldx * size : stride;
    if (how == Read::copied) {
      for (int64_t i = 0; i < count; ++i) {
        memset(out + i * stride + stride - 4, 0, 4);
        memcpy(out + i * stride, x + i * a.ldx * size, static_cast<size_t>(a.d * size));
      }
    }
    if (integers) {
      r.total = s.total + at;
      for (int64_t i = 0; i < count; ++i)
        s.total[at + i] = total_of(reinterpret_cast<const int8_t*>(x) + i * a.ldx, a.d);
    }
    float* floats = reinterpret_cast<float*>(out);
    if (how == Read::converted) {
      if (a.x_type == DType::f16) convert<F16>(reinterpret_cast<const uint16_t*>(x), a.ldx, a.d, count, floats);
      if (a.x_type == DType::bf16) convert<BF16>(reinterpret_cast<const uint16_t*>(x), a.ldx, a.d, count, floats);
      if (a.x_type == DType::i8) convert<I8>(reinterpret_cast<const int8_t*>(x), a.ldx, a.d, count, floats);
    }
    if (how == Read::decoded) {
      float* factor = a.unit ? s.factor + at : nullptr;
      r.factor = factor;
      switch (a.bits) {
        case 1: decode<1>(a, values_, begin, count, floats, factor, bad); break;
        case 2: decode<2>(a, values_, begin, count, floats, factor, bad); break;
        case 4: decode<4>(a, values_, begin, count, floats, factor, bad); break;
        default: decode<8>(a, values_, begin, count, floats, factor, bad);
      }
    }
    return r;
  }

 private:
  int64_t element() const {
    return a.x_type == DType::f32 ? 4 : a.x_type == DType::f16 || a.x_type == DType::bf16 ? 2 : 1;
  }
  int64_t row_bytes() const { return a.x_type == DType::u8 ? (a.d * a.bits + 7) / 8 : a.d * element(); }

  alignas(64) float values_[256];
};

}  // namespace late
}  // namespace LUTRA_NS
}  // namespace lutra
