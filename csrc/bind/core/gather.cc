#include "bind/core/bag_ids.h"
#include "bind/core/intake.h"
#include "bind/core/quick.h"
#include "gather/bag.h"
#include "gather/senses.h"
#include "gather/tables.h"

namespace lutra {
namespace {

// See quick.h. No padding and no 8-bit rows here: the general path takes them.
py::object quick_bag(py::handle table, py::handle ids, py::handle offsets, py::handle weights, py::handle mode,
                     py::handle last_offset) {
  Quick call;
  View t, i, o, w;
  const int m = option(mode, {"sum", "mean", "max"});
  if (m < 0 || !call.take(table, &t) || !call.take(ids, &i) || t.ndim != 2 || !t.floating() || !i.index())
    return py::none();
  BagIds bag_of{i.data, i.dtype, 0, nullptr, false, 0, 0, -1, static_cast<Mode>(m)};
  if (offsets.is_none()) {
    if (i.ndim != 2 || last_offset.ptr() != Py_False) return py::none();
    bag_of.bags = i.shape[0];
    bag_of.length = i.shape[1];
    bag_of.n_ids = i.shape[0] * i.shape[1];
  } else {
    if (!call.take(offsets, &o) || o.ndim != 1 || o.dtype != i.dtype || i.ndim != 1 ||
        !(last_offset.ptr() == Py_True || last_offset.ptr() == Py_False))
      return py::none();
    bag_of.offsets = o.data;
    bag_of.last_offset = last_offset.ptr() == Py_True;
    bag_of.bags = o.shape[0] - bag_of.last_offset;
    bag_of.n_ids = i.shape[0];
    if (bag_of.bags < 0) return py::none();
  }
  if (!weights.is_none()) {
    if (m != 0 || !call.take(weights, &w) || w.dtype != DType::f32 || w.ndim != i.ndim || w.shape[0] != i.shape[0] ||
        (w.ndim == 2 && w.shape[1] != i.shape[1]))
      return py::none();
  }
  if (t.dtype == DType::bf16 && t.library == View::numpy) return py::none();
  const int64_t rows = t.shape[0], dim = t.shape[1];
  int64_t bad = -1;
  void* out;
  py::object result = call.make(t.dtype, {bag_of.bags, dim}, &out);
  BagArgs a{bag_of, t.data, t.dtype, rows, dim, dim, nullptr, nullptr, static_cast<float*>(w.data), out, nullptr, &bad};
  run(&bag, a, bag_of.n_ids * dim * 0.1 + bag_of.bags * dim * 0.1);
  if (bad != -1) return py::none();
  return result;
}

py::object quick_tables(py::handle tables_, py::handle codes, py::handle weights, py::handle bias) {
  Quick call;
  View t, c, w, b;
  if (!call.take(tables_, &t) || !call.take(codes, &c) || t.ndim != 3 || !t.floating() || c.dtype != DType::i32 ||
      c.ndim < 1 || c.ndim > 3 || c.shape[c.ndim - 1] != t.shape[0])
    return py::none();
  const int64_t n_tables = t.shape[0], entries = t.shape[1], dim = t.shape[2];
  const int64_t n0 = c.ndim > 1 ? c.shape[0] : 1, n1 = c.ndim > 2 ? c.shape[1] : 1;
  if (!weights.is_none()) {
    if (!call.take(weights, &w) || !w.is(DType::f32, c.ndim)) return py::none();
    for (int i = 0; i < c.ndim; ++i)
      if (w.shape[i] != c.shape[i]) return py::none();
  }
  if (!bias.is_none() && (!call.take(bias, &b) || !b.is(t.dtype, 1) || b.shape[0] != dim)) return py::none();
  int64_t bad = -1;
  void* out;
  py::object result = c.ndim == 1   ? call.make(t.dtype, {dim}, &out)
                      : c.ndim == 2 ? call.make(t.dtype, {n0, dim}, &out)
                                    : call.make(t.dtype, {n0, n1, dim}, &out);
  TablesArgs a{t.data,
               t.dtype,
               n_tables,
               entries,
               dim,
               static_cast<int32_t*>(c.data),
               static_cast<float*>(w.data),
               b.data,
               n0 * n1,
               out,
               &bad,
               t.dtype,
               nullptr,
               nullptr};
  run(&tables, a, n0 * n1 * n_tables * dim * 0.1);
  if (bad != -1) return py::none();
  return result;
}

}  // namespace

py::object quick_memory_linear(py::handle x, py::handle tables, py::handle bias, py::handle bits, py::handle score,
                               py::handle temperature, py::handle scale, py::handle minimum);

void register_gather(py::module_& m) {
  m.def("quick_memory_linear", &quick_memory_linear);
  m.def("quick_bag", &quick_bag);
  m.def("quick_tables", &quick_tables);
  m.def("bag", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags, int64_t length,
                  int64_t padding_idx, int mode, Ptr table, int dtype, int64_t rows, int64_t dim, Ptr scale,
                  Ptr minimum, Ptr weights, Ptr out, Ptr argmax) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype);
    const auto out_t = t == DType::u8 || t == DType::i8 ? DType::f32 : t;
    BagArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
              table.raw(rows * dim, t),
              t,
              rows,
              dim,
              dim,
              scale.as<float>(scale.p ? rows : 0),
              minimum.as<float>(minimum.p ? rows : 0),
              weights.as<float>(weights.p ? n_ids : 0),
              out.raw(bags * dim, out_t),
              argmax.as<int64_t>(argmax.p ? bags * dim : 0),
              &bad};
    run(&bag, a, n_ids * dim * 0.1 + bags * dim * 0.1);
    return bad;
  });
  m.def("bag_sort_workspace", [](int64_t n_ids, int64_t) { return n_ids * 20; });
  m.def("bag_sort", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags, int64_t length,
                       int64_t padding_idx, int mode, int64_t rows, Ptr order, Ptr starts, Ptr touched, Ptr bag_of,
                       Ptr bag_scale, Ptr count, Ptr workspace, int64_t workspace_bytes) {
    int64_t bad = -1;
    if (workspace_bytes < n_ids * 20) throw py::value_error("lutra: the workspace of bag_sort is too small");
    BagSortArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                  rows,
                  order.as<int64_t>(n_ids),
                  starts.as<int64_t>(n_ids + 1),
                  touched.as<int64_t>(n_ids),
                  bag_of.as<int32_t>(n_ids),
                  bag_scale.as<float>(bag_scale.p ? bags : 0),
                  count.as<int64_t>(1),
                  workspace.as<char>(workspace_bytes),
                  workspace_bytes,
                  &bad};
    run(&bag_sort, a, n_ids * 5.0);
    return bad;
  });
  m.def("bag_backward", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                           int64_t length, int64_t padding_idx, int mode, int64_t rows, int64_t dim, Ptr order,
                           Ptr starts, Ptr touched, Ptr bag_of, Ptr bag_scale, Ptr count, Ptr grad_out, int grad_dtype,
                           Ptr weights, Ptr argmax, bool dense, Ptr grad_table) {
    const auto t = static_cast<DType>(grad_dtype);
    const auto* n = count.as<int64_t>(1);
    BagBackwardArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                      rows,
                      dim,
                      order.as<int64_t>(n_ids),
                      starts.as<int64_t>(n_ids + 1),
                      touched.as<int64_t>(n_ids),
                      bag_of.as<int32_t>(n_ids),
                      bag_scale.as<float>(bag_scale.p ? bags : 0),
                      n,
                      grad_out.raw(bags * dim, t),
                      t,
                      weights.as<float>(weights.p ? n_ids : 0),
                      argmax.as<int64_t>(argmax.p ? bags * dim : 0),
                      dense,
                      grad_table.raw((dense ? rows : *n) * dim, t)};
    run(&bag_backward, a, n_ids * dim * 0.2 + (dense ? rows * dim * 0.1 : 0));
  });
  m.def("bag_weight_grad", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                              int64_t length, int64_t padding_idx, int mode, Ptr table, int dtype, int64_t rows,
                              int64_t dim, Ptr scale, Ptr minimum, Ptr grad_out, int grad_dtype, Ptr grad_weights) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype), gt = static_cast<DType>(grad_dtype);
    BagWeightGradArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                        table.raw(rows * dim, t),
                        t,
                        rows,
                        dim,
                        dim,
                        scale.as<float>(scale.p ? rows : 0),
                        minimum.as<float>(minimum.p ? rows : 0),
                        grad_out.raw(bags * dim, gt),
                        gt,
                        grad_weights.as<float>(n_ids),
                        &bad};
    run(&bag_weight_grad, a, n_ids * dim * 0.1);
    return bad;
  });
  m.def("tables", [](Ptr tables_, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Ptr codes, Ptr weights,
                     Ptr bias, int64_t tokens, Ptr out, int out_dtype, Ptr scale, Ptr minimum) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype), out_t = static_cast<DType>(out_dtype);
    const int64_t rows = t == DType::i8 ? n_tables * entries : 0;
    TablesArgs a{tables_.raw(n_tables * entries * dim, t),
                 t,
                 n_tables,
                 entries,
                 dim,
                 codes.as<int32_t>(tokens * n_tables),
                 weights.as<float>(weights.p ? tokens * n_tables : 0),
                 bias.raw(bias.p ? dim : 0, out_t),
                 tokens,
                 out.raw(tokens * dim, out_t),
                 &bad,
                 out_t,
                 scale.as<float>(rows),
                 minimum.as<float>(rows)};
    run(&tables, a, tokens * n_tables * dim * 0.1);
    return bad;
  });
  m.def("senses", [](Ptr table, int dtype, int64_t total, int64_t dim, int64_t tokens, Ptr offsets, int64_t each,
                     Ptr ids, int id_type, int64_t n, Ptr context, Ptr out, Ptr best, Ptr scores) {
    int64_t bad[2] = {-1, -1};
    const auto t = static_cast<DType>(dtype), id_t = static_cast<DType>(id_type);
    SensesArgs a{table.raw(total * dim, t),
                 t,
                 total,
                 dim,
                 tokens,
                 offsets.as<int64_t>(offsets.p ? tokens + 1 : 0),
                 each,
                 ids.raw(n, id_t),
                 id_t,
                 n,
                 context.raw(n * dim, t),
                 out.raw(n * dim, t),
                 best.as<int64_t>(n),
                 scores.as<float>(n),
                 bad};
    run(&senses, a, static_cast<double>(n) * (dim + 1) * 0.2);
    return py::make_tuple(bad[0], bad[1]);
  });
  m.def("tables_backward", [](Ptr tables_, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Ptr codes,
                              Ptr weights, int64_t tokens, Ptr grad_out, Ptr grad_tables, Ptr grad_weights,
                              int grad_dtype, Ptr scale, Ptr minimum, bool zeroed) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype), gt = static_cast<DType>(grad_dtype);
    const int64_t rows = t == DType::i8 ? n_tables * entries : 0;
    TablesBackwardArgs a{tables_.raw(n_tables * entries * dim, t),
                         t,
                         n_tables,
                         entries,
                         dim,
                         codes.as<int32_t>(tokens * n_tables),
                         weights.as<float>(weights.p ? tokens * n_tables : 0),
                         tokens,
                         grad_out.raw(tokens * dim, gt),
                         grad_tables.raw(grad_tables.p ? n_tables * entries * dim : 0, gt),
                         grad_weights.as<float>(grad_weights.p ? tokens * n_tables : 0),
                         &bad,
                         gt,
                         scale.as<float>(rows),
                         minimum.as<float>(rows),
                         zeroed};
    run(&tables_backward, a, n_tables * (entries + tokens) * dim * 0.1);
    return bad;
  });
}

}  // namespace lutra
