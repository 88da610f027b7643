// Sixteen values make two bytes: the comparison's mask is the code.
#include "address/binarize.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <class T>
void rows(const BinarizeArgs& a, int64_t begin, int64_t end) {
  const int64_t b = (a.d + 7) / 8, whole = a.d / 16 * 16;
  for (int64_t i = begin; i < end; ++i) {
    const auto* x = static_cast<const typename T::type*>(a.x) + i * a.d;
    uint8_t* out = a.out + i * b;
    int64_t j = 0;
    for (; j < whole; j += 16) {
      uint32_t bits = 0;
      for (int v = 0; v < 16; v += W) bits |= mask_bits((vi)(T::load(x + j + v) > load(a.threshold + j + v))) << v;
      out[j / 8] = static_cast<uint8_t>(bits);
      out[j / 8 + 1] = static_cast<uint8_t>(bits >> 8);
    }
    for (; j < a.d; j += 8) {
      uint32_t bits = 0;
      for (int64_t t = 0; t < 8 && j + t < a.d; ++t)
        bits |= static_cast<uint32_t>(T::get(x + j + t) > a.threshold[j + t]) << t;
      out[j / 8] = static_cast<uint8_t>(bits);
    }
  }
}

}  // namespace

void binarize(const BinarizeArgs& a) {
  const double cost = static_cast<double>(a.n) * a.d * 0.15;
  const int64_t grain = 1 + 32768 / (1 + a.d);
  parallel_ranges(a.n, grain, cost, [&](int64_t begin, int64_t end) {
    switch (a.dtype) {
      case DType::f16: return rows<F16>(a, begin, end);
      case DType::bf16: return rows<BF16>(a, begin, end);
      default: return rows<F32>(a, begin, end);
    }
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
