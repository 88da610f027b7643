#include "address/fwht.h"
#include "address/product_keys.h"
#include "address/random_rows.h"
#include "address/sign_hash.h"
#include "address/token_ngrams.h"
#include "bind/core/intake.h"
#include "bind/core/quick.h"
#include "bind/core/text_ngrams.h"

#include <cstring>
#include <vector>

namespace lutra {
namespace {

// See quick.h. Two or three axes at most: more are rare, and the general path takes them.
py::object quick_sign_hash(py::handle x, py::handle bits_, py::handle score, py::handle temperature_) {
  Quick call;
  View a;
  int64_t bits;
  double temperature;
  const int s = option(score, {"prob", "scaled"});
  if (s < 0 || !integer(bits_, &bits) || !number(temperature_, &temperature) || bits < 1 || bits > 16 ||
      !(temperature > 0 && temperature < 3e38) || !call.take(x, &a) || !a.floating() || a.ndim < 1 || a.ndim > 3 ||
      a.shape[a.ndim - 1] % bits)
    return py::none();
  const int64_t d = a.shape[a.ndim - 1], tables = d / bits;
  const int64_t n0 = a.ndim > 1 ? a.shape[0] : 1, n1 = a.ndim > 2 ? a.shape[1] : 1;
  void *codes, *weights;
  const auto make = [&](DType t, void** data) {
    return a.ndim == 1   ? call.make(t, {tables}, data)
           : a.ndim == 2 ? call.make(t, {n0, tables}, data)
                         : call.make(t, {n0, n1, tables}, data);
  };
  py::object c = make(DType::i32, &codes), w = make(DType::f32, &weights);
  SignHashArgs args{a.data,
                    a.dtype,
                    n0 * n1,
                    tables,
                    d,
                    static_cast<int>(bits),
                    static_cast<Score>(s),
                    static_cast<float>(temperature),
                    static_cast<int32_t*>(codes),
                    static_cast<float*>(weights)};
  run(&sign_hash, args, n0 * n1 * d * 1.0);
  return py::make_tuple(std::move(c), std::move(w));
}

// 2-d tokens, or 1-d with offsets; int64 only.
py::object quick_token_ngrams(py::handle tokens, py::handle offsets, py::handle order_, py::handle buckets_,
                              py::handle first_bucket_, py::handle unigrams_) {
  Quick call;
  View t, o;
  int64_t order, buckets, first;
  const bool unigrams = unigrams_.ptr() == Py_True, square = offsets.is_none();
  if (!integer(order_, &order) || !integer(buckets_, &buckets) || !integer(first_bucket_, &first) ||
      (!unigrams && unigrams_.ptr() != Py_False) || order < 1 || order >= int64_t{1} << 31 || buckets < 1 ||
      buckets > int64_t{1} << 62 || first < 0 || first > int64_t{1} << 62 || !call.take(tokens, &t) ||
      !t.is(DType::i64, square ? 2 : 1) || (!square && (!call.take(offsets, &o) || !o.is(DType::i64, 1))))
    return py::none();
  const int64_t texts = square ? t.shape[0] : o.shape[0], total = square ? texts * t.shape[1] : t.shape[0];
  const auto* values = static_cast<const int64_t*>(t.data);
  if (first && unigrams)  // then a token is an id
    for (int64_t i = 0; i < total; ++i)
      if (static_cast<uint64_t>(values[i]) >= static_cast<uint64_t>(first)) return py::none();
  std::vector<int64_t> starts(texts + 1), out(texts + 1);
  for (int64_t b = 0; b < texts; ++b) starts[b] = square ? b * t.shape[1] : static_cast<const int64_t*>(o.data)[b];
  starts[texts] = total;
  if (starts[0] != 0) return py::none();  // also tokens without a text
  for (int64_t b = 0; b < texts; ++b) {
    if (starts[b + 1] < starts[b]) return py::none();
    out[b + 1] = out[b] + ngram_count(starts[b + 1] - starts[b], order, unigrams);
  }
  void *ids, *first_ids;
  py::object result = call.make(DType::i64, {out[texts]}, &ids), where = call.make(DType::i64, {texts}, &first_ids);
  if (texts) std::memcpy(first_ids, out.data(), texts * sizeof(int64_t));
  TokenNgramsArgs args{
      values, starts.data(), out.data(), texts, order, first, buckets, unigrams, static_cast<int64_t*>(ids)};
  run(&token_ngrams, args, out[texts] * 2.0);
  return py::make_tuple(std::move(result), std::move(where));
}

}  // namespace

void register_address(py::module_& m) {
  m.def("quick_token_ngrams", &quick_token_ngrams);
  m.def("quick_sign_hash", &quick_sign_hash);
  m.def("sign_hash", [](Ptr x, int dtype, int64_t rows, int64_t tables, int bits, int score, float temperature,
                        Ptr codes, Ptr weights) {
    const auto t = static_cast<DType>(dtype);
    const int64_t d = tables * bits;
    SignHashArgs a{x.raw(rows * d, t),
                   t,
                   rows,
                   tables,
                   d,
                   bits,
                   static_cast<Score>(score),
                   temperature,
                   codes.as<int32_t>(rows * tables),
                   weights.as<float>(rows * tables)};
    run(&sign_hash, a, rows * d * 1.0);
  });
  m.def("sign_hash_backward", [](Ptr x, int dtype, int64_t rows, int64_t tables, int bits, int score, float temperature,
                                 Ptr grad_weights, Ptr grad_x) {
    const auto t = static_cast<DType>(dtype);
    const int64_t d = tables * bits;
    SignHashBackwardArgs a{x.raw(rows * d, t),
                           t,
                           rows,
                           tables,
                           d,
                           bits,
                           static_cast<Score>(score),
                           temperature,
                           grad_weights.as<float>(rows * tables),
                           grad_x.raw(rows * d, t)};
    run(&sign_hash_backward, a, rows * d * 2.0);
  });
  m.def("fwht", [](Ptr x, int dtype, int64_t rows, int64_t n, float scale, Ptr out) {
    const auto t = static_cast<DType>(dtype);
    if (n < 1 || n & (n - 1)) throw py::value_error("lutra: the length must be a power of two");
    FwhtArgs a{x.raw(rows * n, t), t, rows, n, scale, out.raw(rows * n, t)};
    run(&fwht, a, rows * n * 0.2);
  });
  m.def("product_keys", [](Ptr q, int q_dtype, Ptr keys, int key_dtype, int64_t tokens, int64_t heads, int64_t n,
                           int64_t dim, int64_t k, Ptr scores, Ptr ids) {
    const auto of_q = static_cast<DType>(q_dtype), of_keys = static_cast<DType>(key_dtype);
    if (k < 1 || k > n || n > 65535) throw py::value_error("lutra: k must be in [1, n], n at most 65535");
    int64_t bad = -1;
    ProductKeysArgs a{q.raw(tokens * heads * 2 * dim, of_q),
                      of_q,
                      keys.raw(heads * 2 * n * dim, of_keys),
                      of_keys,
                      tokens,
                      heads,
                      n,
                      dim,
                      k,
                      scores.as<float>(tokens * heads * k),
                      ids.as<int64_t>(tokens * heads * k),
                      &bad};
    run(&product_keys, a, static_cast<double>(tokens * heads) * n * (dim * 0.04 + 1));
    return bad;
  });
  m.def("token_ngrams", [](Ptr tokens, int64_t total, Ptr offsets, Ptr out_offsets, int64_t texts, int64_t order,
                           int64_t first_bucket, int64_t buckets, bool unigrams, Ptr ids, int64_t n_ids) {
    std::vector<int64_t> starts;
    if (!offsets.p) {  // texts of one length: both arrays of offsets are multiples, written here
      auto* out = out_offsets.as<int64_t>(texts + 1);
      const int64_t length = texts ? total / texts : 0, count = texts ? n_ids / texts : 0;
      starts.resize(texts + 1);
      for (int64_t b = 0; b <= texts; ++b) {
        starts[b] = b * length;
        out[b] = b * count;
      }
      offsets = Ptr{starts.data(), (texts + 1) * 8};
    }
    TokenNgramsArgs a{tokens.as<int64_t>(total),
                      offsets.as<int64_t>(texts + 1),
                      out_offsets.as<int64_t>(texts + 1),
                      texts,
                      order,
                      first_bucket,
                      buckets,
                      unigrams,
                      ids.as<int64_t>(n_ids)};
    run(&token_ngrams, a, n_ids * 2.0);
  });
  m.def("random_rows", [](Ptr ids, int id_type, int64_t n, Ptr sequences, int64_t n_sequences, int64_t dim,
                          uint64_t seed, int output, float scale, Ptr out, int dtype) {
    const auto id_t = static_cast<DType>(id_type), t = static_cast<DType>(dtype);
    if (sequences.p && (n_sequences < 1 || n % n_sequences) && n)
      throw py::value_error("lutra: the sequences do not divide the tokens");
    int64_t bad = -1;
    RandomRowsArgs a{ids.raw(n, id_t),
                     id_t,
                     n,
                     n ? sequences.as<int64_t>(sequences.p ? n_sequences : 0) : nullptr,
                     sequences.p && n ? n / n_sequences : 1,
                     dim,
                     seed,
                     static_cast<RandomOutput>(output),
                     scale,
                     out.raw(n * dim, t),
                     t,
                     &bad};
    run(&random_rows, a, static_cast<double>(n) * dim);
    return bad;
  });
  register_text_ngrams(m);
}

}  // namespace lutra
