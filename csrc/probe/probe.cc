#include "probe/probe.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// Two FMA units with a latency of four need eight chains; more, as long as they stay in registers.
#if defined(LUTRA_LEVEL_v4)
constexpr int kFmaVectors = 16;
#else
constexpr int kFmaVectors = 12;
#endif

float read_piece(const float* p, int64_t n) {
  vf s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    s0 += load(p + i);
    s1 += load(p + i + W);
    s2 += load(p + i + 2 * W);
    s3 += load(p + i + 3 * W);
  }
  float rest = 0;
  for (; i < n; ++i) rest += p[i];
  return reduce_add(s0 + s1 + (s2 + s3)) + rest;
}

float fma_chains(int64_t iterations, float start) {
  vf x[kFmaVectors];
  for (int j = 0; j < kFmaVectors; ++j) x[j] = splat(start + static_cast<float>(j));
  const vf a = splat(0.999f), b = splat(0.001f);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kFmaVectors; ++j) x[j] = x[j] * a + b;
  }
  vf total{};
  for (int j = 0; j < kFmaVectors; ++j) total += x[j];
  return reduce_add(total);
}

}  // namespace

void read_probe(const ReadProbeArgs& a) {
  const int64_t piece = (a.count / a.threads + 15) / 16 * 16;
  float total = 0;
#pragma omp parallel for num_threads(a.threads) schedule(static, 1) reduction(+ : total)
  for (int t = 0; t < a.threads; ++t) {
    const int64_t begin = t * piece, end = t + 1 == a.threads || begin + piece > a.count ? a.count : begin + piece;
    if (begin < end) total += read_piece(a.data + begin, end - begin);
  }
  *a.sum = total;
}

void fma_probe(const FmaProbeArgs& a) {
  float total = 0;
#pragma omp parallel for num_threads(a.threads) schedule(static, 1) reduction(+ : total)
  for (int t = 0; t < a.threads; ++t) total += fma_chains(a.iterations, static_cast<float>(t));
  *a.sum = total;
  *a.flops = 2.0 * W * kFmaVectors * static_cast<double>(a.iterations) * a.threads;
}

}  // namespace LUTRA_NS
}  // namespace lutra
