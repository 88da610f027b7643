#include "address/fde.h"

#include "address/ball_carving.h"
#include "address/simhash.h"
#include "bind/core/intake.h"

namespace lutra {

void register_fde(py::module_& m) {
  m.def("simhash", [](Ptr x, int dtype, int64_t n, int64_t d, Ptr planes, int64_t repetitions, int k, Ptr out) {
    const auto t = static_cast<DType>(dtype);
    int64_t bad = -1;
    SimhashArgs a{x.raw(n * d, t),
                  t,
                  n,
                  d,
                  planes.as<float>(d * repetitions * k),
                  repetitions,
                  k,
                  out.as<int32_t>(n * repetitions),
                  &bad};
    run(&simhash, a, static_cast<double>(n) * d * repetitions * k * 0.02);
    return bad;
  });
  m.def("fde",
        [](Ptr tokens, int dtype, int64_t n, int64_t d, Ptr ptr, int64_t documents, Ptr planes, int64_t repetitions,
           int k_sim, Ptr psi, int64_t width, int64_t ld_psi, float scale, bool query, bool fill, Ptr final_map,
           int64_t final_dim, Ptr out, Ptr partitions, Ptr row_ptr, Ptr blocks, Ptr values, int64_t found) {
          const auto t = static_cast<DType>(dtype);
          if (k_sim < 0 || k_sim > 16) throw py::value_error("lutra: k_sim must be in [0, 16]");
          if (ld_psi % 16 || (psi.p && ld_psi < width) || (!psi.p && width != d) || (!out.p && !partitions.p))
            throw py::value_error("lutra: the encoder's arrays do not fit");
          const int64_t dim = (repetitions << k_sim) * width;
          int64_t bad = -1;
          FdeArgs a{tokens.raw(n * d, t),
                    t,
                    n,
                    d,
                    ptr.as<int64_t>(documents + 1),
                    documents,
                    planes.as<float>(d * repetitions * k_sim),
                    repetitions,
                    k_sim,
                    psi.as<float>(psi.p ? repetitions * d * ld_psi : 0),
                    width,
                    ld_psi,
                    scale,
                    query,
                    fill,
                    final_map.as<int32_t>(final_map.p ? dim : 0),
                    final_dim,
                    out.as<float>(out.p ? documents * (final_map.p ? final_dim : dim) : 0),
                    partitions.as<int32_t>(partitions.p ? n * repetitions : 0),
                    row_ptr.as<int64_t>(row_ptr.p ? documents + 1 : 0),
                    blocks.as<int32_t>(found),
                    values.as<float>(found * width),
                    &bad};
          run(&fde, a, static_cast<double>(n) * repetitions * 20 + static_cast<double>(documents) * dim * 0.1);
          return bad;
        });
  m.def("fde_count",
        [](Ptr partitions, int64_t n, Ptr ptr, int64_t documents, int64_t repetitions, int k_sim, Ptr counts) {
          if (k_sim < 0 || k_sim > 16) throw py::value_error("lutra: k_sim must be in [0, 16]");
          FdeCountArgs a{partitions.as<int32_t>(n * repetitions),
                         ptr.as<int64_t>(documents + 1),
                         documents,
                         repetitions,
                         k_sim,
                         counts.as<int64_t>(documents)};
          run(&fde_count, a, static_cast<double>(n) * repetitions);
        });
  m.def("balls", [](Ptr tokens, int dtype, int64_t n, int64_t d, Ptr ptr, int64_t queries, float threshold, Ptr balls_,
                    Ptr counts) {
    const auto t = static_cast<DType>(dtype);
    int64_t bad = -1;
    BallsArgs a{tokens.raw(n * d, t),         t,       n,         d,
                ptr.as<int64_t>(queries + 1), queries, threshold, balls_.as<int32_t>(n),
                counts.as<int64_t>(queries),  &bad};
    run(&balls, a, static_cast<double>(n) * d);
    return bad;
  });
  m.def("ball_sums", [](Ptr tokens, int dtype, int64_t n, int64_t d, Ptr ptr, int64_t queries, Ptr balls_, Ptr out_ptr,
                        Ptr out, int64_t found) {
    const auto t = static_cast<DType>(dtype);
    BallSumsArgs a{tokens.raw(n * d, t),
                   t,
                   n,
                   d,
                   ptr.as<int64_t>(queries + 1),
                   queries,
                   balls_.as<int32_t>(n),
                   out_ptr.as<int64_t>(queries + 1),
                   out.as<float>(found * d)};
    run(&ball_sums, a, static_cast<double>(n) * d * 0.1);
  });
}

}  // namespace lutra
