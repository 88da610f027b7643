#include "gather/pieces.h"

#include <pybind11/stl.h>

#include <vector>

#include "bind/cuda/bags.h"
#include "bind/cuda/intake.h"
#include "gather/tensor_train.h"

namespace lutra {
namespace {

using Numbers = std::vector<int64_t>;

PieceSource piece_source(int kind, int64_t m, int64_t rows, Address stored, int64_t code_bytes, const Numbers& numbers,
                         int64_t table_rows) {
  const auto k = static_cast<PieceKind>(kind);
  const bool codes = k == PieceKind::codes;
  return PieceSource{k,
                     m,
                     rows,
                     codes ? stored.as<uint8_t>() : nullptr,
                     code_bytes,
                     codes ? nullptr : stored.as<int32_t>(),
                     numbers.data(),
                     table_rows};
}

}  // namespace

// As the CPU's functions; an id or an address that is out of range makes its bag NaN.
void register_pieces(py::module_& m) {
  m.def("pieces",
        [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags, int64_t length,
           int64_t padding_idx, int mode, int kind, int64_t count, int64_t rows, Address stored, int64_t code_bytes,
           const Numbers& numbers, int64_t table_rows, int combine, Address table, int dtype, int64_t width,
           Address weights, Address piece_weights, Address out, int device, Address stream) {
          PiecesArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                       piece_source(kind, count, rows, stored, code_bytes, numbers, table_rows),
                       static_cast<Combine>(combine),
                       table.p,
                       static_cast<DType>(dtype),
                       width,
                       weights.as<float>(),
                       piece_weights.p,
                       out.p,
                       nullptr};
          cuda::pieces(a, static_cast<int64_t>(numbers.size()), Launch{device, stream.p});
          return -1;
        });
  m.def("piece_dots",
        [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags, int64_t length,
           int64_t padding_idx, int mode, int kind, int64_t count, int64_t rows, Address stored, int64_t code_bytes,
           const Numbers& numbers, int64_t table_rows, int combine, Address table, int dtype, int64_t width,
           Address grad_out, Address dots, int device, Address stream) {
          PieceDotsArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                          piece_source(kind, count, rows, stored, code_bytes, numbers, table_rows),
                          static_cast<Combine>(combine),
                          table.p,
                          static_cast<DType>(dtype),
                          width,
                          grad_out.p,
                          dots.as<float>(),
                          nullptr};
          cuda::piece_dots(a, static_cast<int64_t>(numbers.size()), Launch{device, stream.p});
          return -1;
        });
  // Without a workspace: how many bytes of it are needed.
  m.def("piece_grad", [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags,
                         int64_t length, int64_t padding_idx, int mode, int kind, int64_t count, int64_t rows,
                         Address stored, int64_t code_bytes, const Numbers& numbers, int64_t table_rows, int combine,
                         int64_t width, Address table, Address grad_out, int dtype, Address weights,
                         Address piece_weights, Address grad_table, Address workspace, int device, Address stream) {
    cuda::PieceGradArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                          piece_source(kind, count, rows, stored, code_bytes, numbers, table_rows),
                          static_cast<int64_t>(numbers.size()),
                          static_cast<Combine>(combine),
                          width,
                          table.p,
                          grad_out.p,
                          static_cast<DType>(dtype),
                          weights.as<float>(),
                          piece_weights.p,
                          grad_table.p};
    if (!workspace.p) return cuda::piece_grad_workspace(a, Launch{device, stream.p});
    cuda::piece_grad(a, Launch{device, stream.p, workspace.p});
    return int64_t{0};
  });
  m.def("tensor_train", [](Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags,
                           int64_t length, int64_t padding_idx, int mode, Address core1, Address core2, Address core3,
                           const Numbers& n, int64_t rows, Address weights, Address out, int device, Address stream) {
    if (n.size() != 8) throw std::invalid_argument("lutra: tensor_train: eight sizes");
    TensorTrainArgs a{
        bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
        {core1.as<float>(), core2.as<float>(), core3.as<float>(), n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], rows},
        weights.as<float>(),
        out.as<float>(),
        nullptr};
    cuda::tensor_train(a, Launch{device, stream.p});
    return -1;
  });
}

}  // namespace lutra
