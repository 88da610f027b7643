#include "scan/maxsim.h"

#include "bind/cuda/intake.h"

namespace lutra {

// The arguments of the CPU's binding, then scratch memory, device and stream. Results only: what is wrong is NaN in
// them.
void register_maxsim(py::module_& m) {
  m.def("maxsim_workspace", [](int64_t nq, int64_t columns, int64_t k, int device, Address stream) {
    return cuda::maxsim_workspace(nq, columns, k, Launch{device, stream.p});
  });
  m.def("maxsim", [](Address q, int q_type, int64_t ldq, Address q_ptr, Address q_mask, int64_t nq, int64_t q_rows,
                     Address x, int x_type, int64_t ldx, Address x_ptr, Address x_mask, Address x_scale,
                     int64_t documents, int64_t x_rows, int64_t d, Address centroid_ids, Address centroids,
                     Address values, int64_t centroid_count, int bits, bool unit, Address cand, int64_t c, int64_t k,
                     Address scores, Address ids, Address argmax, Address workspace, int device, Address stream) {
    MaxsimArgs a{};
    a.q = q.p;
    a.q_type = static_cast<DType>(q_type);
    a.ldq = ldq;
    a.q_ptr = q_ptr.as<int64_t>();
    a.q_mask = q_mask.as<uint8_t>();
    a.nq = nq;
    a.q_rows = q_rows;
    a.x = x.p;
    a.x_type = static_cast<DType>(x_type);
    a.ldx = ldx;
    a.x_ptr = x_ptr.as<int64_t>();
    a.x_mask = x_mask.as<uint8_t>();
    a.x_scale = x_scale.as<float>();
    a.documents = documents;
    a.x_rows = x_rows;
    a.d = d;
    a.centroid_ids = centroid_ids.as<int32_t>();
    a.centroids = centroids.as<float>();
    a.values = values.as<float>();
    a.centroid_count = centroid_count;
    a.bits = bits;
    a.unit = unit;
    a.cand = cand.as<int64_t>();
    a.c = c;
    a.k = k;
    a.scores = scores.as<float>();
    a.ids = ids.as<int64_t>();
    a.argmax = argmax.as<int32_t>();
    cuda::maxsim(a, Launch{device, stream.p, workspace.p});
    return py::make_tuple(0, -1);
  });
  m.def("maxsim_backward",
        [](Address grad, Address q, int q_type, int64_t ldq, Address q_ptr, int64_t nq, int64_t q_rows, Address x,
           int x_type, int64_t ldx, Address x_ptr, int64_t documents, int64_t x_rows, int64_t d, Address argmax,
           int64_t columns, Address order, Address first, Address to_q, Address to_x, int device, Address stream) {
          const MaxsimBackwardArgs a{grad.as<float>(),
                                     q.p,
                                     static_cast<DType>(q_type),
                                     ldq,
                                     q_ptr.as<int64_t>(),
                                     nq,
                                     q_rows,
                                     x.p,
                                     static_cast<DType>(x_type),
                                     ldx,
                                     x_ptr.as<int64_t>(),
                                     documents,
                                     x_rows,
                                     d,
                                     argmax.as<int32_t>(),
                                     columns,
                                     order.as<int64_t>(),
                                     first.as<int64_t>(),
                                     to_q.as<float>(),
                                     to_x.as<float>(),
                                     nullptr};
          cuda::maxsim_backward(a, Launch{device, stream.p});
          return true;
        });
}

}  // namespace lutra
