// Product keys on CUDA: the k best of each half's scores, then of the sums; the contract is in product_keys.h.
//
// A warp a query. Scores are read 128 at a time; those above the k-th best as of the last count go to a list in shared
// memory, as keys (common/select.cuh: equal scores to the lower number), and when the list is full its k best are kept.
// Of the sums of the two sorted lists only those of ranks (a + 1) (b + 1) <= k are made, and of these only what reaches
// a bound that k of them reach: of x rows and y columns with x y >= k, the smallest. Nothing is exchanged between
// warps. Limit: reading the scores.
#include "address/product_keys.h"
#include "common/select.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kMostWarps = 8, kRun = 128;

// Pairs of ranks with (a + 1) (b + 1) <= k.
int64_t pairs_of(int64_t k) {
  int64_t pairs = 0;
  for (int64_t a = 1; a <= k; ++a) pairs += k / a;
  return pairs;
}
int64_t room_of(int64_t k) {
  const int64_t least = k + 2 * kRun, pairs = pairs_of(k);
  return round_up(pairs > least ? pairs : least, 2);
}
size_t warp_bytes(int64_t k) { return static_cast<size_t>(room_of(k) + 2 * k) * sizeof(Key) + 1024; }

struct WarpList {
  Key* keys;
  int* bins;
  int room, k, count;
  Key least;  // 0 at first

  __device__ __forceinline__ void add(bool here, Key key) {
    const bool passes = here && key > least;
    const unsigned votes = __ballot_sync(kFullWarp, passes);
    const int lane = threadIdx.x & 31;
    if (passes) keys[count + __popc(votes & ((1u << lane) - 1))] = key;
    count += __popc(votes);
  }
  __device__ __forceinline__ void keep() {  // the k best; the list is longer
    __syncwarp();
    least = warp_keep_best(keys, count, k, bins);
    count = k;
    __syncwarp();
  }
  // The k best, sorted, to `to`. All keys are different.
  __device__ __forceinline__ void sorted(Key* to) {
    if (count > k) keep();
    __syncwarp();
    const int lane = threadIdx.x & 31;
    if (k <= 32) {
      const Key key = warp_sort(lane < count ? keys[lane] : 0);
      if (lane < k) to[lane] = key;
    } else {
      for (int i = lane; i < count; i += 32) {
        const Key key = keys[i];
        int rank = 0;
        for (int j = 0; j < count; ++j) rank += keys[j] > key;
        to[rank] = key;
      }
    }
    __syncwarp();
  }
};

__global__ void __launch_bounds__(kMostWarps * 32) product_select_kernel(ProductSelectArgs a, int room) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, k = static_cast<int>(a.k);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (blockDim.x >> 5) + warp;  // token * heads + head
  if (at >= a.tokens * a.heads) return;
  const int64_t token = at / a.heads, head = at % a.heads, n = a.n;
  char* mine = dynamic_shared<char>() + warp * (static_cast<size_t>(room + 2 * k) * sizeof(Key) + 1024);
  WarpList list{
      reinterpret_cast<Key*>(mine), reinterpret_cast<int*>(mine + (room + 2 * k) * sizeof(Key)), room, k, 0, 0};
  Key* best[2] = {list.keys + room, list.keys + room + k};
  const bool whole = n % 4 == 0 && (reinterpret_cast<uintptr_t>(a.products) & 15) == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* x = a.products + ((head * 2 + half) * a.tokens + token) * n;
    list.count = 0, list.least = 0;
    float ahead[4];
    const auto read = [&](int64_t i0) {
      const int64_t i = i0 + lane * 4;
      if (whole && i < n) {
        const float4 v = *reinterpret_cast<const float4*>(x + i);
        ahead[0] = v.x, ahead[1] = v.y, ahead[2] = v.z, ahead[3] = v.w;
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) ahead[e] = i + e < n ? x[i + e] : 0.0f;
      }
    };
    read(0);
    for (int64_t i0 = 0; i0 < n; i0 += kRun) {
      float now[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) now[e] = ahead[e];
      if (i0 + kRun < n) read(i0 + kRun);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t i = i0 + lane * 4 + e;
        list.add(i < n, make_key(now[e], static_cast<uint32_t>(i)));
      }
      if (list.count + kRun > room) list.keep();
    }
    list.sorted(best[half]);
  }
  // The bound, and the sums that reach it.
  const auto sum = [&](int i, int j) { return key_score(best[0][i]) + key_score(best[1][j]); };
  float bound = __int_as_float(0xff800000);
  for (int i = lane; i * i < k; i += 32) {
    const int j = (k + i) / (i + 1) - 1;
    bound = fmaxf(bound, fmaxf(sum(i, j), sum(j, i)));
  }
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) bound = fmaxf(bound, __shfl_xor_sync(kFullWarp, bound, s));
  list.count = 0, list.least = 0;
  int root = 1;
  while (root * root < k) ++root;
  const auto offer = [&](int i, int j, bool here) {
    float score = 0;
    Key key = 0;
    if (here) {
      score = sum(i, j);
      const uint32_t id = static_cast<uint32_t>(key_id(best[0][i]) * n + key_id(best[1][j]));
      key = make_key(score, id);
    }
    list.add(here && !(score < bound), key);
  };
  for (int i = 0; i < root && i < k; ++i)
    for (int j = 0; j < k / (i + 1); j += 32) offer(i, j + lane, j + lane < k / (i + 1));
  for (int j = 0; j * root < k; ++j)
    for (int i = root; i < k / (j + 1); i += 32) offer(i + lane, j, i + lane < k / (j + 1));
  list.sorted(best[0]);
  for (int i = lane; i < k; i += 32) {
    const Key key = best[0][i];
    a.scores[at * k + i] = key_score(key);
    a.ids[at * k + i] = static_cast<int64_t>(~static_cast<uint32_t>(key));
  }
}

}  // namespace

int64_t product_select_most(int device) {
  int64_t k = 2048;
  while (k > 1 && warp_bytes(k) > static_cast<size_t>(shared_limit(device))) k /= 2;
  return k;
}

void product_select(const ProductSelectArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  int warps = kMostWarps;
  const size_t each = warp_bytes(a.k), limit = static_cast<size_t>(shared_limit(l.device));
  while (warps > 1 && each * warps > limit) warps /= 2;
  launch("product_keys", product_select_kernel, dim3(grid_x(div_up(a.tokens * a.heads, warps))), warps * 32,
         each * warps, l, a, static_cast<int>(room_of(a.k)));
}

}  // namespace cuda
}  // namespace lutra
