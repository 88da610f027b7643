#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "address/ball_carving.h"
#include "address/binarize.h"
#include "address/fde.h"
#include "address/fwht.h"
#include "address/hash_features.h"
#include "address/longest_match.h"
#include "address/pq_encode.h"
#include "address/product_keys.h"
#include "address/random_rows.h"
#include "address/rq_encode.h"
#include "address/sign_hash.h"
#include "address/simhash.h"
#include "address/token_ngrams.h"
#include "address/xor_ngrams.h"
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
  m.def("token_ngrams", [](Address tokens, int token_type, int64_t total, int64_t length, Address offsets,
                           Address out_offsets, int64_t texts, int64_t order, int64_t first_bucket, int64_t buckets,
                           bool unigrams, Address ids, int64_t n_ids, int device, Address stream) {
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
                      n_ids,
                      length,
                      static_cast<DType>(token_type),
                      length < 0 ? nullptr : out_offsets.as<int64_t>()};
    cuda::token_ngrams(a, Launch{device, stream.p});
  });
  m.def("xor_ngrams", [](Address tokens, int token_type, int64_t rows, int64_t length,
                         const std::vector<int64_t>& multipliers, const std::vector<int64_t>& orders,
                         const std::vector<int64_t>& moduli, const std::vector<int64_t>& first, int64_t pad,
                         Address ids, int device, Address stream) {
    const int64_t n_orders = static_cast<int64_t>(orders.size()), all = static_cast<int64_t>(moduli.size());
    if (n_orders < 1 || all > kXorHeads || all % n_orders || first.size() != moduli.size() || orders.front() < 1 ||
        orders.back() > kXorOrder || static_cast<int64_t>(multipliers.size()) < orders.back())
      throw std::invalid_argument("lutra: xor_ngrams: heads or orders do not fit");
    XorNgramsArgs a{tokens.p,
                    static_cast<DType>(token_type),
                    rows,
                    length,
                    multipliers.data(),
                    orders.data(),
                    n_orders,
                    all / n_orders,
                    moduli.data(),
                    first.data(),
                    pad,
                    ids.as<int64_t>(),
                    nullptr};
    cuda::xor_ngrams(a, Launch{device, stream.p});
  });
  m.attr("xor_heads") = kXorHeads;
  m.attr("xor_order") = kXorOrder;
  m.def("longest_match", [](Address tokens, int token_type, int64_t total, int64_t length, Address offsets,
                            int64_t rows, Address buckets, int64_t n_buckets, int64_t n_ngrams, int64_t max_length,
                            Address ids, Address lengths, int device, Address stream) {
    LongestMatchArgs a{tokens.p,
                       static_cast<DType>(token_type),
                       offsets.as<int64_t>(),
                       rows,
                       buckets.as<int64_t>(),
                       n_buckets,
                       n_ngrams,
                       max_length,
                       ids.as<int64_t>(),
                       lengths.as<int32_t>(),
                       nullptr,
                       total,
                       length};
    cuda::longest_match(a, Launch{device, stream.p});
  });
  m.def("random_rows", [](Address ids, int id_type, int64_t n, Address sequences, int64_t per_sequence, int64_t dim,
                          uint64_t seed, int output, float scale, Address out, int dtype, int device, Address stream) {
    RandomRowsArgs a{ids.p,
                     static_cast<DType>(id_type),
                     n,
                     sequences.as<int64_t>(),
                     per_sequence,
                     dim,
                     seed,
                     static_cast<RandomOutput>(output),
                     scale,
                     out.p,
                     static_cast<DType>(dtype),
                     nullptr};
    cuda::random_rows(a, Launch{device, stream.p});
  });
  m.def("binarize", [](Address x, int dtype, int64_t n, int64_t d, Address thresholds, float threshold, Address out,
                       int device, Address stream) {
    BinarizeArgs a{x.p, static_cast<DType>(dtype), n, d, thresholds.as<float>(), out.as<uint8_t>(), threshold};
    cuda::binarize(a, Launch{device, stream.p});
  });
  m.attr("fwht_most") = cuda::kFwhtMost;
  m.def("fwht",
        [](Address x, int dtype, int64_t rows, int64_t n, float scale, Address out, int device, Address stream) {
          if (n > cuda::kFwhtMost) throw std::invalid_argument("lutra: fwht: rows are too long");
          cuda::fwht(FwhtArgs{x.p, static_cast<DType>(dtype), rows, n, scale, out.p}, Launch{device, stream.p});
        });
  m.def("hash_features", [](Address ids, int id_type, int64_t n, int64_t k, Address coefficients, double buckets,
                            Address out, int device, Address stream) {
    HashFeaturesArgs a{ids.p,   static_cast<DType>(id_type), n, k, nullptr, nullptr, nullptr, buckets, out.as<float>(),
                       nullptr, coefficients.as<int64_t>()};
    cuda::hash_features(a, Launch{device, stream.p});
  });
  m.def("pq_encode", [](Address x, Address books, int64_t n, int64_t m, int64_t ksub, int64_t dsub, Address entries,
                        Address directions, float threshold, int rounds, int device, Address stream) {
    PqEncodeArgs a{x.as<float>(),         books.as<float>(),      n,         m,     ksub, dsub,
                   entries.as<uint8_t>(), directions.as<float>(), threshold, rounds};
    cuda::pq_encode(a, Launch{device, stream.p});
  });
  m.def("rq_encode_fits", [](int64_t m, int64_t ksub, int64_t beam, int64_t width, int device, Address) {
    return cuda::rq_encode_fits(m, ksub, beam, width, device);
  });
  m.def("rq_encode", [](Address dots, Address norms, Address gram, int64_t n, int64_t m, int64_t ksub, int64_t beam,
                        int64_t begin, int64_t end, int64_t width, int64_t keep, Address start, Address reached,
                        Address entries, Address scores, int device, Address stream) {
    if (!cuda::rq_encode_fits(m, ksub, beam, width, device))
      throw std::invalid_argument("lutra: rq_encode: the beam is too wide for shared memory");
    RqEncodeArgs a{dots.as<float>(),
                   norms.as<float>(),
                   gram.as<float>(),
                   n,
                   m,
                   ksub,
                   beam,
                   begin,
                   end,
                   width,
                   keep,
                   start.as<uint8_t>(),
                   reached.as<float>(),
                   entries.as<uint8_t>(),
                   scores.as<float>()};
    cuda::rq_encode(a, Launch{device, stream.p});
  });
  m.def("balls", [](Address tokens, int dtype, int64_t n, int64_t d, Address ptr, int64_t queries, float threshold,
                    Address balls, Address counts, Address workspace, int device, Address stream) {
    BallsArgs a{tokens.p,  static_cast<DType>(dtype), n,
                d,         ptr.as<int64_t>(),         queries,
                threshold, balls.as<int32_t>(),       counts.as<int64_t>(),
                nullptr};
    cuda::balls(a, Launch{device, stream.p, workspace.p});
  });
  m.def("ball_sums", [](Address tokens, int dtype, int64_t n, int64_t d, Address ptr, int64_t queries, Address balls,
                        Address out_ptr, Address out, int device, Address stream) {
    BallSumsArgs a{tokens.p,
                   static_cast<DType>(dtype),
                   n,
                   d,
                   ptr.as<int64_t>(),
                   queries,
                   balls.as<int32_t>(),
                   out_ptr.as<int64_t>(),
                   out.as<float>()};
    cuda::ball_sums(a, Launch{device, stream.p});
  });
  m.def("product_select_most", [](int device, Address) { return cuda::product_select_most(device); });
  m.def("product_select", [](Address products, int64_t tokens, int64_t heads, int64_t n, int64_t k, Address scores,
                             Address ids, int device, Address stream) {
    ProductSelectArgs a{products.as<float>(), tokens, heads, n, k, scores.as<float>(), ids.as<int64_t>()};
    cuda::product_select(a, Launch{device, stream.p});
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
