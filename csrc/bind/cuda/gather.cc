#include "bind/cuda/bags.h"
#include "bind/cuda/intake.h"
#include "gather/bag.h"
#include "gather/bag_csr.h"
#include "gather/packed.h"
#include "gather/row_update.h"
#include "gather/senses.h"

namespace lutra {
namespace {

PackedTable packed_table(Address data, int kind, int64_t rows, int64_t dim, int64_t group, int64_t row_bytes) {
  return PackedTable{data.as<uint8_t>(), rows, dim, group, row_bytes, static_cast<Packed>(kind)};
}

PackRowsArgs pack_args(Address table, int dtype, int64_t n, Address packed, int kind, int64_t rows, int64_t dim,
                       int64_t group, int64_t row_bytes, Address ids, bool stochastic, uint64_t seed, Address scale,
                       Address minimum, Address bad) {
  return PackRowsArgs{table.p,
                      static_cast<DType>(dtype),
                      n,
                      packed_table(packed, kind, rows, dim, group, row_bytes),
                      ids.as<int64_t>(),
                      true,
                      stochastic,
                      seed,
                      scale.as<float>(),
                      minimum.as<float>(),
                      bad.as<int64_t>()};
}

void register_packed(py::module_& m) {
  m.def("bag_packed",
        [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags, int64_t length,
           int64_t padding_idx, int mode, Address packed, int kind, int64_t rows, int64_t dim, int64_t group,
           int64_t row_bytes, Address weights, Address out, int out_dtype, int device, Address stream) {
          BagPackedArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                          packed_table(packed, kind, rows, dim, group, row_bytes),
                          weights.as<float>(),
                          out.p,
                          static_cast<DType>(out_dtype),
                          nullptr};
          cuda::bag_packed(a, Launch{device, stream.p});
          return -1;
        });
  m.def("bag_packed_weight_grad", [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset,
                                     int64_t bags, int64_t length, int64_t padding_idx, Address packed, int kind,
                                     int64_t rows, int64_t dim, int64_t group, int64_t row_bytes, Address grad_out,
                                     int grad_dtype, Address grad_weights, int device, Address stream) {
    BagPackedWeightGradArgs a{
        bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, static_cast<int>(Mode::sum)),
        packed_table(packed, kind, rows, dim, group, row_bytes),
        grad_out.p,
        static_cast<DType>(grad_dtype),
        grad_weights.as<float>(),
        nullptr};
    cuda::bag_packed_weight_grad(a, Launch{device, stream.p});
    return -1;
  });
  m.def("check_rows", [](Address table, int dtype, int64_t n, Address packed, int kind, int64_t rows, int64_t dim,
                         int64_t group, int64_t row_bytes, Address ids, bool stochastic, uint64_t seed, Address scale,
                         Address minimum, Address bad, int device, Address stream) {
    cuda::check_rows(pack_args(table, dtype, n, packed, kind, rows, dim, group, row_bytes, ids, stochastic, seed, scale,
                               minimum, bad),
                     Launch{device, stream.p});
  });
  m.def("pack_rows", [](Address table, int dtype, int64_t n, Address packed, int kind, int64_t rows, int64_t dim,
                        int64_t group, int64_t row_bytes, Address ids, bool stochastic, uint64_t seed, Address scale,
                        Address minimum, int device, Address stream) {
    cuda::pack_rows(pack_args(table, dtype, n, packed, kind, rows, dim, group, row_bytes, ids, stochastic, seed, scale,
                              minimum, {}),
                    Launch{device, stream.p});
  });
  m.def("unpack_rows",
        [](Address packed, int kind, int64_t rows, int64_t dim, int64_t group, int64_t row_bytes, Address ids,
           int id_type, int64_t n, int64_t first, Address out, int out_dtype, int device, Address stream) {
          UnpackRowsArgs a{packed_table(packed, kind, rows, dim, group, row_bytes),
                           ids.p,
                           static_cast<DType>(id_type),
                           n,
                           first,
                           out.p,
                           static_cast<DType>(out_dtype),
                           nullptr};
          cuda::unpack_rows(a, Launch{device, stream.p});
          return -1;
        });
}

CsrTable csr_table(Address indptr, bool wide, Address columns, int column_bytes, Address values, int dtype,
                   int64_t rows, int64_t dim, int64_t nnz) {
  return CsrTable{indptr.p, wide, columns.p, column_bytes, values.p, static_cast<DType>(dtype), rows, dim, nnz};
}

void register_csr(py::module_& m) {
  m.def("bag_csr", [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags,
                      int64_t length, int64_t padding_idx, int mode, Address indptr, bool wide, Address columns,
                      int column_bytes, Address values, int dtype, int64_t rows, int64_t dim, int64_t nnz,
                      Address weights, Address out, int device, Address stream) {
    BagCsrArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                 csr_table(indptr, wide, columns, column_bytes, values, dtype, rows, dim, nnz), weights.as<float>(),
                 out.p, nullptr};
    cuda::bag_csr(a, Launch{device, stream.p});
    return -1;
  });
  // Without a workspace: how many bytes of it are needed.
  m.def("bag_csr_grad",
        [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags, int64_t length,
           int64_t padding_idx, int mode, Address indptr, bool wide, Address columns, int column_bytes, Address values,
           int dtype, int64_t rows, int64_t dim, int64_t nnz, Address weights, Address grad_out, Address grad_values,
           Address workspace, int device, Address stream) {
          cuda::CsrGradArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                              csr_table(indptr, wide, columns, column_bytes, values, dtype, rows, dim, nnz),
                              weights.as<float>(), grad_out.p, grad_values.p};
          if (!workspace.p) return cuda::csr_grad_workspace(a, Launch{device, stream.p});
          cuda::csr_grad(a, Launch{device, stream.p, workspace.p});
          return int64_t{0};
        });
  m.def("bag_csr_weight_grad",
        [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags, int64_t length,
           int64_t padding_idx, int mode, Address indptr, bool wide, Address columns, int column_bytes, Address values,
           int dtype, int64_t rows, int64_t dim, int64_t nnz, Address grad_out, Address grad_weights, int device,
           Address stream) {
          BagCsrWeightGradArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                                 csr_table(indptr, wide, columns, column_bytes, values, dtype, rows, dim, nnz),
                                 grad_out.p, grad_weights.as<float>(), nullptr};
          cuda::bag_csr_weight_grad(a, Launch{device, stream.p});
          return -1;
        });
}

void register_senses(py::module_& m) {
  m.def("senses", [](Address table, int dtype, int64_t total, int64_t dim, int64_t tokens, Address offsets,
                     int64_t each, Address ids, int id_type, int64_t n, Address context, Address out, Address best,
                     Address scores, int device, Address stream) {
    SensesArgs a{
        table.p, static_cast<DType>(dtype),   total, dim,       tokens, offsets.as<int64_t>(), each,
        ids.p,   static_cast<DType>(id_type), n,     context.p, out.p,  best.as<int64_t>(),    scores.as<float>(),
        nullptr};
    cuda::senses(a, Launch{device, stream.p});
    return py::make_tuple(-1, -1);
  });
}

void register_update(py::module_& m) {
  m.def("bag_update_columns", [](int dtype, int grad_dtype, int64_t dim) {
    return cuda::bag_update_columns(static_cast<DType>(dtype), static_cast<DType>(grad_dtype), dim);
  });
  m.def("bag_update_workspace", [](int64_t n_ids, Address offsets, int64_t bags, int64_t padding_idx, int mode,
                                   int dtype, int64_t dim, Address weights, int device, Address stream) {
    cuda::BagUpdateArgs a{};
    a.bag = bag_ids({}, 0, n_ids, offsets, false, bags, 0, padding_idx, mode);
    a.step.dtype = static_cast<DType>(dtype), a.step.dim = dim, a.step.weights = weights.as<float>();
    return cuda::bag_update_workspace(a, Launch{device, stream.p});
  });
  m.def("bag_update", [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags,
                         int64_t length, int64_t padding_idx, int mode, Address table, int dtype, int64_t rows,
                         int64_t dim, Address s0, Address s1, int rule, float lr, float shrink, float first,
                         float second, float eps, float scale, bool stochastic, uint64_t seed, Address weights,
                         Address grad, int grad_dtype, Address workspace, int device, Address stream) {
    cuda::BagUpdateArgs a{};
    a.bag = bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode);
    RowUpdateArgs& r = a.step;
    r.table = table.p, r.dtype = static_cast<DType>(dtype), r.rows = rows, r.dim = dim;
    r.s0 = s0.as<float>(), r.s1 = s1.as<float>(), r.rule = static_cast<Rule>(rule);
    r.lr = lr, r.shrink = shrink, r.a = first, r.b = second, r.eps = eps, r.scale = scale;
    r.stochastic = stochastic, r.seed = seed, r.weights = weights.as<float>();
    r.grad = grad.p, r.grad_dtype = static_cast<DType>(grad_dtype), r.mode = static_cast<Mode>(mode);
    cuda::bag_update(a, Launch{device, stream.p, workspace.p});
  });
}

}  // namespace

// Where the CPU's functions return the position of a bad id these return -1: it is known on the device alone.
void register_gather(py::module_& m) {
  register_csr(m);
  register_packed(m);
  register_senses(m);
  register_update(m);
  m.def("bag",
        [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags, int64_t length,
           int64_t padding_idx, int mode, Address table, int dtype, int64_t rows, int64_t dim, Address scale,
           Address minimum, Address weights, Address out, Address argmax, int device, Address stream) {
          BagArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                    table.p,
                    static_cast<DType>(dtype),
                    rows,
                    dim,
                    dim,
                    scale.as<float>(),
                    minimum.as<float>(),
                    weights.as<float>(),
                    out.p,
                    argmax.as<int64_t>(),
                    nullptr};
          cuda::bag(a, Launch{device, stream.p});
          return -1;
        });
  m.def("bag_grad_workspace", [](int64_t n_ids, Address offsets, int64_t bags, int64_t padding_idx, int mode,
                                 int64_t dim, int grad_dtype, Address weights, bool dense, int device, Address stream) {
    cuda::BagGradArgs a{};
    a.bag = bag_ids({}, 0, n_ids, offsets, false, bags, 0, padding_idx, mode);
    a.dim = dim, a.grad_dtype = static_cast<DType>(grad_dtype), a.weights = weights.as<float>(), a.dense = dense;
    return cuda::bag_grad_workspace(a, Launch{device, stream.p});
  });
  m.def("bag_grad", [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags,
                       int64_t length, int64_t padding_idx, int mode, int64_t rows, int64_t dim, Address grad_out,
                       int grad_dtype, Address weights, Address argmax, bool dense, Address grad, Address touched,
                       Address count, Address workspace, int device, Address stream) {
    cuda::BagGradArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                        rows,
                        dim,
                        grad_out.p,
                        static_cast<DType>(grad_dtype),
                        weights.as<float>(),
                        argmax.as<int64_t>(),
                        dense,
                        grad.p,
                        touched.as<int64_t>(),
                        count.as<int64_t>()};
    cuda::bag_grad(a, Launch{device, stream.p, workspace.p});
  });
  m.def("bag_weight_grad",
        [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags, int64_t length,
           int64_t padding_idx, int mode, Address table, int dtype, int64_t rows, int64_t dim, Address scale,
           Address minimum, Address grad_out, int grad_dtype, Address grad_weights, int device, Address stream) {
          BagWeightGradArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                              table.p,
                              static_cast<DType>(dtype),
                              rows,
                              dim,
                              dim,
                              scale.as<float>(),
                              minimum.as<float>(),
                              grad_out.p,
                              static_cast<DType>(grad_dtype),
                              grad_weights.as<float>(),
                              nullptr};
          cuda::bag_weight_grad(a, Launch{device, stream.p});
          return -1;
        });
}

}  // namespace lutra
