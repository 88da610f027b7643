// The longest n-gram that ends at each token, on CUDA; the contract is in longest_match.h, the table's in key_table.h.
// Tokens out of range match nothing.
//
// A thread a token. It reads a bucket, 64 bytes, as four accesses; thousands of threads hide the latency of
// the chain of reads that a match is. Sequences of one length need no offsets; of others a block finds those of its
// first and last token by bisection, and each thread only searches between them.
// Limit: random reads of 64 bytes.
#include "address/longest_match.h"

#include "address/key_table.h"
#include "address/text_search.cuh"
#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// The value of a key, or -1. At most as many buckets are read as there are.
__device__ __forceinline__ int32_t find_key(const int64_t* buckets, int64_t n_buckets, int64_t key) {
  const int64_t home = home_of(key, n_buckets);
  int64_t at = home;
  do {
    const longlong2* bucket = reinterpret_cast<const longlong2*>(buckets + at);
    const longlong2 a = __ldg(bucket), b = __ldg(bucket + 1), c = __ldg(bucket + 2), d = __ldg(bucket + 3);
    if (a.x == key) return static_cast<int32_t>(c.y);
    if (a.y == key) return static_cast<int32_t>(c.y >> 32);
    if (b.x == key) return static_cast<int32_t>(d.x);
    if (b.y == key) return static_cast<int32_t>(d.x >> 32);
    if (c.x == key) return static_cast<int32_t>(d.y);
    if (!(d.y >> 32)) return -1;
    at = at + 8 == n_buckets * 8 ? 0 : at + 8;
  } while (at != home);
  return -1;
}

template <class Token>
__global__ void __launch_bounds__(kThreads) longest_match_kernel(LongestMatchArgs a) {
  const int64_t total = a.total, length = a.length;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads, i = block + threadIdx.x;
  int64_t place;
  if (length > 0) {
    place = total <= 0xffffffff ? static_cast<uint32_t>(i) % static_cast<uint32_t>(length) : i % length;
    if (i >= total) return;
  } else {
    const int64_t text = text_of(a.offsets, a.rows, block, block + kThreads < total ? block + kThreads : total, i);
    if (i >= total) return;
    place = i - a.offsets[text];
    place = place < 0 ? 0 : place < i ? place : i;
  }
  const auto* tokens = static_cast<const Token*>(a.tokens);
  const int64_t most = a.max_length - 1, left = place < most ? place : most;
  int64_t id = -1, node = tokens[i];
  int32_t matched = 1;
  bool good = static_cast<uint64_t>(node) >> 30 == 0;
  for (int64_t n = 1; n <= left && good; ++n) {
    const int64_t before = tokens[i - n];
    if (static_cast<uint64_t>(before) >> 30) break;
    const int32_t child = find_key(a.buckets, a.n_buckets, node << 32 | before);
    if (child < 0) break;
    if (child < a.n_ngrams) id = child, matched = static_cast<int32_t>(n + 1);
    node = kTrieNode | child;
  }
  a.ids[i] = id;
  a.lengths[i] = matched;
}

}  // namespace

void longest_match(const LongestMatchArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const dim3 grid(grid_x(div_up(a.total, kThreads)));
  if (a.token_type == DType::i32)
    launch("longest_match", longest_match_kernel<int32_t>, grid, kThreads, 0, l, a);
  else
    launch("longest_match", longest_match_kernel<int64_t>, grid, kThreads, 0, l, a);
}

}  // namespace cuda
}  // namespace lutra
