// Hashed n-grams of integer tokens on CUDA; the contract is in token_ngrams.h.
//
// One thread per token: it finds its text by bisection of the offsets and knows by a closed formula where the
// n-grams that start at it are written, so texts of any length are balanced and nothing is exchanged.
//
// Overflow: the hash is arithmetic modulo 2^64 by definition; all indices are 64-bit. Offsets that do not
// increase cannot make it read or write outside its arrays: both ends of every access are checked.
#include "address/token_ngrams.h"

#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// n-grams that start before token i of a text of `length`: order - 1 for each of the first length - order + 1
// starts, then one fewer for each.
__device__ __forceinline__ int64_t grams_before(int64_t i, int64_t length, int64_t order) {
  const int64_t full = length > order - 1 ? length - order + 1 : 0;
  if (i <= full) return i * (order - 1);
  return full * (order - 1) + (i - full) * (2 * (length - 1) - full - (i - 1)) / 2;
}

__global__ void __launch_bounds__(kThreads) token_ngrams_kernel(TokenNgramsArgs a) {
  const int64_t total = a.total, n_ids = a.n_ids;
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= total) return;
  int64_t low = 0, high = a.texts;  // the last text that begins at or before p
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (a.offsets[middle] <= p)
      low = middle;
    else
      high = middle;
  }
  const int64_t begin = a.offsets[low], end = a.offsets[low + 1] < total ? a.offsets[low + 1] : total;
  const int64_t i = p - begin, length = end - begin;
  if (i < 0 || i >= length) return;  // between texts: only with offsets that do not cover the tokens
  const auto buckets = static_cast<uint64_t>(a.buckets);
  uint64_t h = static_cast<uint64_t>(a.tokens[p]);
  const int64_t first = a.out_offsets[low];
  if (a.unigrams && first + i >= 0 && first + i < n_ids)
    a.ids[first + i] = a.first_bucket > 0 ? a.tokens[p] : static_cast<int64_t>(h % buckets);
  int64_t out = first + (a.unigrams ? length : 0) + grams_before(i, length, a.order);
  for (int64_t n = 2; n <= a.order && i + n <= length; ++n, ++out) {
    h = h * 116049371u + static_cast<uint64_t>(a.tokens[p + n - 1]);
    if (out >= 0 && out < n_ids) a.ids[out] = a.first_bucket + static_cast<int64_t>(h % buckets);
  }
}

}  // namespace

void token_ngrams(const TokenNgramsArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  if (a.texts == 0) return;
  launch("token_ngrams", token_ngrams_kernel, grid_x(div_up(a.total, kThreads)), kThreads, 0, l, a);
}

}  // namespace cuda
}  // namespace lutra
