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

// The ids of a bag call, as in bind/core/gather.cc.
BagIds packed_bag_ids(const Ptr& ids, int id_type, int64_t n_ids, const Ptr& offsets, bool last_offset, int64_t bags,
                      int64_t length, int64_t padding_idx, int mode) {
  const auto t = static_cast<DType>(id_type);
  return BagIds{ids.raw(n_ids, t),
                t,
                n_ids,
                offsets.raw(offsets.p ? bags + last_offset : 0, t),
                last_offset,
                bags,
                length,
                padding_idx,
                static_cast<Mode>(mode)};
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
  m.def("bag_packed", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                         int64_t length, int64_t padding_idx, int mode, Ptr packed, int kind, int64_t rows, int64_t dim,
                         int64_t group, int64_t row_bytes, Ptr weights, Ptr out, int out_dtype) {
    int64_t bad = -1;
    const auto o = static_cast<DType>(out_dtype);
    BagPackedArgs a{packed_bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                    packed_table(packed, kind, rows, dim, group, row_bytes),
                    weights.as<float>(weights.p ? n_ids : 0),
                    out.raw(bags * dim, o),
                    o,
                    &bad};
    run(&bag_packed, a, static_cast<double>(n_ids + bags) * static_cast<double>(dim) * 0.1);
    return bad;
  });
  m.def("bag_packed_weight_grad", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                                     int64_t length, int64_t padding_idx, Ptr packed, int kind, int64_t rows,
                                     int64_t dim, int64_t group, int64_t row_bytes, Ptr grad_out, int grad_dtype,
                                     Ptr grad_weights) {
    int64_t bad = -1;
    const auto g = static_cast<DType>(grad_dtype);
    BagPackedWeightGradArgs a{packed_bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, 0),
                              packed_table(packed, kind, rows, dim, group, row_bytes),
                              grad_out.raw(bags * dim, g),
                              g,
                              grad_weights.as<float>(n_ids),
                              &bad};
    run(&bag_packed_weight_grad, a, static_cast<double>(n_ids) * static_cast<double>(dim) * 0.1);
    return bad;
  });
}

}  // namespace lutra
