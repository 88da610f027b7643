#include "scan/screen.h"
#include "bind/core/intake.h"
#include "common/cpu.h"

namespace lutra {

void register_screen(py::module_& m) {
  m.def("has_vnni", &has_vnni);
  m.def("screen_encode", [](Ptr x, int64_t ldx, int64_t n, int64_t d, int64_t first, Ptr mean, bool normalize,
                            Ptr codes, Ptr inverse, Ptr half, Ptr bounds, Ptr bias) {
    int64_t bad = -1;
    const int64_t rows = (first + n + 15) / 16 * 16;
    ScreenEncodeArgs a{x.as<float>(n ? (n - 1) * ldx + d : 0),
                       n,
                       d,
                       ldx,
                       first,
                       mean.as<float>(d),
                       normalize,
                       codes.as<uint8_t>(rows * ((d + 3) / 4 * 4)),
                       inverse.as<float>(rows),
                       half.as<float>(rows),
                       bounds.as<float>(4),
                       &bad,
                       bias.as<float>(n)};
    run(&screen_encode, a, static_cast<double>(n) * (d + 20));
    return bad;
  });
  // (a row with a NaN score, -1 or -2; how many rows were scored exactly)
  m.def("screen",
        [](Ptr q, int64_t ldq, Ptr x, int dtype, int64_t ldx, int64_t nq, int64_t n, int64_t d, int64_t k, int metric,
           Ptr codes, Ptr inverse, Ptr half, Ptr mean, Ptr bounds, Ptr keep, bool vnni, Ptr scores, Ptr ids, Ptr bias) {
          int64_t bad = -1, passed = 0;
          const int64_t rows = (n + 15) / 16 * 16;
          ScreenArgs a{q.as<float>(nq ? (nq - 1) * ldq + d : 0),
                       x.raw(n ? (n - 1) * ldx + d : 0, static_cast<DType>(dtype)),
                       static_cast<DType>(dtype),
                       nq,
                       n,
                       d,
                       ldq,
                       ldx,
                       k,
                       static_cast<Metric>(metric),
                       codes.as<uint8_t>(rows * ((d + 3) / 4 * 4)),
                       inverse.as<float>(rows),
                       half.as<float>(rows),
                       mean.as<float>(d),
                       bounds.as<float>(4),
                       keep.as<uint8_t>((n + 7) / 8),
                       vnni && has_vnni(),
                       scores.as<float>(nq * k),
                       ids.as<int64_t>(nq * k),
                       &passed,
                       &bad,
                       bias.as<float>(n)};
          run(&screen, a, static_cast<double>(nq) * n * (d / 64 + 1));
          return std::make_pair(bad, passed);
        });
}

}  // namespace lutra
