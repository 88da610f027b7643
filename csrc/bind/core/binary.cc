#include "scan/binary.h"

#include "address/binarize.h"
#include "bind/core/intake.h"
#include "common/cpu.h"

namespace lutra {
namespace {

bool g_vpopcnt = false;  // the kernels may use AVX-512 VPOPCNTDQ: this processor has it, and no test says otherwise

}  // namespace

void register_binary(py::module_& m) {
  g_vpopcnt = has_vpopcnt();
  m.def("use_vpopcnt", [](bool wanted) {  // for tests of the way without it; gives what holds now
    g_vpopcnt = wanted && has_vpopcnt();
    return g_vpopcnt;
  });
  m.def("binary",
        [](Ptr q, Ptr x, int64_t nq, int64_t n, int64_t b, int64_t k, int metric, Ptr keep, Ptr scores, Ptr ids) {
          if (b < 1) throw py::value_error("lutra: rows of packed bits must have a byte at least");
          BinaryArgs a{q.as<uint8_t>(nq * b),
                       x.as<uint8_t>(n * b),
                       nq,
                       n,
                       b,
                       k,
                       static_cast<BinaryMetric>(metric),
                       keep.p ? keep.as<uint8_t>((n + 7) / 8) : nullptr,
                       g_vpopcnt,
                       scores.as<float>(nq * k),
                       ids.as<int64_t>(nq * k)};
          run(&binary, a, nq * n * (b * 0.01 + 0.5));
        });
  m.def("rescore_bits", [](Ptr q, Ptr x, int64_t nq, int64_t n, int64_t d, Ptr cand, int64_t c, int64_t k, Ptr scores,
                           Ptr ids) {
    int64_t bad = -1;
    const int64_t b = (d + 7) / 8;
    RescoreBitsArgs a{q.as<float>(nq * d),      x.as<uint8_t>(n * b),    nq,  n, d, b, cand.as<int64_t>(nq * c), c, k,
                      scores.as<float>(nq * k), ids.as<int64_t>(nq * k), &bad};
    run(&rescore_bits, a, nq * c * (b * 0.4 + 15));
    return bad;
  });
  m.def("binarize", [](Ptr x, int dtype, int64_t n, int64_t d, Ptr threshold, Ptr out) {
    const auto t = static_cast<DType>(dtype);
    BinarizeArgs a{x.raw(n * d, t), t, n, d, threshold.as<float>(d), out.as<uint8_t>(n * ((d + 7) / 8))};
    run(&binarize, a, n * d * 0.15);
  });
}

}  // namespace lutra
