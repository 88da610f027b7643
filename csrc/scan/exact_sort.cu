// Range search: a pass counts what reaches the radius, the host learns how much that is, a second pass writes it, and
// each query's is sorted.
#include "scan/exact_pass.h"

#include <cub/device/device_segmented_radix_sort.cuh>

#include "scan/range.h"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// offsets[0] = 0 and the sums of `counts`. One block.
__global__ void __launch_bounds__(1024) offsets_kernel(const unsigned long long* counts, int64_t n, int64_t* offsets) {
  __shared__ long long warps[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  long long before = 0;
  if (threadIdx.x == 0) offsets[0] = 0;
  for (int64_t i0 = 0; i0 < n; i0 += 1024) {
    const int64_t i = i0 + threadIdx.x;
    long long sum = i < n ? static_cast<long long>(counts[i]) : 0;
#pragma unroll
    for (int s = 1; s < 32; s <<= 1) {
      const long long other = __shfl_up_sync(kFullWarp, sum, s);
      if (lane >= s) sum += other;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += warps[w];
    if (i < n) offsets[i + 1] = before + sum;
    for (int w = 0; w < 32; ++w) before += warps[w];
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads)
    write_kernel(const Key* keys, int64_t count, bool smaller_better, float* scores, int64_t* ids) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const float score = key_score(keys[i]);
  scores[i] = smaller_better ? 0.0f - score : score;
  ids[i] = key_id(keys[i]);
}

}  // namespace

int64_t sort_bytes(int64_t keys, int64_t lists) {
  size_t bytes = 0;
  check(cub::DeviceSegmentedRadixSort::SortKeysDescending(
            nullptr, bytes, static_cast<const Key*>(nullptr), static_cast<Key*>(nullptr), keys, lists,
            static_cast<const int64_t*>(nullptr), static_cast<const int64_t*>(nullptr)),
        "sort");
  return static_cast<int64_t>(bytes);
}

void sort_keys(const Key* from, Key* to, int64_t keys, int64_t lists, const int64_t* offsets, void* temporary,
               int64_t bytes, const Launch& l) {
  if (keys == 0) return;
  size_t room = static_cast<size_t>(bytes);
  check(cub::DeviceSegmentedRadixSort::SortKeysDescending(temporary, room, from, to, keys, lists, offsets, offsets + 1,
                                                          0, 64, stream_of(l)),
        "sort");
}

// ---- range search
namespace {

PassArgs pass_of(const RangeArgs& a, const float* q, int64_t ldq, int device) {
  PassArgs p{};
  p.q = q, p.x = a.x, p.nq = a.nq, p.n = a.n, p.ldq = ldq, p.ldx = a.ldx, p.d = static_cast<int>(a.d);
  p.storage = a.storage, p.metric = a.metric, p.keep = a.keep;
  const int64_t tiles = div_up(a.n, 32 * kPassWarps), groups = div_up(a.nq > 0 ? a.nq : 1, pass_group(a.nq));
  int64_t parts = div_up(4 * pass_blocks(device), groups);
  if (parts > tiles) parts = tiles > 1 ? tiles : 1;
  p.tiles_per_part = div_up(tiles > 0 ? tiles : 1, parts) * kPassWarps;
  p.parts = static_cast<int>(div_up(tiles > 0 ? tiles * kPassWarps : 1, p.tiles_per_part));
  p.radius = a.metric == Metric::ip || a.metric == Metric::cosine ? a.radius : -a.radius;
  return p;
}

struct RangeSpace {
  unsigned long long* found;
  float* normalized;
  double* rooms;
  Key* hits;
  Key* sorted;
  void* temporary;
  int64_t temporary_bytes, bytes;
};

RangeSpace lay_out(const RangeArgs& a, int64_t total, void* base) {
  Carve carve(base);
  RangeSpace w{};
  w.found = carve.take<unsigned long long>(a.nq);
  if (a.metric == Metric::cosine) w.normalized = carve.take<float>(a.nq * a.d);
  if (a.metric == Metric::poincare) w.rooms = carve.take<double>(a.nq);
  if (total > 0) {
    w.hits = carve.take<Key>(total);
    w.sorted = carve.take<Key>(total);
    w.temporary_bytes = sort_bytes(total, a.nq);
    w.temporary = carve.take<unsigned char>(w.temporary_bytes);
  }
  w.bytes = carve.used();
  return w;
}

void pass_over(const RangeArgs& a, const RangeSpace& w, const int64_t* offsets, const Launch& l) {
  if (a.n > kMaxRows || a.d > 0x7ffffff0)
    throw std::length_error(
        "lutra: range_search on CUDA takes fewer than 2^32 - 1 rows of fewer than 2^31 - 16 values");
  const float* q = a.q;
  int64_t ldq = a.ldq;
  if (a.metric == Metric::cosine) {
    normalize_queries(q, a.nq, ldq, a.d, w.normalized, l);
    q = w.normalized, ldq = a.d;
  }
  fill_zero("range_search", w.found, a.nq * sizeof(*w.found), l);
  PassArgs p = pass_of(a, q, ldq, l.device);
  p.found = w.found, p.hits = w.hits, p.offsets = offsets, p.rooms = w.rooms;
  if (w.rooms) query_rooms(q, a.nq, ldq, a.d, w.rooms, l);
  if (a.nq > 0 && a.n > 0) exact_pass(p, l);
}

}  // namespace

int64_t range_workspace(const RangeArgs& a, int64_t total, const Launch& l) {
  const DeviceGuard guard(l.device);
  return lay_out(a, total, nullptr).bytes;
}

void range_count(const RangeArgs& a, int64_t* offsets, const Launch& l) {
  const DeviceGuard guard(l.device);
  const RangeSpace w = lay_out(a, 0, l.workspace);
  pass_over(a, w, nullptr, l);
  launch("range_search", offsets_kernel, 1u, 1024, 0, l, w.found, a.nq, offsets);
}

void range_write(const RangeArgs& a, int64_t total, const int64_t* offsets, float* scores, int64_t* ids,
                 const Launch& l) {
  if (total == 0) return;
  const DeviceGuard guard(l.device);
  const RangeSpace w = lay_out(a, total, l.workspace);
  pass_over(a, w, offsets, l);
  sort_keys(w.hits, w.sorted, total, a.nq, offsets, w.temporary, w.temporary_bytes, l);
  const bool smaller = a.metric != Metric::ip && a.metric != Metric::cosine;
  launch("range_search", write_kernel, grid_x(div_up(total, kThreads)), kThreads, 0, l, w.sorted, total, smaller,
         scores, ids);
}

}  // namespace cuda
}  // namespace lutra
