#include "address/assign.h"
#include "bind/core/intake.h"
#include "common/cpu.h"

namespace lutra {

void register_assign(py::module_& m) {
  // (a centroid with a NaN score or -1; how many scores were computed exactly)
  m.def("assign", [](Ptr x, int64_t ldx, Ptr c, int64_t ldc, int64_t n, int64_t k, int64_t d, int metric, Ptr rows,
                     int64_t total, bool vnni, Ptr scores, Ptr ids) {
    int64_t bad = -1, exact = 0;
    if (k < 1 || k >= int64_t{1} << 31 || d > 65536) throw py::value_error("lutra: assign: k or d out of range");
    AssignArgs a{x.as<float>(total ? (total - 1) * ldx + d : 0),
                 c.as<float>((k - 1) * ldc + d),
                 n,
                 k,
                 d,
                 ldx,
                 ldc,
                 static_cast<Metric>(metric),
                 rows.p ? rows.as<int64_t>(n) : nullptr,
                 vnni && has_vnni(),
                 scores.as<float>(total),
                 ids.as<int64_t>(total),
                 &exact,
                 &bad};
    if (n) run(&assign, a, static_cast<double>(n) * k * d);
    return std::make_pair(bad, exact);
  });
}

}  // namespace lutra
