// Codes of rows, block by block. Limit: reading the rows once.
#include "scan/screen.h"

#include <math.h>

#include "scan/int8.h"

namespace lutra {
namespace LUTRA_NS {

namespace {

float norm_above(const float* x, int64_t d) {  // |x|, rounded up as quantize does
  return sqrtf(square_norm(x, d)) * 1.00001f;
}

}  // namespace

void screen_encode(const ScreenEncodeArgs& a) {
  using namespace int8;
  const int64_t steps = steps_of(a.d), bytes = steps * 4 * kBlock;
  const int64_t from = a.first / kBlock, to = (a.first + a.n + kBlock - 1) / kBlock;
  constexpr int64_t kChunk = 16;  // blocks
  const int64_t chunks = (to - from + kChunk - 1) / kChunk;
  Buffer<float> most(chunks * 4);
  Buffer<int64_t> bad(chunks);
  parallel_for(chunks, static_cast<double>(a.n) * (a.d * 0.5 + 20), [&](int64_t c) {
    Buffer<float> work(a.d + W);
    Buffer<int8_t> codes(a.d + W);
    float* bound = most.data + c * 4;
    for (int i = 0; i < 4; ++i) bound[i] = 0;
    bad[c] = -1;
    const int64_t last = from + (c + 1) * kChunk < to ? from + (c + 1) * kChunk : to;
    for (int64_t b = from + c * kChunk; b < last; ++b)
      for (int r = 0; r < kBlock; ++r) {
        const int64_t number = b * kBlock + r, row = number - a.first;
        if (row < 0) continue;  // coded before
        if (row >= a.n) {
          for (int64_t g = 0; g < steps; ++g) memset(a.codes + b * bytes + (g * kBlock + r) * 4, 128, 4);
          a.inverse[number] = 1;
          a.half[number] = 0;
          continue;
        }
        const float* x = a.x + row * a.ldx;
        const float factor = a.normalize ? inverse_norm(x, a.d) : 1.0f;
        Quantized z = quantize(x, factor, a.mean, a.d, 127, work.data, codes.data);
        if (a.bias && z.scale < kLeastScale)
          z = quantize(x, factor, a.mean, a.d, 127, work.data, codes.data, kLeastScale);
        put_row(codes.data, steps, r, a.codes + b * bytes);
        a.inverse[number] = 1 / z.scale;
        a.half[number] = a.bias ? -a.bias[row] / z.scale : 0.5f * z.square / z.scale;
        const float norm = a.normalize ? 1.0f : norm_above(x, a.d);
        const float all[4] = {z.lost / z.scale, z.length, norm, z.norm};
        if (!(norm < 1e15f && z.norm < 1e15f && factor < 1e30f) && bad[c] < 0) bad[c] = row;
        for (int i = 0; i < 4; ++i) bound[i] = all[i] > bound[i] ? all[i] : bound[i];
      }
  });
  for (int64_t c = 0; c < chunks; ++c) {
    if (bad[c] >= 0 && *a.bad < 0) *a.bad = bad[c];
    for (int i = 0; i < 4; ++i) a.bounds[i] = most[c * 4 + i] > a.bounds[i] ? most[c * 4 + i] : a.bounds[i];
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
