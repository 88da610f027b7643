#include "scan/lut_tables.h"

#include "common/parallel.h"
#include "common/simd.h"
#include "scan/metric.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <Metric M>
void table(const LutTablesArgs& a, const float* q, float* out) {
  for (int64_t j = 0; j < a.m; ++j) {
    const float *qj = q + j * a.dsub, *book = a.books + j * a.dsub * a.ksub;
    float* to = out + j * a.ksub;
    int64_t c = 0;
    for (; c + W <= a.ksub; c += W) {
      vf sum = {};
      for (int64_t s = 0; s < a.dsub; ++s) sum = accumulate<M>(sum, splat(qj[s]), load(book + s * a.ksub + c));
      store(to + c, M == Metric::l2 ? sum : sum * a.scale);
    }
    if (c == a.ksub) continue;
    const int rest = static_cast<int>(a.ksub - c);
    vf sum = {};
    for (int64_t s = 0; s < a.dsub; ++s)
      sum = accumulate<M>(sum, splat(qj[s]), load_first(book + s * a.ksub + c, rest));
    float last[W];
    store(last, M == Metric::l2 ? sum : sum * a.scale);
    for (int i = 0; i < rest; ++i) to[c + i] = last[i];
  }
}

}  // namespace

void lut_tables(const LutTablesArgs& a) {
  const int64_t size = a.m * a.ksub;
  parallel_ranges(a.nq, 16, static_cast<double>(a.nq) * size * a.dsub * 0.05, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (a.distances)
        table<Metric::l2>(a, a.q + i * a.ldq, a.out + i * size);
      else
        table<Metric::ip>(a, a.q + i * a.ldq, a.out + i * size);
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
