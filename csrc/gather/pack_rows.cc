#include "common/parallel.h"
#include "common/simd.h"
#include "common/team.h"
#include "gather/bag_ids.h"
#include "gather/packed.h"
#include "gather/packed_rows.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr float kHalfMost = 65504.0f;

// ---- f16 in a given direction
LUTRA_INLINE uint16_t half_below(float f) {
  const uint16_t h = float_to_half(f);
  if (!(half_to_float(h) > f)) return h;
  return h & 0x8000u ? h + 1 : h ? h - 1 : 0x8001u;
}
LUTRA_INLINE uint16_t half_above(float f) {  // f >= 0
  const uint16_t h = float_to_half(f);
  return half_to_float(h) < f ? h + 1 : h;
}

struct Noise {  // of a row
  uint64_t key;
  Noise(uint64_t seed, int64_t row) : key(packed_noise_key(seed, row)) {}
  uint32_t bits(int64_t column) const { return packed_noise(key, column); }
};
LUTRA_INLINE float unit(uint32_t bits) { return static_cast<float>(static_cast<int32_t>(bits >> 8)) * 0x1p-24f; }

// ---- codes of columns [begin, end) of a row, a byte each
template <bool Random>
static void affine_codes(const float* x, int64_t begin, int64_t end, float scale, float minimum, float most,
                         const Noise& noise, uint8_t* out) {
  const float s = scale * 0.5f, low = minimum * 0.5f;  // halves: a row from -2e38 to 2e38 must not overflow
  for (int64_t j = begin; j < end; ++j) {
    const float t = (x[j] * 0.5f - low) / s;
    float c = Random ? __builtin_floorf(t + unit(noise.bits(j))) : __builtin_rintf(t);
    c = c > 0 ? c : 0;
    c = c < most ? c : most;
    out[j] = static_cast<uint8_t>(static_cast<int32_t>(c));
  }
}

template <bool Random>
static void nf4_codes(const float* x, int64_t begin, int64_t end, float scale, const Noise& noise, uint8_t* out) {
  const float s = scale > 0 ? scale : 1.0f;
  for (int64_t j = begin; j < end; ++j) {
    const float t = x[j] / s;
    int32_t c = 0;
    if (Random) {  // a level is passed with the probability of the way to it that has been made
      const float u = unit(noise.bits(j));
      for (int k = 0; k < 15; ++k) c += t - kNF4[k] > u * (kNF4[k + 1] - kNF4[k]);
    } else {
      for (int k = 0; k < 15; ++k) c += t > (kNF4[k] + kNF4[k + 1]) * 0.5f;
    }
    out[j] = static_cast<uint8_t>(c);
  }
}

// An 8-bit float with M bits of mantissa, whose smallest normal number is 2^Low and whose largest is `most`.
template <bool Random, int M, int Low>
static void float_codes(const float* x, int64_t begin, int64_t end, float scale, float most, const Noise& noise,
                        uint8_t* out) {
  constexpr int kDrop = 23 - M;
  constexpr uint32_t kBase = static_cast<uint32_t>(127 + Low - 1) << M;  // exponent field 1 stands for 2^Low
  const float s = scale > 0 ? scale : 1.0f;
  uint32_t ulp_bits = static_cast<uint32_t>(127 - Low + M) << 23;  // 1 / the smallest subnormal
  float per_ulp, smallest;
  memcpy(&per_ulp, &ulp_bits, 4);
  const uint32_t smallest_bits = static_cast<uint32_t>(127 + Low) << 23;
  memcpy(&smallest, &smallest_bits, 4);
  for (int64_t j = begin; j < end; ++j) {
    const float t = x[j] / s;
    float a = t < 0 ? -t : t;
    a = a < most ? a : most;
    uint32_t u;
    memcpy(&u, &a, 4);
    const uint32_t r = Random ? noise.bits(j) : 0;
    u += Random ? r & ((1u << kDrop) - 1) : (1u << (kDrop - 1)) - 1 + ((u >> kDrop) & 1);
    const uint32_t normal = (u >> kDrop) - kBase;
    const float flat = Random ? __builtin_floorf(a * per_ulp + unit(r)) : __builtin_rintf(a * per_ulp);
    const uint32_t code = a < smallest ? static_cast<uint32_t>(static_cast<int32_t>(flat)) : normal;
    out[j] = static_cast<uint8_t>(code | (t < 0 ? 0x80u : 0u));
  }
}

// ---- a row
template <Packed K, bool Random>
static void pack_row(const PackRowsArgs& a, const float* x, int64_t i, int64_t row, uint8_t* codes) {
  const int64_t dim = a.out.dim;
  uint8_t* out = const_cast<uint8_t*>(a.out.data) + row * a.out.row_bytes;
  uint8_t* tail = out + packed_code_bytes(K, dim);
  const Noise noise(a.seed, row);
  constexpr float kMost = K == Packed::int8 ? 255 : K == Packed::int4 ? 15 : 3;
  const int64_t groups = dim ? (dim + a.out.group - 1) / a.out.group : 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * a.out.group, end = begin + a.out.group < dim ? begin + a.out.group : dim;
    float low = x[begin], high = x[begin], scale = 0, minimum = 0;
    for (int64_t j = begin; j < end; ++j) {
      low = x[j] < low ? x[j] : low;
      high = x[j] > high ? x[j] : high;
    }
    const float far = -low > high ? -low : high;  // the largest magnitude, where 0 lies inside
    const float magnitude = low > far ? low : far;
    if (a.scale) {
      scale = a.scale[i * groups + g];
      if (packed_affine(K))
        minimum = a.minimum ? a.minimum[i * groups + g] : -scale * (kMost == 255 ? 128.0f : (kMost + 1) * 0.5f);
      if (packed_half_scales(K)) {
        const uint16_t h = float_to_half(scale);
        scale = half_to_float(h ? h : 1);
        minimum = half_to_float(float_to_half(minimum));
      }
    } else if (K == Packed::int8) {
      minimum = low;
      scale = high / 255.0f - low / 255.0f;
    } else if (packed_affine(K)) {
      minimum = half_to_float(half_below(low));
      scale = half_to_float(half_above((high - minimum) / kMost));
    } else if (K == Packed::nf4) {
      scale = half_to_float(half_above(magnitude));
    } else {
      scale = magnitude / (K == Packed::e4m3 ? 448.0f : 57344.0f);
    }
    if (packed_affine(K)) {
      if (!(scale >= 1e-37f)) scale = 1;  // a (nearly) constant row: code 0, its minimum
      affine_codes<Random>(x, begin, end, scale, minimum, kMost, noise, codes);
    } else if (K == Packed::nf4) {
      nf4_codes<Random>(x, begin, end, scale, noise, codes);
    } else if (K == Packed::e4m3) {
      float_codes<Random, 3, -6>(x, begin, end, scale, 448.0f, noise, codes);
    } else {
      float_codes<Random, 2, -14>(x, begin, end, scale, 57344.0f, noise, codes);
    }
    uint8_t* p = tail + g * packed_group_bytes(K);
    if (packed_half_scales(K)) {
      const uint16_t h[2] = {float_to_half(scale), float_to_half(minimum)};
      memcpy(p, h, packed_group_bytes(K));
    } else {
      const float f[2] = {scale, minimum};
      memcpy(p, f, packed_group_bytes(K));
    }
  }
  constexpr int kPer = 8 / packed_bits(K);  // codes is filled with zeros up to a whole byte of codes
  if (kPer == 1) {
    if (dim) memcpy(out, codes, dim);
  } else {
    for (int64_t j = dim; j % kPer; ++j) codes[j] = 0;
    for (int64_t b = 0; b < packed_code_bytes(K, dim); ++b) {
      uint32_t byte = 0;
      for (int k = 0; k < kPer; ++k) byte |= static_cast<uint32_t>(codes[b * kPer + k]) << (k * packed_bits(K));
      out[b] = static_cast<uint8_t>(byte);
    }
  }
}

// Row i as floats: the table's own, or converted into a buffer.
template <class T>
LUTRA_INLINE const float* row_of(const PackRowsArgs& a, int64_t i, float* buffer) {
  const auto* p = static_cast<const typename T::type*>(a.table) + i * a.out.dim;
  if (sizeof(*p) == 4) return reinterpret_cast<const float*>(p);
  const int64_t dim = a.out.dim;
  int64_t j = 0;
  for (; j + W <= dim; j += W) store(buffer + j, T::load(p + j));
  for (; j < dim; ++j) buffer[j] = T::get(p + j);
  return buffer;
}

template <class T>
static void check_rows(const PackRowsArgs& a, int64_t begin, int64_t end, bool half, BadFirst* infinite,
                       BadFirst* large) {
  Buffer<float> buffer(a.out.dim);
  for (int64_t i = begin; i < end; ++i) {
    const float* x = row_of<T>(a, i, buffer.data);
    uint32_t most = 0;  // of the magnitudes' bits, which are ordered as the magnitudes are
    for (int64_t j = 0; j < a.out.dim; ++j) {
      uint32_t u;
      memcpy(&u, x + j, 4);
      u &= 0x7fffffffu;
      most = u > most ? u : most;
    }
    float f;
    memcpy(&f, &most, 4);
    if (most >= 0x7f800000u)
      infinite->report(i);
    else if (half && f > kHalfMost)
      large->report(i);
  }
}

template <class T, Packed K>
static void write_rows(const PackRowsArgs& a, int64_t begin, int64_t end) {
  Buffer<float> buffer(a.out.dim);
  Buffer<uint8_t> codes(a.out.dim + 8);
  for (int64_t i = begin; i < end; ++i) {
    const float* x = row_of<T>(a, i, buffer.data);
    const int64_t row = a.ids ? a.ids[i] : i;
    if (a.stochastic)
      pack_row<K, true>(a, x, i, row, codes.data);
    else
      pack_row<K, false>(a, x, i, row, codes.data);
  }
}

template <class T>
static void write_kind(const PackRowsArgs& a, int64_t begin, int64_t end) {
  switch (a.out.kind) {
    case Packed::int8: return write_rows<T, Packed::int8>(a, begin, end);
    case Packed::int4: return write_rows<T, Packed::int4>(a, begin, end);
    case Packed::int2: return write_rows<T, Packed::int2>(a, begin, end);
    case Packed::nf4: return write_rows<T, Packed::nf4>(a, begin, end);
    case Packed::e4m3: return write_rows<T, Packed::e4m3>(a, begin, end);
    case Packed::e5m2: return write_rows<T, Packed::e5m2>(a, begin, end);
  }
}

template <class T>
static void all_rows(const PackRowsArgs& a) {
  const bool half = packed_half_scales(a.out.kind);
  const int64_t grain = 1 + 16384 / (a.out.dim + 1);
  const double values = static_cast<double>(a.n) * static_cast<double>(a.out.dim);
  BadFirst infinite, large;
  team_ranges(a.n, grain, values * 0.1, [&](int64_t b, int64_t e) { check_rows<T>(a, b, e, half, &infinite, &large); });
  *a.bad = infinite.result() >= 0 ? infinite.result() : large.result() >= 0 ? -2 - large.result() : -1;
  if (*a.bad != -1) return;
  const bool together = !a.ids || a.unique;  // one thread where two could write one row
  team_ranges(a.n, together ? grain : a.n, together ? values : 0,
              [&](int64_t b, int64_t e) { write_kind<T>(a, b, e); });
}

}  // namespace

void pack_rows(const PackRowsArgs& a) {
  switch (a.dtype) {
    case DType::f16: return all_rows<F16>(a);
    case DType::bf16: return all_rows<BF16>(a);
    default: return all_rows<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
