#include "gather/packed.h"
#include "bind/core/intake.h"

namespace lutra {
namespace {

// (packed, kind, rows, dim, group, row_bytes), checked where memory safety needs it.
PackedTable packed_table(const Ptr& packed, int kind, int64_t rows, int64_t dim, int64_t group, int64_t row_bytes) {
  static const int bits[] = {8, 4, 2, 4, 8, 8}, group_bytes[] = {8, 4, 4, 2, 4, 4};
  if (kind < 0 || kind > 5 || rows < 0 || dim < 0 || group < 1 || (group < dim && group % 16))
    throw py::value_error("lutra: no such packed table");
  const int64_t need = (dim * bits[kind] + 7) / 8 + (dim + group - 1) / group * group_bytes[kind];
  if (row_bytes != need)
    throw py::value_error("lutra: packed rows of " + std::to_string(need) + " bytes are needed, got " +
                          std::to_string(row_bytes));
  return PackedTable{
      packed.as<const uint8_t>(rows * row_bytes), rows, dim, group, row_bytes, static_cast<Packed>(kind)};
}

}  // namespace

void register_packed(py::module_& m) {
  m.def("pack_rows",
        [](Ptr table, int dtype, int64_t n, Ptr out, int kind, int64_t rows, int64_t dim, int64_t group,
           int64_t row_bytes, Ptr ids, bool unique, bool stochastic, uint64_t seed, Ptr scale, Ptr minimum) {
          int64_t bad = -1;
          const auto t = static_cast<DType>(dtype);
          const int64_t groups = dim ? (dim + group - 1) / group : 0;
          if (!ids.p && n > rows) throw py::value_error("lutra: more rows than the packed table has");
          PackRowsArgs a{table.raw(n * dim, t),
                         t,
                         n,
                         packed_table(out, kind, rows, dim, group, row_bytes),
                         ids.as<int64_t>(ids.p ? n : 0),
                         unique,
                         stochastic,
                         seed,
                         scale.as<float>(scale.p ? n * groups : 0),
                         minimum.as<float>(minimum.p ? n * groups : 0),
                         &bad};
          run(&pack_rows, a, static_cast<double>(n) * static_cast<double>(dim));
          return bad;
        });
  m.def("unpack_rows", [](Ptr packed, int kind, int64_t rows, int64_t dim, int64_t group, int64_t row_bytes, Ptr ids,
                          int id_type, int64_t n, int64_t first, Ptr out, int out_dtype) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(id_type), o = static_cast<DType>(out_dtype);
    UnpackRowsArgs a{packed_table(packed, kind, rows, dim, group, row_bytes),
                     ids.raw(ids.p ? n : 0, t),
                     t,
                     n,
                     first,
                     out.raw(n * dim, o),
                     o,
                     &bad};
    run(&unpack_rows, a, static_cast<double>(n) * static_cast<double>(dim) * 0.2);
    return bad;
  });
}

}  // namespace lutra
