#include "bind/core/intake.h"
#include "bind/core/quick.h"
#include "scan/knn.h"
#include "scan/pq.h"

namespace lutra {
namespace {

int64_t knn_cost(int64_t nq, int64_t n, int64_t d) { return nq * n * (d / 64 + 1); }

// See quick.h; `metrics` are the names that the op allows, in the order of Metric.
py::object quick_knn(py::handle q, py::handle x, py::handle k_, py::handle metric) {
  Quick call;
  View a, b;
  int64_t k;
  const int m = option(metric, {"ip", "l2", "cosine"});
  if (m < 0 || !integer(k_, &k) || k < 1 || !call.take(q, &a) || !call.take(x, &b) || !a.is(DType::f32, 2) ||
      !b.is(DType::f32, 2) || a.shape[1] != b.shape[1])
    return py::none();
  const int64_t nq = a.shape[0], n = b.shape[0], d = a.shape[1];
  int64_t bad = -1;
  void *scores, *ids;
  py::object s = call.make(DType::f32, {nq, k}, &scores), i = call.make(DType::i64, {nq, k}, &ids);
  KnnArgs args{static_cast<float*>(a.data), static_cast<float*>(b.data), nq,  n, d, d, d, k, static_cast<Metric>(m),
               static_cast<float*>(scores), static_cast<int64_t*>(ids),  &bad};
  run(&knn, args, static_cast<double>(knn_cost(nq, n, d)));
  if (bad >= 0) return py::none();
  return py::make_tuple(std::move(s), std::move(i));
}

}  // namespace

void register_scan(py::module_& m) {
  m.def("quick_knn", &quick_knn);
  m.def("knn", [](Ptr q, int64_t ldq, Ptr x, int64_t ldx, int64_t nq, int64_t n, int64_t d, int64_t k, int metric,
                  Ptr scores, Ptr ids) {
    int64_t bad = -1;
    KnnArgs a{q.as<float>(nq ? (nq - 1) * ldq + d : 0),
              x.as<float>(n ? (n - 1) * ldx + d : 0),
              nq,
              n,
              d,
              ldq,
              ldx,
              k,
              static_cast<Metric>(metric),
              scores.as<float>(nq * k),
              ids.as<int64_t>(nq * k),
              &bad};
    run(&knn, a, static_cast<double>(knn_cost(nq, n, d)));
    return bad;
  });
  m.def("rescore", [](Ptr q, int64_t ldq, Ptr x, int64_t ldx, int64_t nq, int64_t n, int64_t d, Ptr cand, int64_t c,
                      int64_t k, int metric, Ptr scores, Ptr ids) {
    int64_t bad = -1;
    RescoreArgs a{q.as<float>(nq ? (nq - 1) * ldq + d : 0),
                  x.as<float>(n ? (n - 1) * ldx + d : 0),
                  nq,
                  n,
                  d,
                  ldq,
                  ldx,
                  cand.as<int64_t>(nq * c),
                  c,
                  k,
                  static_cast<Metric>(metric),
                  scores.as<float>(nq * k),
                  ids.as<int64_t>(nq * k),
                  &bad};
    run(&rescore, a, nq * c * (d * 0.1 + 10));
    return bad;
  });
  m.def("pq", [](Ptr q, int64_t ldq, Ptr codes, Ptr codebooks, int64_t nq, int64_t n, int64_t m_, int64_t ksub,
                 int64_t dsub, int64_t k, int metric, Ptr scores, Ptr ids) {
    int64_t bad = -1;
    PqArgs a{q.as<float>(nq ? (nq - 1) * ldq + m_ * dsub : 0),
             codes.as<uint8_t>(n * m_),
             codebooks.as<float>(m_ * ksub * dsub),
             nq,
             n,
             ldq,
             k,
             m_,
             ksub,
             dsub,
             static_cast<Metric>(metric),
             scores.as<float>(nq * k),
             ids.as<int64_t>(nq * k),
             &bad};
    run(&pq, a, nq * n * (m_ * 0.2 + 1));
    return bad;
  });
}

}  // namespace lutra
