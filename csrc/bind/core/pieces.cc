#include "gather/pieces.h"
#include "bind/core/bag_ids.h"
#include "bind/core/intake.h"
#include "gather/scaled_rows.h"

#include <pybind11/stl.h>

#include <vector>

namespace lutra {
namespace {

// The greatest address of a source must lie in the table: memory safety rests on it.
void check(const PieceSource& s, const std::vector<int64_t>& a, bool stored) {
  const int64_t limit = int64_t{1} << 31;
  const auto need = [](bool ok) {
    if (!ok) throw py::value_error("lutra: the numbers of a piece source do not fit its table");
  };
  const auto has = [&](size_t n) { need(a.size() == n); };
  need(s.m >= 1 && s.rows >= 0 && s.table_rows >= 0);
  if (s.kind != PieceKind::codes) need(s.rows <= limit && s.table_rows <= limit);
  switch (s.kind) {
    case PieceKind::codes:
      has(2);
      need(a[0] == s.m && a[1] >= 1 && a[1] <= 16 && s.m < (1 << 24) && s.m << a[1] == s.table_rows);
      need(stored && s.code_bytes >= (s.m * a[1] + 7) / 8);
      break;
    case PieceKind::digits:
      has(3);
      need(a[0] == s.m && a[1] >= 1 && a[1] < limit && s.m < (1 << 24) && a[2] >= a[1] && s.m * a[2] == s.table_rows);
      {
        int64_t last = s.rows > 0 ? s.rows - 1 : 0;  // the greatest last digit
        for (int64_t j = 1; j < s.m; ++j) last /= a[1];
        need(last < a[2]);
      }
      break;
    case PieceKind::qr:
      has(2);
      need(s.m == 2 && a[0] >= 1 && a[1] >= 0 && (s.rows + a[0] - 1) / a[0] <= a[1] && a[1] + a[0] <= s.table_rows);
      break;
    case PieceKind::hash:
      has(static_cast<size_t>(2 + 2 * s.m));
      need(a[0] == s.m && a[1] >= 1 && a[1] <= s.table_rows);
      break;
    case PieceKind::robe:
      has(8);
      need(a[0] == s.m && a[1] == s.table_rows && a[1] >= 1 && s.m < (1 << 24));
      break;
    case PieceKind::modulo:
      has(1);
      need(s.m == 1 && a[0] >= 1 && a[0] <= s.table_rows);
      break;
    case PieceKind::blocks:  // the kernel checks what the remap holds
      has(2);
      need(s.m == 1 && a[0] >= 1 && a[0] < limit && stored);
      break;
    default: need(false);
  }
  if (s.kind == PieceKind::hash || s.kind == PieceKind::robe)
    for (size_t i = 2; i < a.size(); ++i) need(a[i] >= 0 && a[i] < static_cast<int64_t>(kPiecePrime));
}

PieceSource source(int kind, int64_t m, int64_t rows, Ptr stored, int64_t code_bytes, const std::vector<int64_t>& a,
                   int64_t table_rows) {
  PieceSource s{static_cast<PieceKind>(kind), m, rows, nullptr, code_bytes, nullptr, a.data(), table_rows};
  check(s, a, stored.p != nullptr);
  if (s.kind == PieceKind::codes) s.codes = stored.as<uint8_t>(rows * code_bytes);
  if (s.kind == PieceKind::blocks) s.remap = stored.as<int32_t>((rows + a[0] - 1) / a[0]);
  return s;
}

// Refuses widths and products that do not fit; whether the pieces are ROBE's, whose table is one array.
bool checked_robe(int kind, Combine combine, int64_t pieces, int64_t width, int64_t table_rows) {
  const bool robe = static_cast<PieceKind>(kind) == PieceKind::robe;
  if (width < 0 || (robe && width > table_rows)) throw py::value_error("lutra: a piece is wider than its table");
  if (combine == Combine::product && pieces != 2) throw py::value_error("lutra: a product is of two pieces");
  return robe;
}

}  // namespace

void register_pieces(py::module_& m) {
  m.def("pieces", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags, int64_t length,
                     int64_t padding_idx, int mode, int kind, int64_t pieces_, int64_t rows, Ptr stored,
                     int64_t code_bytes, const std::vector<int64_t>& numbers, int64_t table_rows, int combine,
                     Ptr table, int dtype, int64_t width, Ptr weights, Ptr piece_weights, Ptr out) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype);
    const auto c = static_cast<Combine>(combine);
    const bool robe = checked_robe(kind, c, pieces_, width, table_rows);
    PiecesArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                 source(kind, pieces_, rows, stored, code_bytes, numbers, table_rows),
                 c,
                 table.raw(robe ? table_rows : table_rows * width, t),
                 t,
                 width,
                 weights.as<float>(weights.p ? n_ids : 0),
                 piece_weights.raw(piece_weights.p ? rows * pieces_ : 0, t),
                 out.raw(bags * width * (c == Combine::concat ? pieces_ : 1), t),
                 &bad};
    run(&pieces, a, static_cast<double>(n_ids * pieces_ * (width + 4)) * 0.1);
    return bad;
  });
  m.def("pieces_backward", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                              int64_t length, int64_t padding_idx, int mode, int kind, int64_t pieces_, int64_t rows,
                              Ptr stored, int64_t code_bytes, const std::vector<int64_t>& numbers, int64_t table_rows,
                              bool sum, int64_t width, Ptr grad_out, int dtype, Ptr weights, Ptr grad_table) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype);
    const auto k = static_cast<PieceKind>(kind);
    if (k != PieceKind::codes && k != PieceKind::digits)
      throw py::value_error("lutra: pieces_backward is for pieces that have tables of their own");
    if (sum && (k != PieceKind::codes || numbers.size() < 2 || numbers[1] > 8))
      throw py::value_error("lutra: pieces_backward sums codes of at most 8 bits");
    PiecesBackwardArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                         source(kind, pieces_, rows, stored, code_bytes, numbers, table_rows),
                         sum,
                         width,
                         grad_out.raw(bags * (sum ? 1 : pieces_) * width, t),
                         t,
                         weights.as<float>(weights.p ? n_ids : 0),
                         grad_table.raw(table_rows * width, t),
                         &bad};
    if (table_rows % pieces_) throw py::value_error("lutra: the rows of the table must be a multiple of the pieces");
    run(&pieces_backward, a, static_cast<double>((n_ids * pieces_ + table_rows) * (width + 4)) * 0.1);
    return bad;
  });
  m.def("piece_dots", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                         int64_t length, int64_t padding_idx, int mode, int kind, int64_t pieces_, int64_t rows,
                         Ptr stored, int64_t code_bytes, const std::vector<int64_t>& numbers, int64_t table_rows,
                         int combine, Ptr table, int dtype, int64_t width, Ptr grad_out, Ptr dots) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype);
    const auto c = static_cast<Combine>(combine);
    const bool robe = checked_robe(kind, c, pieces_, width, table_rows);
    PieceDotsArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                    source(kind, pieces_, rows, stored, code_bytes, numbers, table_rows),
                    c,
                    table.raw(robe ? table_rows : table_rows * width, t),
                    t,
                    width,
                    grad_out.raw(bags * width * (c == Combine::concat ? pieces_ : 1), t),
                    dots.as<float>(n_ids * (c == Combine::product ? 1 : pieces_)),
                    &bad};
    run(&piece_dots, a, static_cast<double>(n_ids * pieces_ * (width + 4)) * 0.1);
    return bad;
  });
  m.def("piece_addresses", [](Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags,
                              int64_t length, int64_t padding_idx, int mode, int kind, int64_t pieces_, int64_t rows,
                              Ptr stored, int64_t code_bytes, const std::vector<int64_t>& numbers, int64_t table_rows,
                              int dtype, Ptr weights, Ptr piece_weights, Ptr at, Ptr factors) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(dtype);
    PieceAddressesArgs a{bag_ids(ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode),
                         source(kind, pieces_, rows, stored, code_bytes, numbers, table_rows),
                         t,
                         weights.as<float>(weights.p ? n_ids : 0),
                         piece_weights.raw(piece_weights.p ? rows * pieces_ : 0, t),
                         at.as<int64_t>(n_ids * pieces_),
                         factors.as<float>(factors.p ? n_ids * pieces_ : 0),
                         &bad};
    run(&piece_addresses, a, static_cast<double>(n_ids * pieces_) * 3);
    return bad;
  });
  m.def("piece_sums", [](int kind, int64_t pieces_, int64_t width, int64_t table_rows, int64_t dim, int64_t n, Ptr at,
                         Ptr order, Ptr starts, Ptr touched, Ptr bag_of, Ptr count, Ptr factors, Ptr table,
                         Ptr grad_out, int64_t bags, int dtype, Ptr grad_table) {
    const auto t = static_cast<DType>(dtype);
    const auto k = static_cast<PieceKind>(kind);
    const int64_t elements = k == PieceKind::robe ? table_rows : table_rows * dim;
    PieceSumsArgs a{k,
                    pieces_,
                    width,
                    table_rows,
                    dim,
                    at.as<int64_t>(n),
                    order.as<int64_t>(n),
                    starts.as<int64_t>(n + 1),
                    touched.as<int64_t>(n),
                    bag_of.as<int32_t>(n),
                    *count.as<int64_t>(1),
                    factors.as<float>(factors.p ? n : 0),
                    table.raw(table.p ? elements : 0, t),
                    grad_out.raw(bags * dim, t),
                    t,
                    grad_table.raw(elements, t)};
    run(&piece_sums, a, static_cast<double>(n * width + elements) * 0.2);
  });
  m.def("scaled_keys", [](Ptr ids, int id_type, int64_t n_ids, int64_t rows, int64_t n, Ptr keys) {
    if (n < 1 || rows < 0 || rows > int64_t{1} << 31 || n > int64_t{1} << 31)
      throw py::value_error("lutra: rows and n of scaled rows are out of range");
    const auto t = static_cast<DType>(id_type);
    ScaledKeysArgs a{ids.raw(n_ids, t), t, n_ids, rows, n, keys.as<int64_t>(n_ids)};
    run(&scaled_keys, a, static_cast<double>(n_ids) * 3);
  });
  m.def("scaled_grads", [](int64_t rows, int64_t n, int64_t dim, int64_t n_ids, int64_t bags, Ptr order, Ptr starts,
                           Ptr touched, Ptr bag_of, Ptr bag_scale, Ptr count, Ptr weights, Ptr table, Ptr scale,
                           Ptr grad_out, int dtype, Ptr grad_table, Ptr grad_scale, Ptr grad_weights) {
    const auto t = static_cast<DType>(dtype);
    if (n < 1 || rows < 0 || dim < 0) throw py::value_error("lutra: rows and n of scaled rows are out of range");
    ScaledGradsArgs a{rows,
                      n,
                      dim,
                      n_ids,
                      order.as<int64_t>(n_ids),
                      starts.as<int64_t>(n_ids + 1),
                      touched.as<int64_t>(n_ids),
                      bag_of.as<int32_t>(n_ids),
                      bag_scale.as<float>(bag_scale.p ? bags : 0),
                      *count.as<int64_t>(1),
                      weights.as<float>(weights.p ? n_ids : 0),
                      table.raw(n * dim, t),
                      scale.raw(rows, t),
                      grad_out.raw(bags * dim, t),
                      t,
                      grad_table.raw(grad_table.p ? n * dim : 0, t),
                      grad_scale.raw(grad_scale.p ? rows : 0, t),
                      grad_weights.as<float>(grad_weights.p ? n_ids : 0)};
    run(&scaled_grads, a, static_cast<double>(n_ids) * 20);
  });
}

}  // namespace lutra
