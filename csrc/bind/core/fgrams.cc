#include "address/key_table.h"
#include "address/longest_match.h"
#include "address/xor_ngrams.h"
#include "bind/core/intake.h"

namespace lutra {

void register_fgrams(py::module_& m) {
  m.def("key_insert", [](Ptr keys, Ptr values, int64_t n, Ptr buckets, int64_t n_buckets) {
    int64_t twice = -1;
    if (n_buckets < 1) throw py::value_error("lutra: a table without buckets");
    KeyInsertArgs a{
        keys.as<int64_t>(n), values.as<int32_t>(n), n, buckets.as<int64_t>(n_buckets * 8), n_buckets, &twice};
    run(&key_insert, a, n * 30.0);
    return twice;
  });
  m.def("key_lookup", [](Ptr keys, int64_t n, Ptr buckets, int64_t n_buckets, Ptr values) {
    if (n_buckets < 1) throw py::value_error("lutra: a table without buckets");
    KeyLookupArgs a{keys.as<int64_t>(n), n, buckets.as<int64_t>(n_buckets * 8), n_buckets, values.as<int32_t>(n)};
    run(&key_lookup, a, n * 10.0);
  });
  m.def("key_count", [](Ptr keys, Ptr weights, int64_t n, Ptr slots, int64_t capacity, int64_t used) {
    if (capacity < 1 || capacity & (capacity - 1) || used + n > capacity - capacity / 8)
      throw py::value_error("lutra: a table of counts without room");
    KeyCountArgs a{keys.as<int64_t>(n),
                   weights.p ? weights.as<int64_t>(n) : nullptr,
                   n,
                   slots.as<int64_t>(capacity * 2),
                   capacity,
                   &used};
    run(&key_count, a, n * 20.0);
    return used;
  });
  m.def("longest_match", [](Ptr tokens, int token_type, int64_t total, Ptr offsets, int64_t rows, Ptr buckets,
                            int64_t n_buckets, int64_t n_ngrams, int64_t max_length, Ptr ids, Ptr lengths) {
    int64_t bad = -1;
    if (n_buckets < 1) throw py::value_error("lutra: a table without buckets");
    const auto t = static_cast<DType>(token_type);
    const auto* starts = offsets.as<int64_t>(rows + 1);
    if (rows > 0 && starts[rows] != total) throw py::value_error("lutra: the offsets do not end with the tokens");
    LongestMatchArgs a{tokens.raw(total, t),
                       t,
                       starts,
                       rows,
                       buckets.as<int64_t>(n_buckets * 8),
                       n_buckets,
                       n_ngrams,
                       max_length,
                       ids.as<int64_t>(total),
                       lengths.as<int32_t>(total),
                       &bad};
    run(&longest_match, a, total * 30.0);
    return bad;
  });
  m.def("xor_ngrams", [](Ptr tokens, int token_type, int64_t rows, int64_t length, Ptr multipliers, int64_t longest,
                         Ptr orders, int64_t n_orders, int64_t heads, Ptr moduli, Ptr first, int64_t pad, Ptr ids) {
    int64_t bad = -1;
    const auto t = static_cast<DType>(token_type);
    const int64_t all = n_orders * heads;
    const auto* m = moduli.as<int64_t>(all);
    const auto* o = orders.as<int64_t>(n_orders);
    for (int64_t j = 0; j < all; ++j)
      if (m[j] < 1) throw py::value_error("lutra: a modulus below 1");
    for (int64_t j = 0; j < n_orders; ++j)
      if (o[j] > longest) throw py::value_error("lutra: too few multipliers");
    XorNgramsArgs a{tokens.raw(rows * length, t),
                    t,
                    rows,
                    length,
                    multipliers.as<int64_t>(longest),
                    o,
                    n_orders,
                    heads,
                    m,
                    first.as<int64_t>(all),
                    pad,
                    ids.as<int64_t>(rows * length * all),
                    &bad};
    run(&xor_ngrams, a, rows * length * all * 1.5);
    return bad;
  });
}

}  // namespace lutra
