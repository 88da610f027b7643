// Scans of codes: packed bits, 4-bit entries, sums of look-ups.
#include "bind/cuda/intake.h"
#include "scan/binary.h"
#include "scan/fast_scan.h"
#include "scan/lookups.h"
#include "scan/packed_logits.h"

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
  m.def("rescore_bits_workspace", [](int64_t nq, int64_t c, int64_t k, int device, Address stream) {
    return cuda::rescore_bits_workspace(nq, c, k, Launch{device, stream.p});
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
  m.def("fast_scan_workspace", [](int64_t nq, int64_t n, int64_t m_, int64_t k, int device, Address stream) {
    return cuda::fast_scan_workspace(nq, n, m_, k, Launch{device, stream.p});
  });
  m.def("fast_scan", [](int64_t nq, int64_t m_, int64_t k, int metric, Address tables, Address bias, Address codes,
                        int64_t n, Address add, Address mul, Address keep, Address scores, Address ids,
                        Address workspace, int device, Address stream) {
    FastScanArgs a{};
    a.nq = nq, a.m = m_, a.k = k, a.n = n;
    a.metric = static_cast<Metric>(metric);
    a.tables = tables.as<float>(), a.bias = bias.as<float>();
    a.codes = codes.as<uint8_t>(), a.keep = keep.as<uint8_t>();
    a.add = add.as<float>(), a.mul = mul.as<float>();
    a.scores = scores.as<float>(), a.ids = ids.as<int64_t>();
    cuda::fast_scan(a, Launch{device, stream.p, workspace.p});
    return -1;
  });
  m.def("pack4", [](Address entries, int64_t n, int64_t m_, int64_t first, Address codes, int device, Address stream) {
    cuda::pack4(Pack4Args{entries.as<uint8_t>(), n, m_, first, codes.as<uint8_t>()}, Launch{device, stream.p});
  });
  m.def("unpack4", [](Address codes, Address rows, int64_t n, int64_t m_, int64_t first, Address entries, int device,
                      Address stream) {
    cuda::unpack4(Unpack4Args{codes.as<uint8_t>(), rows.as<int64_t>(), n, m_, first, entries.as<uint8_t>()},
                  Launch{device, stream.p});
  });
  m.def("lookups_row_bytes", &cuda::lookups_row_bytes);
  m.def("lookups_workspace",
        [](int64_t tokens, int64_t n, int bits, int64_t row_bytes, int64_t k, int device, Address stream) {
          return cuda::lookups_workspace(tokens, n, bits, row_bytes, k, Launch{device, stream.p});
        });
  m.def("lookups", [](Address tables, int64_t st, int64_t sj, int64_t tokens, int64_t m_, int bits, Address codes,
                      int64_t n, int64_t row_bytes, Address bias, Address out, int dtype, int64_t k, Address scores,
                      Address ids, Address workspace, int device, Address stream) {
    LookupsArgs a{};
    a.tables = tables.as<float>(), a.st = st, a.sj = sj;
    a.tokens = tokens, a.m = m_, a.bits = bits;
    a.codes = codes.as<uint8_t>(), a.n = n, a.row_bytes = row_bytes;
    a.bias = bias.as<float>();
    a.out = out.p, a.dtype = static_cast<DType>(dtype), a.ldo = n;
    a.k = k, a.scores = scores.as<float>(), a.ids = ids.as<int64_t>();
    cuda::lookups(a, Launch{device, stream.p, workspace.p});
    return -1;
  });
  m.def("lookups_backward_workspace", [](int64_t tokens, int64_t m_, int bits, int64_t n, int device, Address stream) {
    return cuda::lookups_backward_workspace(tokens, m_, bits, n, Launch{device, stream.p});
  });
  m.def("lookups_backward", [](Address grad, int dtype, int64_t ldg, int64_t tokens, int64_t m_, int bits,
                               Address codes, int64_t n, int64_t row_bytes, Address out, int64_t st, int64_t sj,
                               bool accumulate, Address workspace, int device, Address stream) {
    LookupsBackwardArgs a{};
    a.grad = grad.p, a.dtype = static_cast<DType>(dtype), a.ldg = ldg;
    a.tokens = tokens, a.m = m_, a.bits = bits;
    a.codes = codes.as<uint8_t>(), a.n = n, a.row_bytes = row_bytes;
    a.grad_tables = out.as<float>(), a.st = st, a.sj = sj, a.accumulate = accumulate;
    cuda::lookups_backward(a, Launch{device, stream.p, workspace.p});
  });
  m.def("packed_logits_workspace", [](int64_t tokens, int kind, int64_t rows, int64_t dim, int64_t group, int64_t k,
                                      bool half, int device, Address stream) {
    PackedLogitsArgs a{};
    a.table = PackedTable{nullptr, rows, dim, group, 0, static_cast<Packed>(kind)};
    a.tokens = tokens, a.k = k, a.half_hidden = half;
    return cuda::packed_logits_workspace(a, Launch{device, stream.p});
  });
  m.def("packed_logits", [](Address hidden, int64_t tokens, Address packed, int kind, int64_t rows, int64_t dim,
                            int64_t group, int64_t row_bytes, Address bias, Address out, int dtype, int64_t k,
                            Address scores, Address ids, bool half, Address workspace, int device, Address stream) {
    PackedLogitsArgs a{};
    a.hidden = hidden.as<float>(), a.tokens = tokens;
    a.table = PackedTable{packed.as<uint8_t>(), rows, dim, group, row_bytes, static_cast<Packed>(kind)};
    a.bias = bias.as<float>();
    a.out = out.p, a.dtype = static_cast<DType>(dtype), a.ldo = rows;
    a.k = k, a.scores = scores.as<float>(), a.ids = ids.as<int64_t>();
    a.half_hidden = half;
    cuda::packed_logits(a, Launch{device, stream.p, workspace.p});
    return -1;
  });
}

}  // namespace lutra
