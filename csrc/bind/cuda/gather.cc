#include "bind/cuda/intake.h"
#include "gather/bag.h"
#include "gather/tables.h"

namespace lutra {
namespace {

// The ids of a bag call: (ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode).
BagIds bag_ids(Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags, int64_t length,
               int64_t padding_idx, int mode) {
  return BagIds{ids.p,       static_cast<DType>(id_type), n_ids, offsets.p, last_offset, bags, length,
                padding_idx, static_cast<Mode>(mode)};
}

}  // namespace

// Where the CPU's functions return the position of a bad id these return -1: it is known on the device alone.
void register_gather(py::module_& m) {
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
  m.def("bag_sort_workspace", [](int64_t n_ids, int64_t) { return cuda::bag_sort_workspace(n_ids); });
  m.def("bag_sort",
        [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags, int64_t length,
           int64_t padding_idx, int mode, int64_t rows, Address order, Address starts, Address touched, Address bag_of,
           Address bag_scale, Address count, Address workspace, int64_t workspace_bytes, int device, Address stream) {
          BagSortArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                        rows,
                        order.as<int64_t>(),
                        starts.as<int64_t>(),
                        touched.as<int64_t>(),
                        bag_of.as<int32_t>(),
                        bag_scale.as<float>(),
                        count.as<int64_t>(),
                        workspace.p,
                        workspace_bytes,
                        nullptr};
          cuda::bag_sort(a, Launch{device, stream.p});
          return -1;
        });
  m.def("bag_backward_workspace",
        [](int64_t n_ids, int64_t dim, int, Address) { return cuda::bag_backward_workspace(n_ids, dim); });
  m.def("bag_backward",
        [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags, int64_t length,
           int64_t padding_idx, int mode, int64_t rows, int64_t dim, Address order, Address starts, Address touched,
           Address bag_of, Address bag_scale, Address count, Address grad_out, int grad_dtype, Address weights,
           Address argmax, bool dense, Address grad_table, Address workspace, int device, Address stream) {
          BagBackwardArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                            rows,
                            dim,
                            order.as<int64_t>(),
                            starts.as<int64_t>(),
                            touched.as<int64_t>(),
                            bag_of.as<int32_t>(),
                            bag_scale.as<float>(),
                            count.as<int64_t>(),
                            grad_out.p,
                            static_cast<DType>(grad_dtype),
                            weights.as<float>(),
                            argmax.as<int64_t>(),
                            dense,
                            grad_table.p};
          cuda::bag_backward(a, Launch{device, stream.p, workspace.p});
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
  m.def("tables", [](Address tables, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Address codes,
                     Address weights, Address bias, int64_t tokens, Address out, int out_dtype, Address scale,
                     Address minimum, int device, Address stream) {
    TablesArgs a{tables.p,
                 static_cast<DType>(dtype),
                 n_tables,
                 entries,
                 dim,
                 codes.as<int32_t>(),
                 weights.as<float>(),
                 bias.p,
                 tokens,
                 out.p,
                 nullptr,
                 static_cast<DType>(out_dtype),
                 scale.as<float>(),
                 minimum.as<float>()};
    cuda::tables(a, Launch{device, stream.p});
    return -1;
  });
  m.def("tables_backward_workspace", [](int64_t tokens, int64_t n_tables, int64_t dim, int device, Address stream) {
    return cuda::tables_backward_workspace(tokens, n_tables, dim, Launch{device, stream.p});
  });
  m.def("tables_backward",
        [](Address tables, int dtype, int64_t n_tables, int64_t entries, int64_t dim, Address codes, Address weights,
           int64_t tokens, Address grad_out, Address grad_tables, Address grad_weights, int grad_dtype, Address scale,
           Address minimum, bool zeroed, Address workspace, int device, Address stream) {
          TablesBackwardArgs a{tables.p,
                               static_cast<DType>(dtype),
                               n_tables,
                               entries,
                               dim,
                               codes.as<int32_t>(),
                               weights.as<float>(),
                               tokens,
                               grad_out.p,
                               grad_tables.p,
                               grad_weights.as<float>(),
                               nullptr,
                               static_cast<DType>(grad_dtype),
                               scale.as<float>(),
                               minimum.as<float>(),
                               zeroed};
          cuda::tables_backward(a, Launch{device, stream.p, workspace.p});
          return -1;
        });
}

}  // namespace lutra
