#include "bind/core/intake.h"
#include "scan/knn.h"
#include "scan/pq.h"

namespace lutra {

void register_scan(py::module_& m) {
  m.def("knn", [](Ptr q, int64_t ldq, Ptr x, int64_t ldx, int64_t nq, int64_t n, int64_t d, int64_t k, int metric,
                  Ptr scores, Ptr ids) {
    int64_t bad = -1;
    KnnArgs a{q.as<float>(nq ? (nq - 1) * ldq + d : 0), x.as<float>(n ? (n - 1) * ldx + d : 0), nq, n, d, ldq, ldx,
              k, static_cast<Metric>(metric), scores.as<float>(nq * k), ids.as<int64_t>(nq * k), &bad};
    run(&knn, a, nq * n * (d * 0.01 + 1));
    return bad;
  });
  m.def("rescore", [](Ptr q, int64_t ldq, Ptr x, int64_t ldx, int64_t nq, int64_t n, int64_t d, Ptr cand, int64_t c,
                      int64_t k, int metric, Ptr scores, Ptr ids) {
    int64_t bad = -1;
    RescoreArgs a{q.as<float>(nq ? (nq - 1) * ldq + d : 0), x.as<float>(n ? (n - 1) * ldx + d : 0), nq, n, d, ldq,
                  ldx, cand.as<int64_t>(nq * c), c, k, static_cast<Metric>(metric), scores.as<float>(nq * k),
                  ids.as<int64_t>(nq * k), &bad};
    run(&rescore, a, nq * c * (d * 0.1 + 10));
    return bad;
  });
  m.def("pq", [](Ptr q, int64_t ldq, Ptr codes, Ptr codebooks, int64_t nq, int64_t n, int64_t m_, int64_t ksub,
                 int64_t dsub, int64_t k, int metric, Ptr scores, Ptr ids) {
    int64_t bad = -1;
    PqArgs a{q.as<float>(nq ? (nq - 1) * ldq + m_ * dsub : 0), codes.as<uint8_t>(n * m_),
             codebooks.as<float>(m_ * ksub * dsub), nq, n, ldq, k, m_, ksub, dsub, static_cast<Metric>(metric),
             scores.as<float>(nq * k), ids.as<int64_t>(nq * k), &bad};
    run(&pq, a, nq * n * (m_ * 0.2 + 1));
    return bad;
  });
}

}  // namespace lutra
