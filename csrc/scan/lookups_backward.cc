// W tokens in lanes: a row's gradients are one vector, which is added to one entry of each look-up's table. Tasks are
// groups of tokens and of kTables look-ups, whose sums stay in the L2; rows are taken in blocks, whose gradients are
// put row by row first.
#include "common/parallel.h"
#include "common/team.h"
#include "scan/lookups.h"
#include "scan/lookups_codes.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int64_t kTables = 16;
constexpr int64_t kRows = 256;

template <class T>
void rows_of_grad(const LookupsBackwardArgs& a, int64_t t0, int64_t lanes, int64_t i0, int64_t rows, float* out) {
  const auto* grad = static_cast<const typename T::type*>(a.grad);
  for (int64_t w = 0; w < W; ++w) {
    if (w >= lanes) {
      for (int64_t r = 0; r < rows; ++r) out[r * W + w] = 0;
      continue;
    }
    const typename T::type* from = grad + (t0 + w) * a.ldg + i0;
    for (int64_t r = 0; r < rows; ++r) out[r * W + w] = T::get(from + r);
  }
}

void task(const LookupsBackwardArgs& a, int64_t t0, int64_t j0, int64_t j1) {
  const int64_t entries = int64_t{1} << a.bits, count = j1 - j0, lanes = a.tokens - t0 < W ? a.tokens - t0 : W;
  Buffer<float> sums(count * entries * W), grad(kRows * W);
  memset(sums.data, 0, static_cast<size_t>(count * entries * W * 4));
  uint8_t codes[kTables];
  for (int64_t i0 = 0; i0 < a.n; i0 += kRows) {
    const int64_t rows = a.n - i0 < kRows ? a.n - i0 : kRows;
    if (a.dtype == DType::f32)
      rows_of_grad<F32>(a, t0, lanes, i0, rows, grad.data);
    else if (a.dtype == DType::bf16)
      rows_of_grad<BF16>(a, t0, lanes, i0, rows, grad.data);
    else
      rows_of_grad<F16>(a, t0, lanes, i0, rows, grad.data);
    for (int64_t r = 0; r < rows; ++r) {
      unpack_codes(a.codes + (i0 + r) * a.row_bytes, a.bits, j0, j1, codes);
      const vf g = load(grad.data + r * W);
      for (int64_t j = 0; j < count; ++j) {
        float* to = sums.data + (j * entries + codes[j]) * W;
        store(to, load(to) + g);
      }
    }
  }
  for (int64_t w = 0; w < lanes; ++w)
    for (int64_t j = 0; j < count; ++j) {
      float* to = a.grad_tables + (t0 + w) * a.st + (j0 + j) * a.sj;
      const float* from = sums.data + j * entries * W + w;
      if (a.accumulate)
        for (int64_t c = 0; c < entries; ++c) to[c] += from[c * W];
      else
        for (int64_t c = 0; c < entries; ++c) to[c] = from[c * W];
    }
}

}  // namespace

void lookups_backward(const LookupsBackwardArgs& a) {
  const int64_t groups = (a.tokens + W - 1) / W, parts = (a.m + kTables - 1) / kTables;
  team_for(groups * parts, static_cast<double>(groups) * a.n * a.m * 1.5, [&](int64_t x) {
    const int64_t j0 = x % parts * kTables, j1 = j0 + kTables < a.m ? j0 + kTables : a.m;
    task(a, x / parts * W, j0, j1);
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
