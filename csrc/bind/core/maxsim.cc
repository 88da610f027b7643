#include "scan/maxsim.h"

#include "bind/core/intake.h"

namespace lutra {
namespace {

const void* strided(const Ptr& x, int64_t rows, int64_t ld, int64_t d, DType t) {
  return x.raw(rows ? (rows - 1) * ld + d : 0, t);
}

}  // namespace

void register_maxsim(py::module_& m) {
  m.def("maxsim", [](Ptr q, int q_type, int64_t ldq, Ptr q_ptr, Ptr q_mask, int64_t nq, int64_t q_rows, Ptr x,
                     int x_type, int64_t ldx, Ptr x_ptr, Ptr x_mask, Ptr x_scale, int64_t documents, int64_t x_rows,
                     int64_t d, Ptr centroid_ids, Ptr centroids, Ptr values, int64_t centroid_count, int bits,
                     bool unit, Ptr cand, int64_t c, int64_t k, Ptr scores, Ptr ids, Ptr argmax) {
    int64_t bad[2] = {0, -1};
    const int64_t columns = cand.p ? c : documents;
    const auto qt = static_cast<DType>(q_type), xt = static_cast<DType>(x_type);
    MaxsimArgs a{};
    a.q = strided(q, q_rows, ldq, d, qt);
    a.q_type = qt;
    a.ldq = ldq;
    a.q_ptr = q_ptr.as<int64_t>(nq + 1);
    a.q_mask = q_mask.as<uint8_t>(q_rows);
    a.nq = nq;
    a.q_rows = q_rows;
    a.x = strided(x, x_rows, ldx, xt == DType::u8 ? (d * bits + 7) / 8 : d, xt);
    a.x_type = xt;
    a.ldx = ldx;
    a.x_ptr = x_ptr.as<int64_t>(documents + 1);
    a.x_mask = x_mask.as<uint8_t>(x_rows);
    a.x_scale = x_scale.as<float>(x_rows);
    a.documents = documents;
    a.x_rows = x_rows;
    a.d = d;
    if (xt == DType::u8) {
      a.centroid_ids = centroid_ids.as<int32_t>(x_rows);
      a.centroids = centroids.as<float>(centroid_count * d);
      a.values = values.as<float>(int64_t{1} << bits);
      a.centroid_count = centroid_count;
      a.bits = bits;
      a.unit = unit;
    }
    a.cand = cand.as<int64_t>(nq * c);
    a.c = c;
    a.k = k;
    a.scores = scores.as<float>(nq * (k ? k : columns));
    a.ids = ids.as<int64_t>(nq * k);
    a.argmax = argmax.as<int32_t>(argmax.p ? columns * q_rows : 0);
    a.bad = bad;
    run(&maxsim, a, 1e3 + static_cast<double>(q_rows) * static_cast<double>(columns) * static_cast<double>(d) * 0.1);
    return py::make_tuple(bad[0], bad[1]);
  });
  m.def("maxsim_backward", [](Ptr grad, Ptr q, int q_type, int64_t ldq, Ptr q_ptr, int64_t nq, int64_t q_rows, Ptr x,
                              int x_type, int64_t ldx, Ptr x_ptr, int64_t documents, int64_t x_rows, int64_t d,
                              Ptr argmax, int64_t columns, Ptr order, Ptr first, Ptr to_q, Ptr to_x) {
    const auto qt = static_cast<DType>(q_type), xt = static_cast<DType>(x_type);
    bool good = false;
    MaxsimBackwardArgs a{grad.as<float>(nq * columns),
                         strided(q, q_rows, ldq, d, qt),
                         qt,
                         ldq,
                         q_ptr.as<int64_t>(nq + 1),
                         nq,
                         q_rows,
                         strided(x, x_rows, ldx, d, xt),
                         xt,
                         ldx,
                         x_ptr.as<int64_t>(documents + 1),
                         documents,
                         x_rows,
                         d,
                         argmax.as<int32_t>(columns * q_rows),
                         columns,
                         order.as<int64_t>(order.p ? nq * columns : 0),
                         first.as<int64_t>(first.p ? documents + 1 : 0),
                         to_q.as<float>(to_q.p ? q_rows * d : 0),
                         to_x.as<float>(to_x.p ? x_rows * d : 0),
                         &good};
    run(&maxsim_backward, a,
        1e3 + static_cast<double>(q_rows) * static_cast<double>(columns) * static_cast<double>(d) * 0.1);
    return good;
  });
}

}  // namespace lutra
