#include "address/fde.h"
#include "address/sign_hash.h"
#include "address/simhash.h"
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
  m.def("simhash", [](Address x, int dtype, int64_t n, int64_t d, Address planes, int64_t repetitions, int k,
                      Address out, int device, Address stream) {
    SimhashArgs a{x.p, static_cast<DType>(dtype), n, d, planes.as<float>(), repetitions, k, out.as<int32_t>(), nullptr};
    cuda::simhash(a, Launch{device, stream.p});
    return -1;  // nothing is looked for
  });
  m.def("fde_workspace",
        [](int64_t n, int64_t repetitions, int, Address) { return cuda::fde_workspace(n, repetitions); });
  m.def("fde", [](Address tokens, int dtype, int64_t n, int64_t d, Address ptr, int64_t documents, Address planes,
                  int64_t repetitions, int k_sim, Address psi, int64_t width, int64_t ld_psi, float scale, bool query,
                  bool fill, Address out, Address workspace, int device, Address stream) {
    FdeArgs a{tokens.p,
              static_cast<DType>(dtype),
              n,
              d,
              ptr.as<int64_t>(),
              documents,
              planes.as<float>(),
              repetitions,
              k_sim,
              psi.as<float>(),
              width,
              ld_psi,
              scale,
              query,
              fill,
              nullptr,
              0,
              out.as<float>(),
              nullptr,
              nullptr,
              nullptr,
              nullptr,
              nullptr};
    cuda::fde(a, Launch{device, stream.p, workspace.p});
  });
}

}  // namespace lutra
