#include "bind/core/intake.h"
#include "gather/bag.h"
#include "gather/tables.h"

namespace lutra {
namespace {

// The ids of a bag call: (ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode).
BagIds bag_ids(Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags, int64_t length,
               int64_t padding_idx, int mode) {
  const auto t = static_cast<DType>(id_type);
  return BagIds{ids.raw(n_ids, t), t, n_ids, offsets.raw(offsets.p ? bags + last_offset : 0, t), last_offset, bags,
                length, padding_idx, static_cast<Mode>(mode)};
}

}  // namespace

void register_gather(py::module_& m) {
  m.def("bag", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags, int64_t length,
                  int64_t padding_idx, int mode, Ptr table, int dtype, int64_t rows, int64_t dim, Ptr scale,
                  Ptr minimum, Ptr weights, Ptr out, Ptr argmax) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype);
    const auto out_t = t == DType::u8 || t == DType::i8 ? DType::f32 : t;
    BagArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
              table.raw(rows * dim, t), t, rows, dim, dim, scale.as<float>(scale.p ? rows : 0),
              minimum.as<float>(minimum.p ? rows : 0), weights.as<float>(weights.p ? n_ids : 0),
              out.raw(bags * dim, out_t), argmax.as<int64_t>(argmax.p ? bags * dim : 0), &bad};
    run(&bag, a, n_ids * dim * 0.1 + bags * dim * 0.1);
    return bad;
  });
  m.def("bag_sort_workspace", [](int64_t n_ids, int64_t) { return n_ids * 20; });
  m.def("bag_sort", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                       int64_t length, int64_t padding_idx, int mode, int64_t rows, Ptr order, Ptr starts,
                       Ptr touched, Ptr bag_of, Ptr bag_scale, Ptr count, Ptr workspace, int64_t workspace_bytes) {
    int64_t bad = -1;
    if (workspace_bytes < n_ids * 20) throw py::value_error("lutra: the workspace of bag_sort is too small");
    BagSortArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode), rows,
                  order.as<int64_t>(n_ids), starts.as<int64_t>(n_ids + 1), touched.as<int64_t>(n_ids),
                  bag_of.as<int32_t>(n_ids), bag_scale.as<float>(bag_scale.p ? bags : 0), count.as<int64_t>(1),
                  workspace.as<char>(workspace_bytes), workspace_bytes, &bad};
    run(&bag_sort, a, n_ids * 5.0);
    return bad;
  });
  m.def("bag_backward", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                           int64_t length, int64_t padding_idx, int mode, int64_t rows, int64_t dim, Ptr order,
                           Ptr starts, Ptr touched, Ptr bag_of, Ptr bag_scale, Ptr count, Ptr grad_out,
                           int grad_dtype, Ptr weights, Ptr argmax, bool dense, Ptr grad_table) {
    const auto t = static_cast<DType>(grad_dtype);
    const auto* n = count.as<int64_t>(1);
    BagBackwardArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode), rows, dim,
                      order.as<int64_t>(n_ids), starts.as<int64_t>(n_ids + 1), touched.as<int64_t>(n_ids),
                      bag_of.as<int32_t>(n_ids), bag_scale.as<float>(bag_scale.p ? bags : 0), n,
                      grad_out.raw(bags * dim, t), t, weights.as<float>(weights.p ? n_ids : 0),
                      argmax.as<int64_t>(argmax.p ? bags * dim : 0), dense,
                      grad_table.raw((dense ? rows : *n) * dim, t)};
    run(&bag_backward, a, n_ids * dim * 0.2 + (dense ? rows * dim * 0.1 : 0));
  });
  m.def("bag_weight_grad", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                              int64_t length, int64_t padding_idx, int mode, Ptr table, int dtype, int64_t rows,
                              int64_t dim, Ptr scale, Ptr minimum, Ptr grad_out, int grad_dtype, Ptr grad_weights) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype), gt = static_cast<DType>(grad_dtype);
    BagWeightGradArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                        table.raw(rows * dim, t), t, rows, dim, dim, scale.as<float>(scale.p ? rows : 0),
                        minimum.as<float>(minimum.p ? rows : 0), grad_out.raw(bags * dim, gt), gt,
                        grad_weights.as<float>(n_ids), &bad};
    run(&bag_weight_grad, a, n_ids * dim * 0.1);
    return bad;
  });
  m.def("tables", [](Ptr tables_, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Ptr codes, Ptr weights,
                     Ptr bias, int64_t tokens, Ptr out) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype);
    TablesArgs a{tables_.raw(n_tables * entries * dim, t), t, n_tables, entries, dim,
                 codes.as<int32_t>(tokens * n_tables), weights.as<float>(weights.p ? tokens * n_tables : 0),
                 bias.raw(bias.p ? dim : 0, t), tokens, out.raw(tokens * dim, t), &bad};
    run(&tables, a, tokens * n_tables * dim * 0.1);
    return bad;
  });
  m.def("tables_backward", [](Ptr tables_, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Ptr codes,
                              Ptr weights, int64_t tokens, Ptr grad_out, Ptr grad_tables, Ptr grad_weights) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype);
    TablesBackwardArgs a{tables_.raw(n_tables * entries * dim, t), t, n_tables, entries, dim,
                         codes.as<int32_t>(tokens * n_tables),
                         weights.as<float>(weights.p ? tokens * n_tables : 0), tokens,
                         grad_out.raw(tokens * dim, t),
                         grad_tables.raw(grad_tables.p ? n_tables * entries * dim : 0, t),
                         grad_weights.as<float>(grad_weights.p ? tokens * n_tables : 0), &bad};
    run(&tables_backward, a, n_tables * (entries + tokens) * dim * 0.1);
    return bad;
  });
}

}  // namespace lutra
