#include "bind/cuda/intake.h"
#include "scan/knn.h"
#include "scan/pq.h"
#include "scan/range.h"
#include "scan/screen.h"

namespace lutra {

void register_scan(py::module_& m) {
  m.def("knn_paths", &cuda::knn_paths);
  // `plain`: neither a filter nor a bias, as in the call that the memory is for.
  m.def("knn_workspace", [](int64_t nq, int64_t n, int64_t d, int64_t k, int metric, int storage, bool bf16_queries,
                            bool plain, int device, Address stream) {
    KnnArgs a{nullptr, nullptr, nq, n, d, d, d, k, static_cast<Metric>(metric), nullptr, nullptr, nullptr};
    a.storage = static_cast<DType>(storage);
    a.bf16_queries = bf16_queries;
    return cuda::knn_workspace(a, plain, Launch{device, stream.p});
  });
  m.def("knn", [](Address q, int64_t ldq, Address x, int64_t ldx, int64_t nq, int64_t n, int64_t d, int64_t k,
                  int metric, Address scores, Address ids, int storage, bool bf16_queries, Address keep, Address bias,
                  Address workspace, int device, Address stream) {
    KnnArgs a{q.as<float>(),      x.as<float>(),     nq,     n, d, ldq, ldx, k, static_cast<Metric>(metric),
              scores.as<float>(), ids.as<int64_t>(), nullptr};
    a.storage = static_cast<DType>(storage);
    a.bf16_queries = bf16_queries;
    a.keep = keep.as<uint8_t>();
    a.bias = bias.as<float>();
    cuda::knn(a, Launch{device, stream.p, workspace.p});
    return -1;
  });
  m.def("rescore_workspace", [](int64_t nq, int64_t c, int64_t d, int64_t k, int metric, int device, Address stream) {
    return cuda::rescore_workspace(nq, c, d, k, static_cast<Metric>(metric), Launch{device, stream.p});
  });
  m.def("rescore", [](Address q, int64_t ldq, Address x, int64_t ldx, int64_t nq, int64_t n, int64_t d,
                      Address candidates, int64_t c, int64_t k, int metric, Address scores, Address ids, int storage,
                      Address workspace, int device, Address stream) {
    RescoreArgs a{q.as<float>(),
                  x.as<float>(),
                  nq,
                  n,
                  d,
                  ldq,
                  ldx,
                  candidates.as<int64_t>(),
                  c,
                  k,
                  static_cast<Metric>(metric),
                  scores.as<float>(),
                  ids.as<int64_t>(),
                  nullptr};
    a.storage = static_cast<DType>(storage);
    cuda::rescore(a, Launch{device, stream.p, workspace.p});
    return -1;
  });
  const auto range_args = [](Address q, int64_t ldq, Address x, int64_t ldx, int64_t nq, int64_t n, int64_t d,
                             double radius, int metric, int storage, Address keep) {
    RangeArgs a{};
    a.q = q.as<float>(), a.x = x.p, a.nq = nq, a.n = n, a.d = d, a.ldq = ldq, a.ldx = ldx;
    a.metric = static_cast<Metric>(metric), a.storage = static_cast<DType>(storage);
    a.keep = keep.as<uint8_t>(), a.radius = static_cast<float>(radius);
    return a;
  };
  m.def("range_workspace", [](int64_t nq, int64_t d, int metric, int64_t total, int device, Address stream) {
    RangeArgs a{};
    a.nq = nq, a.d = d, a.metric = static_cast<Metric>(metric);
    return cuda::range_workspace(a, total, Launch{device, stream.p});
  });
  m.def("range_count",
        [=](Address q, int64_t ldq, Address x, int64_t ldx, int64_t nq, int64_t n, int64_t d, double radius, int metric,
            int storage, Address keep, Address offsets, Address workspace, int device, Address stream) {
          cuda::range_count(range_args(q, ldq, x, ldx, nq, n, d, radius, metric, storage, keep), offsets.as<int64_t>(),
                            Launch{device, stream.p, workspace.p});
        });
  m.def("range_write", [=](Address q, int64_t ldq, Address x, int64_t ldx, int64_t nq, int64_t n, int64_t d,
                           double radius, int metric, int storage, Address keep, int64_t total, Address offsets,
                           Address scores, Address ids, Address workspace, int device, Address stream) {
    cuda::range_write(range_args(q, ldq, x, ldx, nq, n, d, radius, metric, storage, keep), total, offsets.as<int64_t>(),
                      scores.as<float>(), ids.as<int64_t>(), Launch{device, stream.p, workspace.p});
  });
  m.def("screen_paths", &cuda::screen_paths);
  m.def("screen_mean_workspace", [](int64_t n, int64_t d, int64_t step, bool normalize, int, Address) {
    return cuda::screen_mean_workspace(n, d, step, normalize);
  });
  m.def("screen_mean", [](Address x, int storage, int64_t ldx, int64_t n, int64_t d, int64_t step, bool normalize,
                          Address mean, Address bounds, Address workspace, int device, Address stream) {
    if (step < 1) throw std::invalid_argument("lutra: screen_mean: step must be >= 1");
    cuda::screen_mean(ScreenMeanArgs{x.p, static_cast<DType>(storage), n, d, ldx, step, normalize, mean.as<float>(),
                                     bounds.as<float>()},
                      Launch{device, stream.p, workspace.p});
  });
  m.def("screen_encode", [](Address x, int storage, int64_t ldx, int64_t n, int64_t d, int64_t first, Address mean,
                            bool normalize, Address codes, Address inverse, Address half, Address bounds, Address bias,
                            Address bad, int device, Address stream) {
    ScreenEncodeArgs a{x.as<float>(),
                       n,
                       d,
                       ldx,
                       first,
                       mean.as<float>(),
                       normalize,
                       codes.as<uint8_t>(),
                       inverse.as<float>(),
                       half.as<float>(),
                       bounds.as<float>(),
                       bad.as<int64_t>(),
                       bias.as<float>()};
    a.storage = static_cast<DType>(storage);
    cuda::screen_encode(a, Launch{device, stream.p});
  });
  const auto screen_args = [](int64_t nq, int64_t n, int64_t d, int64_t k, int metric, int storage) {
    ScreenArgs a{};
    a.nq = nq, a.n = n, a.d = d, a.ldq = d, a.ldx = d, a.k = k;
    a.metric = static_cast<Metric>(metric), a.dtype = static_cast<DType>(storage);
    return a;
  };
  m.def("screen_workspace", [=](int64_t nq, int64_t n, int64_t d, int64_t k, int metric, int storage, bool plain,
                                int device, Address stream) {
    return cuda::screen_workspace(screen_args(nq, n, d, k, metric, storage), plain, Launch{device, stream.p});
  });
  m.def("screen",
        [=](Address q, int64_t ldq, Address x, int storage, int64_t ldx, int64_t nq, int64_t n, int64_t d, int64_t k,
            int metric, Address codes, Address inverse, Address half, Address mean, Address bounds, Address keep,
            Address scores, Address ids, Address bias, Address workspace, int device, Address stream) {
          ScreenArgs a = screen_args(nq, n, d, k, metric, storage);
          a.q = q.as<float>(), a.x = x.p, a.ldq = ldq, a.ldx = ldx;
          a.codes = codes.as<uint8_t>(), a.inverse = inverse.as<float>(), a.half = half.as<float>();
          a.mean = mean.as<float>(), a.bounds = bounds.as<float>(), a.keep = keep.as<uint8_t>();
          a.scores = scores.as<float>(), a.ids = ids.as<int64_t>(), a.bias = bias.as<float>();
          cuda::screen(a, Launch{device, stream.p, workspace.p});
        });
  m.def("pq_paths", &cuda::pq_paths);
  m.def("pq_workspace", [](int64_t nq, int64_t n, int64_t m_, int64_t ksub, int64_t k, int device, Address stream) {
    return cuda::pq_workspace(nq, n, m_, ksub, k, Launch{device, stream.p});
  });
  m.def("pq", [](Address q, int64_t ldq, Address codes, Address codebooks, int64_t nq, int64_t n, int64_t m_,
                 int64_t ksub, int64_t dsub, int64_t k, int metric, Address scores, Address ids, Address workspace,
                 int device, Address stream) {
    PqArgs a{q.as<float>(),
             codes.as<uint8_t>(),
             codebooks.as<float>(),
             nq,
             n,
             ldq,
             k,
             m_,
             ksub,
             dsub,
             static_cast<Metric>(metric),
             scores.as<float>(),
             ids.as<int64_t>(),
             nullptr};
    cuda::pq(a, Launch{device, stream.p, workspace.p});
    return -1;
  });
}

}  // namespace lutra
