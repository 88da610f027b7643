#include "address/token_ngrams.h"

#include "address/ngram_hash.h"
#include "common/parallel.h"
#include "common/team.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

void one_text(const TokenNgramsArgs& a, Modulus m, const int64_t* tokens, int64_t length, int64_t* ids) {
  const int64_t first = a.first_bucket;
  if (a.unigrams) {
    if (first > 0) {
      for (int64_t i = 0; i < length; ++i) *ids++ = tokens[i];
    } else {
      for (int64_t i = 0; i < length; ++i) *ids++ = static_cast<int64_t>(mod(static_cast<uint64_t>(tokens[i]), m));
    }
  }
  put_ngrams(tokens, length, a.order, first, m, ids);
}

}  // namespace

void token_ngrams(const TokenNgramsArgs& a) {
  if (a.texts <= 0) return;
  const Modulus m = modulus(static_cast<uint64_t>(a.buckets));
  const int64_t total = a.out_offsets[a.texts];
  const int64_t grain = 1 + a.texts * 8192 / (total > 0 ? total : 1);
  team_ranges(a.texts, grain, static_cast<double>(total) * 2, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      one_text(a, m, a.tokens + a.offsets[b], a.offsets[b + 1] - a.offsets[b], a.ids + a.out_offsets[b]);
  });
}

}  // namespace LUTRA_NS
}  // namespace lutra
