#include "scan/fast_scan.h"

#include "bind/core/intake.h"

namespace lutra {

void register_fast_scan(py::module_& m) {
  // The caller has checked that lists lie in [0, n), positions in [-1, places) and that codes fill whole blocks.
  m.def("fast_scan",
        [](int64_t nq, int64_t m_, int64_t k, int metric, Ptr tables, Ptr codebooks, int64_t dsub, Ptr bias, Ptr codes,
           int64_t n, Ptr add, Ptr mul, Ptr positions, bool repeated, Ptr list_begin, Ptr list_rows, int64_t lists,
           Ptr probes, Ptr base, int64_t nprobe, Ptr keep, int64_t places, Ptr queries, int64_t ldq, int64_t candidates,
           int exact, int vector_type, Ptr vectors, Ptr vector_scale, int64_t d, int64_t ldx, Ptr scores, Ptr ids) {
          if (nq < 0 || m_ < 1 || k < 1 || n < 0 || places < 0 || n >= (int64_t{1} << 32) - 1)
            throw py::value_error("lutra: fast_scan got a size out of range");
          int64_t bad = -1;
          const auto type = static_cast<DType>(vector_type);
          const bool rescored = candidates > 0;
          FastScanArgs a{nq,
                         m_,
                         k,
                         static_cast<Metric>(metric),
                         tables.p ? tables.as<float>(nq * m_ * 16) : nullptr,
                         tables.p ? nullptr : codebooks.as<float>(m_ * 16 * dsub),
                         dsub,
                         bias.as<float>(bias.p ? nq : 0),
                         codes.as<uint8_t>((n + 15) / 16 * ((m_ + 7) / 8) * 64),
                         n,
                         add.as<float>(add.p ? n : 0),
                         mul.as<float>(mul.p ? n : 0),
                         positions.as<int32_t>(positions.p ? n : 0),
                         repeated,
                         list_begin.as<int64_t>(lists),
                         list_rows.as<int64_t>(lists),
                         lists,
                         probes.as<int64_t>(probes.p ? nq * nprobe : 0),
                         base.as<float>(base.p ? nq * nprobe : 0),
                         nprobe,
                         keep.as<uint8_t>(keep.p ? (places + 7) / 8 : 0),
                         queries.as<float>(queries.p && nq ? (nq - 1) * ldq + (rescored ? d : m_ * dsub) : 0),
                         ldq,
                         candidates,
                         static_cast<Metric>(exact),
                         type,
                         rescored ? vectors.raw(places ? (places - 1) * ldx + d : 0, type) : nullptr,
                         vector_scale.as<float>(vector_scale.p ? places : 0),
                         d,
                         ldx,
                         scores.as<float>(nq * k),
                         ids.as<int64_t>(nq * k),
                         &bad,
                         nullptr,
                         0,
                         0,
                         0};
          const double rows = probes.p && lists ? static_cast<double>(n) / lists * nprobe : static_cast<double>(n);
          run(&fast_scan, a, nq * (rows * m_ * 0.01 + 1000));
          return bad;
        });
  // Scalar codes by their highest bits first.
  m.def("screen_scan",
        [](int64_t nq, int64_t m_, int64_t k, int metric, Ptr tables, Ptr levels, int64_t bits, float high,
           int64_t screen, Ptr bias, Ptr codes, int64_t n, Ptr add, Ptr mul, Ptr keep, Ptr scores, Ptr ids) {
          if (nq < 0 || m_ < 1 || k < 1 || bits < 1 || bits > 4 || screen < k || n < 0 || n >= (int64_t{1} << 32) - 1)
            throw py::value_error("lutra: screen_scan got a size out of range");
          int64_t bad = -1;
          FastScanArgs a{};
          a.nq = nq, a.m = m_, a.k = k, a.n = n;
          a.metric = static_cast<Metric>(metric);
          a.tables = tables.as<float>(nq * m_ * 16);
          a.levels = levels.as<float>(int64_t{1} << bits);
          a.bits = bits, a.high = high, a.screen = screen;
          a.bias = bias.as<float>(bias.p ? nq : 0);
          a.codes = codes.as<uint8_t>((n + 15) / 16 * ((m_ + 7) / 8) * 64);
          a.add = add.as<float>(add.p ? n : 0);
          a.mul = mul.as<float>(mul.p ? n : 0);
          a.keep = keep.as<uint8_t>(keep.p ? (n + 7) / 8 : 0);
          a.scores = scores.as<float>(nq * k);
          a.ids = ids.as<int64_t>(nq * k);
          a.bad = &bad;
          run(&fast_scan, a, nq * (static_cast<double>(n) * m_ * 0.003 + 1000));
          return bad;
        });
  m.def("pack4", [](Ptr entries, int64_t n, int64_t m_, int64_t first, Ptr codes) {
    Pack4Args a{entries.as<uint8_t>(n * m_), n, m_, first,
                codes.as<uint8_t>((first + n + 15) / 16 * ((m_ + 7) / 8) * 64)};
    run(&pack4, a, n * m_ * 0.6);
  });
  m.def("unpack4", [](Ptr codes, Ptr rows, int64_t n, int64_t m_, int64_t first, Ptr entries) {
    Unpack4Args a{codes.as<uint8_t>(0), rows.as<int64_t>(rows.p ? n : 0), n, m_, first, entries.as<uint8_t>(n * m_)};
    run(&unpack4, a, n * m_ * 0.6);
  });
}

}  // namespace lutra
