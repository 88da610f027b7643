#include "common/parallel.h"
#include "graph/keys.h"
#include "scan/metric.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <class T>
void write_row(const float* x, int64_t d, int64_t values, float factor, typename T::type* out) {
  for (int64_t j = 0; j < d; ++j) T::put(out + j, x[j] * factor);
  for (int64_t j = d; j < values; ++j) out[j] = 0;
}

void write_bytes(const GraphEncodeArgs& a, const float* x, float factor, uint8_t* out, float* terms) {
  int8_t* codes = reinterpret_cast<int8_t*>(out);
  terms[0] = int8_codes(x, a.d, factor, codes);
  int32_t squares = 0;
  for (int64_t j = 0; j < a.d; ++j) {
    squares += codes[j] * codes[j];
    out[j] ^= 0x80;
  }
  for (int64_t j = a.d; j < a.stride; ++j) out[j] = 0x80;
  terms[1] = a.metric == Metric::l2 ? terms[0] * terms[0] * static_cast<float>(squares) : 0.0f;
}

}  // namespace

void graph_encode(const GraphEncodeArgs& a) {
  parallel_ranges(a.n, 64, static_cast<double>(a.n) * a.d, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* x = a.x + i * a.d;
      uint8_t* out = a.rows + i * a.stride;
      const float factor = a.normalise ? inverse_norm(x, a.d) : 1.0f;
      uint16_t* halves = reinterpret_cast<uint16_t*>(out);
      switch (a.storage) {
        case DType::f16: write_row<F16>(x, a.d, a.stride / 2, factor, halves); break;
        case DType::bf16: write_row<BF16>(x, a.d, a.stride / 2, factor, halves); break;
        case DType::i8: write_bytes(a, x, factor, out, a.terms + 2 * i); break;
        default: write_row<F32>(x, a.d, a.stride / 4, factor, reinterpret_cast<float*>(out));
      }
    }
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
