// Hashed n-grams of integer tokens on CUDA; the contract is in token_ngrams.h.
//
// A thread an id, so that ids are written side by side whatever the order: where its n-gram begins and how long it is
// follows from its place among its text's ids, and the few products of the hash are made again for each. Texts of one
// length are divided by a multiplication; of others a block finds those of its first and its last id by bisection and a
// thread searches between them.
//
// Overflow: the hash is arithmetic modulo 2^64 by definition; all indices are 64-bit. Offsets that do not
// increase cannot make it read or write outside its arrays: both ends of every access are checked.
// Limit: writing the ids (and reading the tokens).
#include "address/token_ngrams.h"

#include "address/ngram_hash.h"
#include "address/text_search.cuh"
#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256, kEach = 4;

struct Gram {
  int64_t start, n;  // n = 1: a token
};

// The n-gram of a place among the ids of a text. Of the first length - order + 1 starts there are `grams.n` = order - 1
// n-grams each, of the later ones fewer and fewer.
__device__ __forceinline__ Gram gram_at(int64_t place, int64_t length, int64_t order, bool unigrams, Modulus grams) {
  if (unigrams) {
    if (place < length) return Gram{place, 1};
    place -= length;
  }
  const int64_t full = length > order - 1 ? length - order + 1 : 0;
  if (place < full * (order - 1)) {
    uint64_t n;
    const uint64_t start = divide(static_cast<uint64_t>(place), grams, &n);
    return Gram{static_cast<int64_t>(start), static_cast<int64_t>(n) + 2};
  }
  place -= full * (order - 1);
  int64_t start = full;
  for (int64_t here = length - 1 - start; here > 0 && place >= here; ++start, --here) place -= here;
  return Gram{start, place + 2};
}

template <class Token>
__global__ void __launch_bounds__(kThreads)
    token_ngrams_kernel(TokenNgramsArgs a, const Token* tokens, Modulus buckets, Modulus grams, Modulus per_text) {
  const int64_t length = a.length;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kThreads * kEach);
  int64_t low = 0, high = 1;
  if (length < 0) {
    __shared__ int64_t ends[2];
    const int64_t end = begin + kThreads * kEach < a.n_ids ? begin + kThreads * kEach : a.n_ids;
    if (threadIdx.x < 2) ends[threadIdx.x] = last_before(a.out_offsets, 0, a.texts, threadIdx.x ? end - 1 : begin);
    __syncthreads();
    low = ends[0], high = ends[1] + 1;
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int64_t at = begin + e * kThreads + threadIdx.x;
    if (at >= a.n_ids) return;
    if (a.starts && at < a.texts) a.starts[at] = at * static_cast<int64_t>(per_text.n);
    int64_t first, size = length, place;
    if (length < 0) {
      const int64_t text = last_before(a.out_offsets, low, high, at);
      first = a.offsets[text];
      size = (a.offsets[text + 1] < a.total ? a.offsets[text + 1] : a.total) - first;
      place = at - a.out_offsets[text];
    } else {
      uint64_t rest;
      first = static_cast<int64_t>(divide(static_cast<uint64_t>(at), per_text, &rest)) * length;
      place = static_cast<int64_t>(rest);
    }
    if (first < 0 || size < 0 || place < 0) continue;
    const Gram gram = gram_at(place, size, a.order, a.unigrams, grams);
    if (gram.start + gram.n > size) continue;  // only with offsets that do not fit
    const Token* from = tokens + first + gram.start;
    const int64_t value = from[0];
    uint64_t h = static_cast<uint64_t>(value);
    for (int64_t j = 1; j < gram.n; ++j) h = h * kNgramStep + static_cast<uint64_t>(static_cast<int64_t>(from[j]));
    if (gram.n == 1)
      a.ids[at] = a.first_bucket > 0 ? value : static_cast<int64_t>(mod(h, buckets));
    else
      a.ids[at] = a.first_bucket + static_cast<int64_t>(mod(h, buckets));
  }
}

}  // namespace

void token_ngrams(const TokenNgramsArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  if (a.texts == 0 || a.n_ids == 0) return;
  const Modulus buckets = modulus(static_cast<uint64_t>(a.buckets));
  const Modulus grams = modulus(static_cast<uint64_t>(a.order > 1 ? a.order - 1 : 1));
  const Modulus per_text = modulus(static_cast<uint64_t>(a.n_ids / a.texts > 0 ? a.n_ids / a.texts : 1));
  const dim3 grid(grid_x(div_up(a.n_ids, kThreads * kEach)));
  if (a.token_type == DType::i32)
    launch("token_ngrams", token_ngrams_kernel<int32_t>, grid, kThreads, 0, l, a,
           reinterpret_cast<const int32_t*>(a.tokens), buckets, grams, per_text);
  else
    launch("token_ngrams", token_ngrams_kernel<int64_t>, grid, kThreads, 0, l, a, a.tokens, buckets, grams, per_text);
}

}  // namespace cuda
}  // namespace lutra
