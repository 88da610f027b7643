// Codes of queries for the int8 screen, and the bounds that hold for each: a warp a query.
//
// With the row x' = x - mean = scale(x) (code + r), |r| <= bounds[0], |code| <= bounds[1], and the query likewise,
//   |<q, x'> - scale(q) scale(x) sum| <= scale(x) (|q| bounds[0] + lost(q) bounds[1])
// (int8.h); the margin is that over scale(q) scale(x), and what fp32 may lose of |q| |x'| besides: the exact score is a
// sum of d terms in a row (exact_score.cuh), and inverse, half and the row's differences from the mean are rounded.
// What does not grow with |x'| is the slack. 2^-24 a step bounds each rounding; 32 steps more than there are.
#include "common/device.cuh"
#include "scan/screen_cuda.h"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ double warp_sum_of(double v) {
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) v += __shfl_xor_sync(kFullWarp, v, s);
  return v;
}

__global__ void __launch_bounds__(kThreads) queries_kernel(QueryArgs a) {
  const int64_t query = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> 5;
  const int lane = threadIdx.x & 31;
  if (query >= a.padded) return;
  const bool real = query < a.nq, l2 = a.metric == Metric::l2, cosine = a.metric == Metric::cosine;
  const float* q = a.q + (real ? query * a.ldq : 0);
  const auto value = [&](int j) { return l2 ? q[j] - a.mean[j] : q[j]; };
  float largest = 0;
  double square = 0, raw = 0, offset = 0, mean = 0;
  for (int j = lane; real && j < a.d; j += 32) {
    const float v = value(j);
    largest = fmaxf(largest, fabsf(v));
    square += static_cast<double>(v) * v;
    raw += static_cast<double>(q[j]) * q[j];
    offset += static_cast<double>(q[j]) * a.mean[j];
    mean += static_cast<double>(a.mean[j]) * a.mean[j];
  }
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, s));
  square = warp_sum_of(square), raw = warp_sum_of(raw), offset = warp_sum_of(offset), mean = warp_sum_of(mean);
  const bool good = real && square < 1e30 && raw < 1e30;  // neither NaN nor infinite
  const float scale = good && largest > 1e-30f ? largest / 127.0f : 1.0f, unit = 1.0f / scale;

  // Step s of 4 columns: product s / 8, its first or second half, column s % 4 of it.
  const int64_t pairs = screen_pairs(a.d);
  uint32_t* panel = reinterpret_cast<uint32_t*>(a.out.panels) + query / 16 * pairs * 256;
  const int place = static_cast<int>((query & 7) * 16 + (query >> 3 & 1) * 2);
  double lost = 0, length = 0;
  for (int s = lane; s < pairs * 16; s += 32) {
    uint32_t word = 0;
    for (int e = 0; e < 4; ++e) {
      const int j = 4 * s + e;
      if (!good || j >= a.d) break;
      const float v = __fmul_rn(value(j), unit), code = fminf(fmaxf(rintf(v), -127.0f), 127.0f);
      lost += static_cast<double>(v - code) * (v - code);
      length += static_cast<double>(code) * code;
      word |= static_cast<uint32_t>(static_cast<uint8_t>(static_cast<int8_t>(code))) << (8 * e);
    }
    panel[(s >> 3) * 128 + place + (s & 3) * 4 + (s >> 2 & 1)] = word;
  }
  lost = warp_sum_of(lost), length = warp_sum_of(length);
  if (lane) return;

  const double wrong = (a.d + 32) * 0x1.1p-24, norm = sqrt(square), in_units = norm / scale;
  const double rows_lost = a.bounds[0], rows_length = a.bounds[1];
  const double margin = (in_units * rows_lost + (sqrt(lost) + in_units * 2e-7) * rows_length +
                         wrong * in_units * (rows_lost + rows_length) + 0x1p-22 * sqrt(length) * rows_length) *
                            1.0001 +
                        2;
  // l2: half of what (|q'| + |x'|)^2 <= 2 |q'|^2 + 2 |x'|^2 can be wrong by; the row's part is Int8Scan::half_reach
  double slack = 1e-40 + wrong * (l2 ? square : cosine ? 2.0 * (1 + sqrt(mean)) * sqrt(raw) : 2.0 * sqrt(raw * mean));
  if (!l2) slack += 0x1p-22 * fabs(offset);
  const bool bounded = good && slack < 1e25 && margin < (a.d <= kScreenNarrow ? kMostNarrow : 1 << 29) &&
                       !(a.use_half && unit > 1e15f);  // half / scale(q) stays finite
  const CodedQueries& out = a.out;
  out.start[query] = bounded ? static_cast<int>(margin) + 1 : 0;
  out.per_scale[query] = unit;
  out.scale[query] = scale;
  out.slack[query] = slack;
  out.shift[query] = l2 ? -square : offset;
  out.bars[query] = kLowestBar;
  out.counts[query] = 0;
  out.broken[query] = bounded ? 0 : 1;
}

}  // namespace

void code_queries(const QueryArgs& a, const Launch& l) {
  launch("knn_screened", queries_kernel, grid_x(div_up(a.padded * 32, kThreads)), kThreads, 0, l, a);
}

}  // namespace cuda
}  // namespace lutra
