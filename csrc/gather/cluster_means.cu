// Means of clusters on CUDA; the contract is in cluster_means.h.
//
// A stable radix sort brings the rows of a cluster together. The sorted rows are cut into tiles of 64; a group of
// threads, one for each 4 columns (or one), walks a tile, writes the mean of each cluster that lies inside it, and
// leaves the sums of those that cross its border as partial sums: place 0 of the tile for the cluster that it begins
// in the middle of, place 1 for one that begins in it and goes on. A second launch adds the partial sums of each
// cluster, a block per cluster. So a cluster of all rows costs no more than many small ones.
//
// Overflow: fewer than 2^31 rows and 2^32 - 1 clusters (checked); everything multiplied by d is 64-bit.
#include "gather/cluster_means.h"

#include <cub/device/device_radix_sort.cuh>

#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256, kBorderThreads = 128;
constexpr int kRows = 64;     // of a tile
constexpr int kInFlight = 8;  // rows that a thread reads before it adds the first

struct Arrays {
  uint32_t *keys_in, *keys;
  int32_t *rows_in, *rows;
  float* partial;  // [tiles][2][d]
  void* temporary;
  size_t temporary_bytes;
};

int key_bits(int64_t k) {  // of the keys 0 to k
  int bits = 1;
  while (bits < 32 && (k >> bits) != 0) ++bits;
  return bits;
}

Arrays arrays(int64_t n, int64_t d, int64_t k, void* workspace, int64_t* bytes) {
  if (n > 0x7fffffff || k > 0xfffffffe)
    throw std::length_error("lutra: k-means on CUDA takes fewer than 2^31 points and 2^32 - 1 centroids");
  Carve c(workspace);
  Arrays a{};
  a.keys_in = c.take<uint32_t>(n);
  a.keys = c.take<uint32_t>(n);
  a.rows_in = c.take<int32_t>(n);
  a.rows = c.take<int32_t>(n);
  a.partial = c.take<float>(div_up(n, kRows) * 2 * d);
  if (n > 0)
    check(cub::DeviceRadixSort::SortPairs(nullptr, a.temporary_bytes, static_cast<const uint32_t*>(nullptr),
                                          static_cast<uint32_t*>(nullptr), static_cast<const int32_t*>(nullptr),
                                          static_cast<int32_t*>(nullptr), static_cast<int>(n), 0, key_bits(k)),
          "cluster_means");
  a.temporary = c.take<char>(static_cast<int64_t>(a.temporary_bytes));
  *bytes = c.used();
  return a;
}

__global__ void __launch_bounds__(kThreads)
    keys_kernel(const int64_t* codes, int n, int64_t k, uint32_t* keys, int32_t* rows) {
  const int i = static_cast<int>(blockIdx.x * static_cast<unsigned>(kThreads) + threadIdx.x);
  if (i >= n) return;
  const int64_t code = codes[i];
  keys[i] = static_cast<uint32_t>(code >= 0 && code < k ? code : k);
  rows[i] = i;
}

// first[c]: how many sorted keys are below c. And the order as the caller wants it.
__global__ void __launch_bounds__(kThreads)
    bounds_kernel(const uint32_t* keys, const int32_t* rows, int n, int64_t k, int64_t* first, int64_t* order) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) order[i] = rows[i];
  if (i > k) return;
  int low = 0, high = n;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (static_cast<int64_t>(keys[middle]) < i)
      low = middle + 1;
    else
      high = middle;
  }
  first[i] = low;
}

struct Sums {
  const float* x;
  int64_t d, k;
  const uint32_t* keys;
  const int32_t* rows;
  const int64_t* first;
  float *means, *partial;
};

template <int VEC>
__global__ void __launch_bounds__(kThreads) tiles_kernel(Sums a, int log_lanes) {
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1);
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * (kThreads >> log_lanes) + (threadIdx.x >> log_lanes);
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * VEC;
  const int64_t kept = a.first[a.k];
  const int64_t begin = tile * kRows, end = begin + kRows < kept ? begin + kRows : kept;
  if (begin >= end || column >= a.d) return;
  const float* x = a.x + column;

  float sum[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) sum[j] = 0;
  uint32_t current = a.keys[begin];
  const auto put = [&] {  // all rows of `current` that the tile has are in `sum`
    const int64_t from = a.first[current], to = a.first[static_cast<int64_t>(current) + 1];
    if (from >= begin && to <= end) {
      const float count = static_cast<float>(to - from);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] /= count;
      store_pack<float, VEC>(a.means + current * a.d + column, sum);
    } else {
      store_pack<float, VEC>(a.partial + (tile * 2 + (from < begin ? 0 : 1)) * a.d + column, sum);
    }
  };
  for (int64_t p = begin; p < end; p += kInFlight) {
    uint32_t key[kInFlight];
    Pack<float, VEC> row[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t at = p + u < end ? p + u : end - 1;
      key[u] = a.keys[at];
      row[u] = load_pack<float, VEC>(x + a.rows[at] * a.d);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (p + u >= end) continue;
      if (key[u] != current) {
        put();
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] = 0;
        current = key[u];
      }
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] += row[u][j];
    }
  }
  put();
}

// A block per cluster (and slab of columns): the clusters that cross a border of tiles, and the empty ones. Each group
// of threads adds every so many-th partial sum; the groups' sums are added in order.
template <int VEC>
__global__ void __launch_bounds__(kBorderThreads) borders_kernel(Sums a, int log_lanes) {
  __shared__ double sums[kBorderThreads * VEC];
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1);
  const int group = threadIdx.x >> log_lanes, groups = kBorderThreads >> log_lanes;
  const int64_t cluster = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * VEC;
  const int64_t from = a.first[cluster], to = a.first[cluster + 1];
  const int64_t head = from / kRows, tail = to > from ? (to - 1) / kRows : head;
  if (to > from && head == tail) return;  // written by its tile; the whole block leaves
  double sum[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) sum[j] = 0;
  if (to > from && column < a.d) {
#pragma unroll 4
    for (int64_t t = head + group; t <= tail; t += groups) {
      const auto v = load_pack<float, VEC>(a.partial + (t * 2 + (t == head ? 1 : 0)) * a.d + column);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] += v[j];
    }
  }
#pragma unroll
  for (int j = 0; j < VEC; ++j) sums[threadIdx.x * VEC + j] = sum[j];
  __syncthreads();
  if (group != 0 || column >= a.d) return;
  for (int g = 1; g < groups; ++g)
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[j] += sums[(g * lanes + lane) * VEC + j];
  float mean[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) mean[j] = to > from ? static_cast<float>(sum[j] / static_cast<double>(to - from)) : 0;
  store_pack<float, VEC>(a.means + cluster * a.d + column, mean);
}

template <int VEC>
void add(const Sums& s, int64_t n, const Launch& l) {
  const char* what = "cluster_means";
  const int lanes = power_of_two(div_up(s.d, VEC), 32), log_lanes = log2_of(lanes);
  const int64_t slabs = div_up(s.d, static_cast<int64_t>(lanes) * VEC);
  if (slabs > 65535) throw std::length_error("lutra: cluster_means: rows too long for CUDA");
  const dim3 tiles(grid_x(div_up(div_up(n, kRows), kThreads / lanes)), static_cast<unsigned>(slabs));
  launch(what, tiles_kernel<VEC>, tiles, kThreads, 0, l, s, log_lanes);
  const dim3 clusters(grid_x(s.k), static_cast<unsigned>(slabs));
  launch(what, borders_kernel<VEC>, clusters, kBorderThreads, 0, l, s, log_lanes);
}

}  // namespace

int64_t cluster_means_workspace(int64_t n, int64_t d, int64_t k, const Launch& l) {
  const DeviceGuard guard(l.device);
  int64_t bytes = 0;
  arrays(n, d, k, nullptr, &bytes);
  return bytes;
}

void cluster_means(const ClusterMeansArgs& a, const Launch& l) {
  const char* what = "cluster_means";
  const DeviceGuard guard(l.device);
  int64_t bytes = 0;
  const Arrays w = arrays(a.n, a.d, a.k, l.workspace, &bytes);
  const int n = static_cast<int>(a.n);
  if (n > 0) {
    launch(what, keys_kernel, grid_x(div_up(n, kThreads)), kThreads, 0, l, a.codes, n, a.k, w.keys_in, w.rows_in);
    size_t temporary = w.temporary_bytes;
    check(cub::DeviceRadixSort::SortPairs(w.temporary, temporary, static_cast<const uint32_t*>(w.keys_in), w.keys,
                                          static_cast<const int32_t*>(w.rows_in), w.rows, n, 0, key_bits(a.k),
                                          stream_of(l)),
          what);
  }
  const int64_t most = a.k + 1 > a.n ? a.k + 1 : a.n;
  launch(what, bounds_kernel, grid_x(div_up(most, kThreads)), kThreads, 0, l, w.keys, w.rows, n, a.k, a.first, a.order);
  if (a.d == 0) return;
  const Sums s{a.x, a.d, a.k, w.keys, w.rows, a.first, a.means, w.partial};
  if (a.d % 4 == 0 && aligned(a.x, 16) && aligned(a.means, 16))
    add<4>(s, a.n, l);
  else
    add<1>(s, a.n, l);
}

}  // namespace cuda
}  // namespace lutra
