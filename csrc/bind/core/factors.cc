// Formats of tables that are neither rows nor codes: pruned rows, tensor trains, hash features.
#include <pybind11/stl.h>

#include <array>

#include "address/hash_features.h"
#include "bind/core/bag_ids.h"
#include "bind/core/intake.h"
#include "gather/bag_csr.h"
#include "gather/tensor_train.h"

namespace lutra {
namespace {

CsrTable csr_table(Ptr indptr, bool wide, Ptr columns, int column_bytes, Ptr values, int dtype, int64_t rows,
                   int64_t dim, int64_t nnz, bool read_values) {
  const auto t = static_cast<DType>(dtype);
  return CsrTable{indptr.raw(rows + 1, wide ? DType::i64 : DType::i32),
                  wide,
                  columns.as<char>(nnz * column_bytes),
                  column_bytes,
                  values.raw(read_values ? nnz : 0, t),
                  t,
                  rows,
                  dim,
                  nnz};
}

// (core1, core2, core3, (i1, i2, i3, d1, d2, d3, r1, r2), rows)
typedef std::array<int64_t, 8> Sizes;
TrainCores train_cores(Ptr core1, Ptr core2, Ptr core3, const Sizes& n, int64_t rows) {
  for (const int64_t size : n)
    if (size < 1) throw py::value_error("lutra: a core of a tensor train is empty");
  if (rows > n[0] * n[1] * n[2]) throw py::value_error("lutra: the cores have fewer rows than the table");
  return TrainCores{core1.as<float>(n[0] * n[3] * n[6]),
                    core2.as<float>(n[1] * n[6] * n[4] * n[7]),
                    core3.as<float>(n[2] * n[5] * n[7]),
                    n[0],
                    n[1],
                    n[2],
                    n[3],
                    n[4],
                    n[5],
                    n[6],
                    n[7],
                    rows};
}

}  // namespace

void register_factors(py::module_& m) {
  m.def("hash_features", [](Ptr ids, int id_type, int64_t n, int64_t k, Ptr a, Ptr b, Ptr p, double buckets, Ptr out) {
    int64_t bad = -1;
    if (!(buckets >= 2 && buckets < 2147483648.0)) throw py::value_error("lutra: buckets must lie in [2, 2^31)");
    const auto t = static_cast<DType>(id_type);
    HashFeaturesArgs args{ids.raw(n, t),        t,   n, k, a.as<double>(k), b.as<double>(k), p.as<double>(k), buckets,
                          out.as<float>(n * k), &bad};
    run(&hash_features, args, n * k * 0.7);
    return bad;
  });
  m.def("tensor_train", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                           int64_t length, int64_t padding_idx, int mode, Ptr core1, Ptr core2, Ptr core3,
                           const Sizes& n, int64_t rows, Ptr weights, Ptr out) {
    int64_t bad = -1;
    TensorTrainArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                      train_cores(core1, core2, core3, n, rows), weights.as<float>(weights.p ? n_ids : 0),
                      out.as<float>(bags * n[3] * n[4] * n[5]), &bad};
    run(&tensor_train, a, n_ids * 50.0);
    return bad;
  });
  m.def("tensor_train_backward", [](int64_t n_ids, int64_t bags, Ptr core1, Ptr core2, Ptr core3, const Sizes& n,
                                    int64_t rows, Ptr order, Ptr starts, Ptr touched, Ptr bag_of, Ptr bag_scale,
                                    Ptr count, Ptr weights, Ptr grad, Ptr grad1, Ptr grad2, Ptr grad3) {
    TensorTrainBackwardArgs a{train_cores(core1, core2, core3, n, rows),
                              order.as<int64_t>(n_ids),
                              starts.as<int64_t>(n_ids + 1),
                              touched.as<int64_t>(n_ids),
                              bag_of.as<int32_t>(n_ids),
                              bag_scale.as<float>(bag_scale.p ? bags : 0),
                              count.as<int64_t>(1),
                              weights.as<float>(weights.p ? n_ids : 0),
                              grad.as<float>(bags * n[3] * n[4] * n[5]),
                              grad1.as<float>(n[0] * n[3] * n[6]),
                              grad2.as<float>(n[1] * n[6] * n[4] * n[7]),
                              grad3.as<float>(n[2] * n[5] * n[7])};
    run(&tensor_train_backward, a, n_ids * 50.0 + 1e4);
  });
  m.def("tensor_train_weight_grad", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                                       int64_t length, int64_t padding_idx, int mode, Ptr core1, Ptr core2, Ptr core3,
                                       const Sizes& n, int64_t rows, Ptr grad, Ptr grad_weights) {
    int64_t bad = -1;
    TensorTrainWeightGradArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                                train_cores(core1, core2, core3, n, rows), grad.as<float>(bags * n[3] * n[4] * n[5]),
                                grad_weights.as<float>(n_ids), &bad};
    run(&tensor_train_weight_grad, a, n_ids * 50.0);
    return bad;
  });
  m.def("bag_csr", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags, int64_t length,
                      int64_t padding_idx, int mode, Ptr indptr, bool wide, Ptr columns, int column_bytes, Ptr values,
                      int dtype, int64_t rows, int64_t dim, int64_t nnz, Ptr weights, Ptr out) {
    int64_t bad = -1;
    BagCsrArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                 csr_table(indptr, wide, columns, column_bytes, values, dtype, rows, dim, nnz, true),
                 weights.as<float>(weights.p ? n_ids : 0), out.raw(bags * dim, static_cast<DType>(dtype)), &bad};
    run(&bag_csr, a, n_ids * 15.0 + bags * dim * 0.1);
    return bad;
  });
  m.def("bag_csr_backward",
        [](int64_t n_ids, int64_t bags, Ptr indptr, bool wide, Ptr columns, int column_bytes, Ptr grad_out, int dtype,
           int64_t rows, int64_t dim, int64_t nnz, Ptr order, Ptr starts, Ptr touched, Ptr bag_of, Ptr bag_scale,
           Ptr count, Ptr weights, Ptr grad, bool whole, Ptr grad_values) {
          int64_t bad = -1;
          const auto t = static_cast<DType>(dtype);
          BagCsrBackwardArgs a{csr_table(indptr, wide, columns, column_bytes, grad_out, dtype, rows, dim, nnz, false),
                               order.as<int64_t>(n_ids),
                               starts.as<int64_t>(n_ids + 1),
                               touched.as<int64_t>(n_ids),
                               bag_of.as<int32_t>(n_ids),
                               bag_scale.as<float>(bag_scale.p ? bags : 0),
                               count.as<int64_t>(1),
                               weights.as<float>(weights.p ? n_ids : 0),
                               grad.raw(bags * dim, t),
                               whole,
                               grad_values.raw(nnz, t),
                               &bad};
          a.table.values = grad_values.p;  // only the places of its rows are asked for
          run(&bag_csr_backward, a, n_ids * 15.0);
          return bad;
        });
  m.def("bag_csr_weight_grad", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                                  int64_t length, int64_t padding_idx, int mode, Ptr indptr, bool wide, Ptr columns,
                                  int column_bytes, Ptr values, int dtype, int64_t rows, int64_t dim, int64_t nnz,
                                  Ptr grad_out, Ptr grad_weights) {
    int64_t bad = -1;
    BagCsrWeightGradArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                           csr_table(indptr, wide, columns, column_bytes, values, dtype, rows, dim, nnz, true),
                           grad_out.raw(bags * dim, static_cast<DType>(dtype)), grad_weights.as<float>(n_ids), &bad};
    run(&bag_csr_weight_grad, a, n_ids * 15.0);
    return bad;
  });
}

}  // namespace lutra
