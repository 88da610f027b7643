// Scans of codes: packed bits, 4-bit entries.
#include "bind/cuda/intake.h"
#include "scan/binary.h"
#include "scan/fast_scan.h"

namespace lutra {

void register_codes(py::module_& m) {
  m.def("binary_workspace", [](int64_t nq, int64_t n, int64_t b, int64_t k, Address x, int device, Address stream) {
    return cuda::binary_workspace(nq, n, b, k, x.p, Launch{device, stream.p});
  });
  m.def("binary", [](Address q, Address x, int64_t nq, int64_t n, int64_t b, int64_t k, int metric, Address keep,
                     Address scores, Address ids, Address workspace, int device, Address stream) {
    BinaryArgs a{};
    a.q = q.as<uint8_t>(), a.x = x.as<uint8_t>();
    a.nq = nq, a.n = n, a.b = b, a.k = k;
    a.metric = static_cast<BinaryMetric>(metric);
    a.keep = keep.as<uint8_t>();
    a.scores = scores.as<float>(), a.ids = ids.as<int64_t>();
    cuda::binary(a, Launch{device, stream.p, workspace.p});
    return -1;
  });
  m.def("rescore_bits_workspace", [](int64_t nq, int64_t c, int device, Address stream) {
    return cuda::rescore_bits_workspace(nq, c, Launch{device, stream.p});
  });
  m.def("rescore_bits", [](Address q, Address x, int64_t nq, int64_t n, int64_t d, Address candidates, int64_t c,
                           int64_t k, Address scores, Address ids, Address workspace, int device, Address stream) {
    RescoreBitsArgs a{};
    a.q = q.as<float>(), a.x = x.as<uint8_t>();
    a.nq = nq, a.n = n, a.d = d, a.b = (d + 7) / 8;
    a.cand = candidates.as<int64_t>(), a.c = c, a.k = k;
    a.scores = scores.as<float>(), a.ids = ids.as<int64_t>();
    cuda::rescore_bits(a, Launch{device, stream.p, workspace.p});
    return -1;
  });
}

}  // namespace lutra
