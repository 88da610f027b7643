#include "bind/core/intake.h"
#include "bind/core/quick.h"
#include "scan/knn.h"
#include "scan/pq.h"
#include "scan/range.h"

#include <algorithm>
#include <vector>

namespace lutra {
namespace {

int64_t knn_cost(int64_t nq, int64_t n, int64_t d) { return nq * n * (d / 64 + 1); }

// See quick.h; `metrics` are the names that the op allows, in the order of Metric.
py::object quick(py::handle q, py::handle x, py::handle k_, int metric, bool assign) {
  Quick call;
  View a, b;
  int64_t k;
  if (metric < 0 || !integer(k_, &k) || k < 1 || !call.take(q, &a) || !call.take(x, &b) || !a.is(DType::f32, 2) ||
      b.ndim != 2 || b.dtype > DType::u8 || a.shape[1] != b.shape[1])
    return py::none();
  const int64_t nq = a.shape[0], n = b.shape[0], d = a.shape[1];
  int64_t bad = -1;
  void *scores, *ids;
  py::object s = call.make(DType::f32, {nq, k}, &scores), i = call.make(DType::i64, {nq, k}, &ids);
  KnnArgs args{static_cast<float*>(a.data),
               static_cast<float*>(b.data),
               nq,
               n,
               d,
               d,
               d,
               k,
               static_cast<Metric>(metric),
               static_cast<float*>(scores),
               static_cast<int64_t*>(ids),
               &bad,
               b.dtype,
               nullptr,
               assign};
  run(&knn, args, static_cast<double>(knn_cost(nq, n, d)));
  if (bad >= 0) return py::none();
  return py::make_tuple(std::move(s), std::move(i));
}

py::object quick_knn(py::handle q, py::handle x, py::handle k, py::handle metric) {
  return quick(q, x, k, option(metric, {"ip", "l2", "cosine", "l1", "linf"}), false);
}

py::object quick_nearest(py::handle x, py::handle centroids, py::handle k, py::handle metric) {
  return quick(x, centroids, k, option(metric, {"ip", "l2"}), true);
}

const void* matrix(const Ptr& x, int64_t n, int64_t ldx, int64_t d, int storage) {
  return x.raw(n ? (n - 1) * ldx + d : 0, static_cast<DType>(storage));
}

// What `range` finds, put in order: by query, then best first, then by row.
py::object range_search(Ptr q, int64_t ldq, Ptr x, int64_t ldx, int64_t nq, int64_t n, int64_t d, float radius,
                        int metric, int storage, Ptr keep) {
  int64_t bad = -1;
  std::vector<RangeHit> hits;
  const auto take = [](void* context, const RangeHit* found, int64_t count) {
    auto* all = static_cast<std::vector<RangeHit>*>(context);
    all->insert(all->end(), found, found + count);
  };
  RangeArgs a{q.as<float>(nq ? (nq - 1) * ldq + d : 0),
              matrix(x, n, ldx, d, storage),
              nq,
              n,
              d,
              ldq,
              ldx,
              static_cast<Metric>(metric),
              static_cast<DType>(storage),
              keep.as<uint8_t>((n + 7) / 8),
              radius,
              take,
              &hits,
              &bad};
  py::array_t<int64_t> offsets(nq + 1);
  int64_t* begin = offsets.mutable_data();
  std::vector<RangeHit> ordered;
  {
    py::gil_scoped_release release;
    range(a);
    std::fill(begin, begin + nq + 1, 0);
    for (const RangeHit& h : hits) ++begin[h.query + 1];
    for (int64_t i = 0; i < nq; ++i) begin[i + 1] += begin[i];
    ordered.resize(hits.size());
    std::vector<int64_t> next(begin, begin + nq);
    for (const RangeHit& h : hits) ordered[next[h.query]++] = h;
    const bool larger = a.metric == Metric::ip || a.metric == Metric::cosine;
    for (int64_t i = 0; i < nq; ++i)
      std::sort(ordered.begin() + begin[i], ordered.begin() + begin[i + 1],
                [larger](const RangeHit& u, const RangeHit& v) {
                  if (u.score != v.score) return larger ? u.score > v.score : u.score < v.score;
                  return u.row < v.row;
                });
  }
  py::array_t<float> scores(static_cast<int64_t>(ordered.size()));
  py::array_t<int64_t> ids(static_cast<int64_t>(ordered.size()));
  for (size_t i = 0; i < ordered.size(); ++i) {
    scores.mutable_data()[i] = ordered[i].score;
    ids.mutable_data()[i] = ordered[i].row;
  }
  return py::make_tuple(bad, std::move(offsets), std::move(scores), std::move(ids));
}

}  // namespace

void register_scan(py::module_& m) {
  m.def("quick_knn", &quick_knn);
  m.def("quick_nearest", &quick_nearest);
  m.def("range_search", &range_search);
  m.def("knn", [](Ptr q, int64_t ldq, Ptr x, int64_t ldx, int64_t nq, int64_t n, int64_t d, int64_t k, int metric,
                  Ptr scores, Ptr ids, int storage, Ptr keep, bool assign, Ptr bias) {
    int64_t bad = -1;
    KnnArgs a{q.as<float>(nq ? (nq - 1) * ldq + d : 0),
              static_cast<const float*>(matrix(x, n, ldx, d, storage)),
              nq,
              n,
              d,
              ldq,
              ldx,
              k,
              static_cast<Metric>(metric),
              scores.as<float>(nq * k),
              ids.as<int64_t>(nq * k),
              &bad,
              static_cast<DType>(storage),
              keep.as<uint8_t>((n + 7) / 8),
              assign,
              bias.as<float>(n)};
    run(&knn, a, static_cast<double>(knn_cost(nq, n, d)));
    return bad;
  });
  m.def("rescore", [](Ptr q, int64_t ldq, Ptr x, int64_t ldx, int64_t nq, int64_t n, int64_t d, Ptr cand, int64_t c,
                      int64_t k, int metric, Ptr scores, Ptr ids, int storage) {
    int64_t bad = -1;
    RescoreArgs a{q.as<float>(nq ? (nq - 1) * ldq + d : 0),
                  static_cast<const float*>(matrix(x, n, ldx, d, storage)),
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
                  &bad,
                  static_cast<DType>(storage)};
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
