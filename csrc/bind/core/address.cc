#include "address/sign_hash.h"
#include "address/token_ngrams.h"
#include "bind/core/intake.h"
#include "bind/core/text_ngrams.h"

namespace lutra {

void register_address(py::module_& m) {
  m.def("sign_hash", [](Ptr x, int dtype, int64_t rows, int64_t tables, int bits, int score, float temperature,
                        Ptr codes, Ptr weights) {
    const auto t = static_cast<DType>(dtype);
    const int64_t d = tables * bits;
    SignHashArgs a{x.raw(rows * d, t), t, rows, tables, d, bits, static_cast<Score>(score), temperature,
                   codes.as<int32_t>(rows * tables), weights.as<float>(rows * tables)};
    run(&sign_hash, a, rows * d * 1.0);
  });
  m.def("sign_hash_backward", [](Ptr x, int dtype, int64_t rows, int64_t tables, int bits, int score,
                                 float temperature, Ptr grad_weights, Ptr grad_x) {
    const auto t = static_cast<DType>(dtype);
    const int64_t d = tables * bits;
    SignHashBackwardArgs a{x.raw(rows * d, t), t, rows, tables, d, bits, static_cast<Score>(score), temperature,
                           grad_weights.as<float>(rows * tables), grad_x.raw(rows * d, t)};
    run(&sign_hash_backward, a, rows * d * 2.0);
  });
  m.def("token_ngrams", [](Ptr tokens, int64_t total, Ptr offsets, Ptr out_offsets, int64_t texts, int64_t order,
                           int64_t first_bucket, int64_t buckets, bool unigrams, Ptr ids, int64_t n_ids) {
    TokenNgramsArgs a{tokens.as<int64_t>(total), offsets.as<int64_t>(texts + 1),
                      out_offsets.as<int64_t>(texts + 1), texts, order, first_bucket, buckets, unigrams,
                      ids.as<int64_t>(n_ids)};
    run(&token_ngrams, a, n_ids * 2.0);
  });
  register_text_ngrams(m);
}

}  // namespace lutra
