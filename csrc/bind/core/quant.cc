#include "address/linear.h"
#include "address/pq_decode.h"
#include "address/pq_encode.h"
#include "address/rq_encode.h"
#include "bind/core/intake.h"

namespace lutra {

void register_quant(py::module_& m) {
  m.def("linear", [](Ptr x, Ptr matrix, int64_t n, int64_t a, int64_t b, Ptr y) {
    LinearArgs args{x.as<float>(n * a), matrix.as<float>(a * b), n, a, b, y.as<float>(n * b)};
    run(&linear, args, 0.02 * n * a * b);
  });
  m.def("pq_encode", [](Ptr x, Ptr books, int64_t n, int64_t m, int64_t ksub, int64_t dsub, Ptr entries, Ptr directions,
                        float threshold, int rounds) {
    if (ksub < 1 || ksub > 256) throw py::value_error("lutra: ksub must be in [1, 256]");
    const int64_t d = m * dsub;
    PqEncodeArgs args{x.as<float>(n * d),
                      books.as<float>(m * ksub * dsub),
                      n,
                      m,
                      ksub,
                      dsub,
                      entries.as<uint8_t>(n * m),
                      directions.p ? directions.as<float>(n * d) : nullptr,
                      threshold,
                      rounds};
    run(&pq_encode, args, 0.03 * n * d * ksub);
  });
  m.def("pq_decode", [](Ptr entries, Ptr books, int64_t n, int64_t m, int64_t ksub, int64_t dsub, Ptr x) {
    PqDecodeArgs args{entries.as<uint8_t>(n * m), books.as<float>(m * ksub * dsub), n, m, ksub, dsub,
                      x.as<float>(n * m * dsub)};
    run(&pq_decode, args, 1.0 * n * m);
  });
  m.def("rq_encode", [](Ptr dots, Ptr norms, Ptr gram, int64_t n, int64_t m, int64_t ksub, int64_t beam, int64_t begin,
                        int64_t end, int64_t width, int64_t keep, Ptr start, Ptr reached, Ptr entries, Ptr scores) {
    if (ksub < 1 || ksub > 256 || beam < 1) throw py::value_error("lutra: ksub must be in [1, 256], beam at least 1");
    if (begin < 0 || end <= begin || end > m || width < 1 || width > 256)
      throw py::value_error("lutra: codebooks must be in [0, m), width in [1, 256]");
    if (!begin) width = 1;
    int64_t room = width;
    for (int64_t j = begin; j < end && room < beam; ++j) room *= ksub;
    if (keep < 1 || keep > beam || keep > room) throw py::value_error("lutra: keep must be in [1, beam]");
    if (begin && !(start.p && reached.p)) throw py::value_error("lutra: begin > 0 needs start and reached");
    const int64_t all = m * ksub;
    RqEncodeArgs args{dots.as<float>(n * (end - begin) * ksub),
                      norms.as<float>(all),
                      gram.as<float>(all * all),
                      n,
                      m,
                      ksub,
                      beam,
                      begin,
                      end,
                      width,
                      keep,
                      begin ? start.as<uint8_t>(n * width * begin) : nullptr,
                      begin ? reached.as<float>(n * width) : nullptr,
                      entries.as<uint8_t>(n * keep * end),
                      scores.p ? scores.as<float>(n * keep) : nullptr};
    run(&rq_encode, args, 0.05 * n * (end - begin) * end * ksub * beam);
  });
}

}  // namespace lutra
