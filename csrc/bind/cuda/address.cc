#include "address/sign_hash.h"
#include "address/token_ngrams.h"
#include "bind/cuda/intake.h"

namespace lutra {

void register_address(py::module_& m) {
  m.def("sign_hash", [](Address x, int dtype, int64_t rows, int64_t tables, int bits, int score, float temperature,
                        Address codes, Address weights, int device, Address stream) {
    SignHashArgs a{x.p,
                   static_cast<DType>(dtype),
                   rows,
                   tables,
                   tables * bits,
                   bits,
                   static_cast<Score>(score),
                   temperature,
                   codes.as<int32_t>(),
                   weights.as<float>()};
    cuda::sign_hash(a, Launch{device, stream.p});
  });
  m.def("sign_hash_backward", [](Address x, int dtype, int64_t rows, int64_t tables, int bits, int score,
                                 float temperature, Address grad_weights, Address grad_x, int device, Address stream) {
    SignHashBackwardArgs a{
        x.p,         static_cast<DType>(dtype), rows,    tables, tables * bits, bits, static_cast<Score>(score),
        temperature, grad_weights.as<float>(),  grad_x.p};
    cuda::sign_hash_backward(a, Launch{device, stream.p});
  });
  m.def("token_ngrams", [](Address tokens, int64_t total, Address offsets, Address out_offsets, int64_t texts,
                           int64_t order, int64_t first_bucket, int64_t buckets, bool unigrams, Address ids,
                           int64_t n_ids, int device, Address stream) {
    TokenNgramsArgs a{tokens.as<int64_t>(),
                      offsets.as<int64_t>(),
                      out_offsets.as<int64_t>(),
                      texts,
                      order,
                      first_bucket,
                      buckets,
                      unigrams,
                      ids.as<int64_t>(),
                      total,
                      n_ids};
    cuda::token_ngrams(a, Launch{device, stream.p});
  });
}

}  // namespace lutra
