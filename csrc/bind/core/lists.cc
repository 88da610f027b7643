// Scans of inverted lists.
#include "bind/core/intake.h"
#include "scan/list_rows.h"
#include "scan/list_scalar.h"
#include "scan/lut8.h"

namespace lutra {
namespace {

// The part that all list scans share; `rows_known` are the rows of the arena.
ListsArgs lists_of(const Ptr& list_begin, const Ptr& list_rows, int64_t nlist, int64_t arena_rows, const Ptr& positions,
                   int64_t npositions, const Ptr& keep, const Ptr& probes, int64_t nq, int64_t nprobe, int64_t k,
                   int metric, const Ptr& scores, const Ptr& ids, int64_t* bad) {
  return {list_begin.as<int64_t>(nlist),
          list_rows.as<int64_t>(nlist),
          nlist,
          arena_rows,
          positions.as<int32_t>(arena_rows),
          npositions,
          keep.as<uint8_t>((npositions + 7) / 8),
          probes.as<int64_t>(nq * nprobe),
          nq,
          nprobe,
          k,
          static_cast<Metric>(metric),
          scores.as<float>(nq * k),
          ids.as<int64_t>(nq * k),
          bad};
}

}  // namespace

void register_lists(py::module_& m) {
  m.def("list_rows", [](Ptr q, int64_t d, Ptr x, int dtype, Ptr list_begin, Ptr list_rows, int64_t nlist,
                        int64_t arena_rows, Ptr positions, int64_t npositions, Ptr keep, Ptr probes, int64_t nq,
                        int64_t nprobe, int64_t k, int metric, Ptr scores, Ptr ids) {
    int64_t bad = -1;
    const DType type = static_cast<DType>(dtype);
    ListRowsArgs a{lists_of(list_begin, list_rows, nlist, arena_rows, positions, npositions, keep, probes, nq, nprobe,
                            k, metric, scores, ids, &bad),
                   q.as<float>(nq * d),
                   d,
                   d,
                   x.raw(arena_rows * d, type),
                   type};
    run(&lutra::list_rows, a, 1e6);
    return bad;
  });
  m.def("list_scalar", [](Ptr q, int64_t d, Ptr codes, int bits, Ptr step, Ptr offset, Ptr centroids, Ptr list_begin,
                          Ptr list_rows, int64_t nlist, int64_t arena_rows, Ptr positions, int64_t npositions, Ptr keep,
                          Ptr probes, int64_t nq, int64_t nprobe, int64_t k, int metric, Ptr scores, Ptr ids) {
    int64_t bad = -1;
    if (bits != 8 && bits != 6) throw py::value_error("lutra: scalar codes have 8 or 6 bits");
    ListScalarArgs a{lists_of(list_begin, list_rows, nlist, arena_rows, positions, npositions, keep, probes, nq, nprobe,
                              k, metric, scores, ids, &bad),
                     q.as<float>(nq * d),
                     d,
                     d,
                     codes.as<uint8_t>(arena_rows * scalar_size(d, bits)),
                     bits,
                     step.as<float>(d),
                     offset.as<float>(d),
                     centroids.as<float>(nlist * d)};
    run(&lutra::list_scalar, a, 1e6);
    return bad;
  });
  m.def("lut8", [](Ptr lut, int64_t m_, int64_t ksub, int bits, Ptr codes, Ptr base, Ptr bias, Ptr add, Ptr mul,
                   Ptr list_begin, Ptr list_rows, int64_t nlist, int64_t arena_rows, Ptr positions, int64_t npositions,
                   Ptr keep, Ptr probes, int64_t nq, int64_t nprobe, int64_t k, int metric, Ptr scores, Ptr ids) {
    int64_t bad = -1;
    if (bits < 5 || bits > 8 || ksub > int64_t{1} << bits) throw py::value_error("lutra: ksub does not fit the bits");
    Lut8Args a{lists_of(list_begin, list_rows, nlist, arena_rows, positions, npositions, keep, probes, nq, nprobe, k,
                        metric, scores, ids, &bad),
               lut.as<float>(nq * m_ * ksub),
               m_,
               ksub,
               bits,
               codes.as<uint8_t>(arena_rows * ((m_ * bits + 7) / 8)),
               base.as<float>(nq * nprobe),
               bias.as<float>(nq),
               add.as<float>(arena_rows),
               mul.as<float>(arena_rows)};
    run(&lutra::lut8, a, 1e6);
    return bad;
  });
}

}  // namespace lutra
