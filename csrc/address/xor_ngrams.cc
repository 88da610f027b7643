#include "address/xor_ngrams.h"

#include "address/ngram_hash.h"
#include "common/parallel.h"
#include "common/team.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <class Token>
void hash_range(const XorNgramsArgs& a, const Modulus* moduli, int64_t begin, int64_t end) {
  const auto* tokens = static_cast<const Token*>(a.tokens);
  const int64_t all = a.n_orders * a.heads;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t place = i % a.length;
    int64_t* ids = a.ids + i * all;
    uint64_t mix = 0;
    for (int64_t o = 0, k = 0; o < a.n_orders; ++o) {
      for (; k < a.orders[o]; ++k) {
        const int64_t token = k > place ? a.pad : static_cast<int64_t>(tokens[i - k]);
        mix ^= static_cast<uint64_t>(token) * static_cast<uint64_t>(a.multipliers[k]);
      }
      for (int64_t j = o * a.heads; j < (o + 1) * a.heads; ++j)
        ids[j] = a.first[j] + static_cast<int64_t>(mod(mix, moduli[j]));
    }
  }
}

template <class Token>
void hash_all(const XorNgramsArgs& a) {
  const auto* tokens = static_cast<const Token*>(a.tokens);
  const int64_t total = a.rows * a.length, all = a.n_orders * a.heads;
  for (int64_t i = 0; i < total; ++i)
    if (static_cast<uint64_t>(static_cast<int64_t>(tokens[i])) >> 31) {
      *a.bad = i;
      return;
    }
  Buffer<Modulus> moduli(all);
  for (int64_t j = 0; j < all; ++j) moduli[j] = modulus(static_cast<uint64_t>(a.moduli[j]));
  team_ranges(total, 1 + 16384 / all, static_cast<double>(total * all) * 1.5,
              [&](int64_t begin, int64_t end) { hash_range<Token>(a, moduli.data, begin, end); });
}

}  // namespace

void xor_ngrams(const XorNgramsArgs& a) {
  *a.bad = -1;
  if (a.rows * a.length * a.n_orders * a.heads <= 0) return;
  if (a.token_type == DType::i32)
    hash_all<int32_t>(a);
  else
    hash_all<int64_t>(a);
}

}  // namespace LUTRA_NS
}  // namespace lutra
