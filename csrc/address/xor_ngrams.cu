// Hashed n-grams by multiply and xor on CUDA; the contract is in xor_ngrams.h. Tokens are not checked: any gives an id
// in range.
//
// A thread an id, so that ids are written side by side; the few products of an n-gram are made again by each of its
// heads, which costs less than an exchange. Moduli come with the launch, their inverses made on the host.
// Limit: writing the ids.
#include "address/xor_ngrams.h"

#include "address/ngram_hash.h"
#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256, kEach = 4;

struct Heads {  // a kernel takes 4 KB of arguments
  Modulus moduli[kXorHeads];
  int64_t first[kXorHeads];
  uint64_t multipliers[kXorOrder];
  uint8_t order[kXorHeads];  // of each head
  Modulus heads, length;
};

template <class Token>
__global__ void __launch_bounds__(kThreads)
    xor_ngrams_kernel(const Token* tokens, const Heads given, int64_t n_ids, int64_t pad, int64_t* ids) {
  __shared__ Modulus moduli[kXorHeads];
  __shared__ int64_t first[kXorHeads];
  __shared__ uint64_t multipliers[kXorOrder];
  __shared__ int order[kXorHeads];
  const int all = static_cast<int>(given.heads.n);
  for (int j = threadIdx.x; j < all; j += kThreads)
    moduli[j] = given.moduli[j], first[j] = given.first[j], order[j] = given.order[j];
  if (threadIdx.x < kXorOrder) multipliers[threadIdx.x] = given.multipliers[threadIdx.x];
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kThreads * kEach) + threadIdx.x;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int64_t at = begin + e * kThreads;
    if (at >= n_ids) return;
    uint64_t head, place;
    const uint64_t i = divide(static_cast<uint64_t>(at), given.heads, &head);
    divide(i, given.length, &place);
    uint64_t mix = 0;
    for (int k = 0; k < order[head]; ++k) {
      const int64_t token = static_cast<uint64_t>(k) > place ? pad : static_cast<int64_t>(tokens[i - k]);
      mix ^= static_cast<uint64_t>(token) * multipliers[k];
    }
    ids[at] = first[head] + static_cast<int64_t>(mod(mix, moduli[head]));
  }
}

}  // namespace

void xor_ngrams(const XorNgramsArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const int64_t all = a.n_orders * a.heads, n_ids = a.rows * a.length * all;
  if (n_ids == 0) return;
  Heads h{};
  for (int64_t j = 0; j < all; ++j) {
    h.moduli[j] = modulus(static_cast<uint64_t>(a.moduli[j]));
    h.first[j] = a.first[j];
    h.order[j] = static_cast<uint8_t>(a.orders[j / a.heads]);
  }
  for (int64_t k = 0; k < a.orders[a.n_orders - 1]; ++k) h.multipliers[k] = static_cast<uint64_t>(a.multipliers[k]);
  h.heads = modulus(static_cast<uint64_t>(all));
  h.length = modulus(static_cast<uint64_t>(a.length));
  const dim3 grid(grid_x(div_up(n_ids, kThreads * kEach)));
  if (a.token_type == DType::i32)
    launch("xor_ngrams", xor_ngrams_kernel<int32_t>, grid, kThreads, 0, l, static_cast<const int32_t*>(a.tokens), h,
           n_ids, a.pad, a.ids);
  else
    launch("xor_ngrams", xor_ngrams_kernel<int64_t>, grid, kThreads, 0, l, static_cast<const int64_t*>(a.tokens), h,
           n_ids, a.pad, a.ids);
}

}  // namespace cuda
}  // namespace lutra
