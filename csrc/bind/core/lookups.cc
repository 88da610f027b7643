#include "scan/lookups.h"
#include "common/features.h"

#include "scan/packed_logits.h"

#include "bind/core/intake.h"

namespace lutra {

// Sizes are those of Python's checks; here they guard the memory of NumPy arrays.
void register_lookups(py::module_& m) {
  m.def("lookups", [](Ptr tables, int64_t st, int64_t sj, int64_t tokens, int64_t books, int bits, Ptr codes, int64_t n,
                      int64_t row_bytes, Ptr bias, Ptr out, int dtype, int64_t k, Ptr scores, Ptr ids) {
    int64_t bad = -1;
    const int64_t entries = int64_t{1} << bits;
    const int64_t span = tokens && books ? (tokens - 1) * st + (books - 1) * sj + entries : 0;
    LookupsArgs a{tables.as<float>(span),
                  st,
                  sj,
                  tokens,
                  books,
                  bits,
                  codes.as<uint8_t>(n * row_bytes),
                  n,
                  row_bytes,
                  bias.p ? bias.as<float>(n) : nullptr,
                  k ? nullptr : out.raw(tokens * n, static_cast<DType>(dtype)),
                  static_cast<DType>(dtype),
                  n,
                  k,
                  k ? scores.as<float>(tokens * k) : nullptr,
                  k ? ids.as<int64_t>(tokens * k) : nullptr,
                  &bad};
    run(&lookups, a, static_cast<double>(tokens) * n * books);
    return bad;
  });
  m.def("lookups_backward", [](Ptr grad, int dtype, int64_t ldg, int64_t tokens, int64_t books, int bits, Ptr codes,
                               int64_t n, int64_t row_bytes, Ptr out, int64_t st, int64_t sj, bool accumulate) {
    LookupsBackwardArgs a{grad.raw(tokens ? (tokens - 1) * ldg + n : 0, static_cast<DType>(dtype)),
                          static_cast<DType>(dtype),
                          ldg,
                          tokens,
                          books,
                          bits,
                          codes.as<uint8_t>(n * row_bytes),
                          n,
                          row_bytes,
                          out.as<float>(tokens * books << bits),
                          st,
                          sj,
                          accumulate};
    run(&lookups_backward, a, static_cast<double>(tokens) * n * books);
  });
  m.def("packed_logits", [](Ptr hidden, int64_t tokens, Ptr packed, int kind, int64_t rows, int64_t dim, int64_t group,
                            int64_t row_bytes, Ptr bias, Ptr out, int dtype, int64_t k, Ptr scores, Ptr ids) {
    int64_t bad = -1;
    const PackedTable table{
        packed.as<const uint8_t>(rows * row_bytes), rows, dim, group, row_bytes, static_cast<Packed>(kind)};
    PackedLogitsArgs a{hidden.as<float>(tokens * dim),
                       tokens,
                       table,
                       bias.p ? bias.as<float>(rows) : nullptr,
                       k ? nullptr : out.raw(tokens * rows, static_cast<DType>(dtype)),
                       static_cast<DType>(dtype),
                       rows,
                       k,
                       k ? scores.as<float>(tokens * k) : nullptr,
                       k ? ids.as<int64_t>(tokens * k) : nullptr,
                       &bad};
    run(&packed_logits, a, static_cast<double>(rows) * dim);
    return bad;
  });
  m.def("packed_in_integers", [](int kind) {  // whether packed_logits multiplies them with AVX-512 VNNI
    return g_level == Level::v4 && g_features.vnni && packed_affine(static_cast<Packed>(kind));
  });
}

}  // namespace lutra
