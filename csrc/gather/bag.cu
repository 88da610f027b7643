// Bag on CUDA; formula and conventions are in bag.h, the kernel is in bag_kernel.cuh.
//
// 8-bit rows with their scale and minimum in arrays beside the table cost two more sectors of 32 bytes an id, as much
// as 64 columns of codes: packed rows (packed.h) hold them behind the codes.
#include "gather/bag.h"

#include "common/device.cuh"
#include "gather/bag_kernel.cuh"

namespace lutra {
namespace cuda {
namespace {

template <class T>
struct Out {
  using type = T;
};
template <>
struct Out<uint8_t> {
  using type = float;
};
template <>
struct Out<int8_t> {
  using type = float;
};

template <class T, int VEC>
struct DenseRows {
  static constexpr bool kCodes = sizeof(T) == 1;
  static constexpr float kUnit = 1;
  static constexpr int kBlocks = 4;
  struct Raw {
    Pack<T, VEC> pack;
    float scale, minimum;
  };
  const T* table;
  int64_t rows, dim;
  uint32_t row_bytes;
  const float* scale;
  const float* minimum;
  typename Out<T>::type* out;

  __device__ __forceinline__ int context(float*) const { return 0; }
  __device__ __forceinline__ int64_t lane(int64_t column) const { return column; }
  __device__ __forceinline__ Raw load(uint32_t row, int64_t column) const {
    Raw raw;
    const char* p = reinterpret_cast<const char*>(table) + static_cast<uint64_t>(row) * row_bytes;
    raw.pack = load_pack<T, VEC>(reinterpret_cast<const T*>(p) + column);
    if (kCodes) raw.scale = scale[row], raw.minimum = minimum[row];
    return raw;
  }
  // Codes as floats without conversions: as the mantissa of 2^23 (signed ones moved by 128).
  __device__ __forceinline__ void codes(const Raw& raw, float (&v)[VEC]) const {
    constexpr bool kSigned = static_cast<T>(-1) < static_cast<T>(0);
    if constexpr (VEC % 4 == 0) {
      uint32_t words[VEC / 4];
      memcpy(words, &raw.pack.word, sizeof(words));
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const uint32_t word = kSigned ? words[j / 4] ^ 0x80808080u : words[j / 4];
        v[j] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540u + (j & 3))) - (kSigned ? 8388736.0f : 8388608.0f);
      }
    } else {
#pragma unroll
      for (int j = 0; j < VEC; ++j) v[j] = raw.pack[j];
    }
  }
  __device__ __forceinline__ void values(const Raw& raw, int, float (&v)[VEC]) const {
    if constexpr (kCodes) {
      codes(raw, v);
#pragma unroll
      for (int j = 0; j < VEC; ++j) v[j] = fmaf(raw.scale, v[j], raw.minimum);
    } else {
#pragma unroll
      for (int j = 0; j < VEC; ++j) v[j] = raw.pack[j];
    }
  }
  __device__ __forceinline__ void add(const Raw& raw, int, float w, float (&sum)[VEC], float* shift) const {
    if constexpr (kCodes) {
      float v[VEC];
      codes(raw, v);
      const float s = w * raw.scale;
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] = fmaf(s, v[j], sum[j]);
      *shift = fmaf(w, raw.minimum, *shift);
    } else {
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] = fmaf(w, raw.pack[j], sum[j]);
    }
  }
  __device__ __forceinline__ void store(int64_t bag, int64_t column, float (&v)[VEC]) const {
    store_pack<typename Out<T>::type, VEC>(out + bag * dim + column, v);
  }
};

constexpr int kInFlight = 4;

template <class T, int VEC>
void by_mode(const BagArgs& a, const Launch& l) {
  if (a.ld * static_cast<int64_t>(sizeof(T)) > 0xffffffff) throw std::length_error("lutra: bag on CUDA: rows too long");
  const DenseRows<T, VEC> source{static_cast<const T*>(a.table),
                                 a.rows,
                                 a.dim,
                                 static_cast<uint32_t>(a.ld * static_cast<int64_t>(sizeof(T))),
                                 a.scale,
                                 a.minimum,
                                 static_cast<typename Out<T>::type*>(a.out)};
  if (a.bag.mode == Mode::max)
    run_bag<VEC, true, kInFlight>("bag", a.bag, source, a.weights, a.argmax, l);
  else
    run_bag<VEC, false, kInFlight>("bag", a.bag, source, a.weights, a.argmax, l);
}

template <class T, int WIDE>
void by_width(const BagArgs& a, const Launch& l) {
  const auto fits = [&](int vec) {
    const size_t out = sizeof(typename Out<T>::type) * vec;
    return a.dim % vec == 0 && a.ld % vec == 0 && aligned(a.table, vec * sizeof(T)) &&
           aligned(a.out, out < 16 ? out : 16);
  };
  if (fits(WIDE)) return by_mode<T, WIDE>(a, l);
  if (WIDE > 4 && fits(4)) return by_mode<T, 4>(a, l);
  by_mode<T, 1>(a, l);
}

}  // namespace

void bag(const BagArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.dtype) {
    case DType::f16: return by_width<__half, 8>(a, l);
    case DType::bf16: return by_width<__nv_bfloat16, 8>(a, l);
    case DType::u8: return by_width<uint8_t, 8>(a, l);
    case DType::i8: return by_width<int8_t, 8>(a, l);
    default: return by_width<float, 4>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
