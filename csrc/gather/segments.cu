// Sort by key and sum by segment; the strategy is in segments.cuh.
//
// Overflow: positions are 32-bit (the callers refuse 2^31 or more), everything multiplied by dim is 64-bit; sums
// are fp32.
#include "gather/segments.cuh"

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) count_up_kernel(int32_t* positions, int n) {
  const int p = static_cast<int>(blockIdx.x * static_cast<unsigned>(kThreads) + threadIdx.x);
  if (p < n) positions[p] = p;
}

// 1 where a run of equal keys begins. Left-out positions are sorted to the end.
__global__ void __launch_bounds__(kThreads) heads_kernel(const uint32_t* keys, int32_t* head, int n) {
  const int p = static_cast<int>(blockIdx.x * static_cast<unsigned>(kThreads) + threadIdx.x);
  if (p < n) head[p] = keys[p] != kNoKey && (p == 0 || keys[p] != keys[p - 1]);
}

// `number` holds the running count of heads: segment numbers, counted from one.
__global__ void __launch_bounds__(kThreads) number_kernel(SortArrays s, Segments out, int n, int64_t length) {
  const int p = static_cast<int>(blockIdx.x * static_cast<unsigned>(kThreads) + threadIdx.x);
  if (p >= n) return;
  const int32_t position = s.positions[p];
  out.order[p] = position;
  out.bag[p] = length > 0 ? static_cast<int32_t>(position / length) : s.bag_in[position];
  const uint32_t key = s.keys[p];
  if (key == kNoKey) {
    if (p == 0) *out.count = 0, out.starts[0] = 0;
    return;
  }
  const int32_t number = s.number[p];
  if (p == 0 || s.keys[p - 1] != key) {
    out.starts[number - 1] = p;
    out.touched[number - 1] = key;
  }
  if (p == n - 1 || s.keys[p + 1] == kNoKey) *out.count = number, out.starts[number] = p + 1;
}

// A group of threads per tile. Slot 0 of the tile's partial sums belongs to the segment that the tile began in
// the middle of, slot 1 to one that begins in it and goes on after it.
template <class T, int VEC, bool MAX>
__global__ void __launch_bounds__(kThreads) tiles_kernel(SegmentSum a, int log_lanes) {
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1);
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * (kThreads >> log_lanes) + (threadIdx.x >> log_lanes);
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * VEC;
  const int64_t count = *a.count;
  const int64_t kept = a.starts[count];
  const int64_t begin = tile * kTile, end = begin + kTile < kept ? begin + kTile : kept;
  if (begin >= end || column >= a.dim) return;
  const T* source = static_cast<const T*>(a.source) + column;
  T* grad = static_cast<T*>(a.grad) + column;
  float* partial = a.partial + tile * 2 * a.dim + column;

  float sum[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) sum[j] = 0;
  int64_t current = last_before(a.starts, 0, count, begin);
  int64_t first = a.starts[current], next = a.starts[current + 1];
  constexpr int kInFlight = 4;
  for (int64_t p = begin; p < end; p += kInFlight) {
    int32_t bag[kInFlight];
    float factor[kInFlight];
    Pack<T, VEC> row[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (p + u >= end) continue;
      bag[u] = a.bag[p + u];
      factor[u] = a.weights ? a.weights[a.order[p + u]] : 1.0f;
      if (a.bag_factor) factor[u] *= a.bag_factor[bag[u]];
      row[u] = load_pack<T, VEC>(source + bag[u] * a.dim);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (p + u >= end) continue;
      if (p + u == next) {  // the segment ended before this position
        if (first < begin)
          store_pack<float, VEC>(partial, sum);
        else
          store_pack<T, VEC>(grad + (a.dense ? a.touched[current] : current) * a.dim, sum);
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] = 0;
        ++current;
        first = next;
        next = a.starts[current + 1];
      }
      if (MAX) {
        // The same id twice in a bag: sorted positions keep their order, so the two are neighbours.
        if (p + u > first && a.bag[p + u - 1] == bag[u]) continue;
        const int64_t key = a.touched[current];
        const int64_t* argmax = a.argmax + bag[u] * a.dim + column;
#pragma unroll
        for (int j = 0; j < VEC; ++j)
          if (argmax[j] == key) sum[j] += row[u][j];
      } else {
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] = fmaf(factor[u], row[u][j], sum[j]);
      }
    }
  }
  if (first < begin || next > end)
    store_pack<float, VEC>(partial + (first < begin ? 0 : a.dim), sum);
  else
    store_pack<T, VEC>(grad + (a.dense ? a.touched[current] : current) * a.dim, sum);
}

// Adds up the segments that cross a border of tiles: the group of the tile in which one begins does it.
template <class T, int VEC>
__global__ void __launch_bounds__(kThreads) borders_kernel(SegmentSum a, int log_lanes) {
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1);
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * (kThreads >> log_lanes) + (threadIdx.x >> log_lanes);
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * VEC;
  const int64_t count = *a.count;
  const int64_t kept = a.starts[count];
  const int64_t begin = tile * kTile, end = begin + kTile;
  if (end >= kept || column >= a.dim) return;
  const int64_t current = last_before(a.starts, 0, count, end - 1);
  const int64_t stop = a.starts[current + 1];
  if (a.starts[current] < begin || stop <= end) return;
  const float* partial = a.partial + column;
  float sum[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) sum[j] = partial[(tile * 2 + 1) * a.dim + j];
  const int64_t last = (stop - 1) / kTile;
#pragma unroll 4
  for (int64_t t = tile + 1; t <= last; ++t) {
    const auto v = load_pack<float, VEC>(partial + t * 2 * a.dim);
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[j] += v[j];
  }
  store_pack<T, VEC>(static_cast<T*>(a.grad) + (a.dense ? a.touched[current] : current) * a.dim + column, sum);
}

template <class T, int VEC>
void run(const SegmentSum& a, const char* what, const Launch& l) {
  const int lanes = power_of_two(div_up(a.dim, VEC), 32);
  const int64_t slabs = div_up(a.dim, static_cast<int64_t>(lanes) * VEC);
  if (slabs > 65535) throw std::length_error(std::string("lutra: ") + what + ": rows too long for CUDA");
  const int64_t tiles = div_up(a.n, kTile);
  const dim3 grid(grid_x(div_up(tiles, kThreads / lanes)), static_cast<unsigned>(slabs));
  const int log_lanes = log2_of(lanes);
  launch(what, a.argmax ? tiles_kernel<T, VEC, true> : tiles_kernel<T, VEC, false>, grid, kThreads, 0, l, a, log_lanes);
  launch(what, borders_kernel<T, VEC>, grid, kThreads, 0, l, a, log_lanes);
}

template <class T>
void by_width(const SegmentSum& a, const char* what, const Launch& l) {
  const bool wide = a.dim % 4 == 0 && aligned(a.source, 4 * sizeof(T)) && aligned(a.grad, 4 * sizeof(T));
  if (wide)
    run<T, 4>(a, what, l);
  else
    run<T, 1>(a, what, l);
}

int64_t temporary_bytes(int64_t n) {
  size_t sort = 0, scan = 0;
  const uint32_t* keys = nullptr;
  const int32_t* values = nullptr;
  check(cub::DeviceRadixSort::SortPairs(nullptr, sort, keys, static_cast<uint32_t*>(nullptr), values,
                                        static_cast<int32_t*>(nullptr), static_cast<int>(n)),
        "sort by row");
  check(cub::DeviceScan::InclusiveSum(nullptr, scan, values, static_cast<int32_t*>(nullptr), static_cast<int>(n)),
        "sort by row");
  return static_cast<int64_t>(sort > scan ? sort : scan);
}

}  // namespace

SortArrays sort_arrays(void* workspace, int64_t n, int64_t* bytes) {
  if (n > 0x7fffffff) throw std::length_error("lutra: CUDA gradients take fewer than 2^31 ids in a call");
  Carve c(workspace);
  SortArrays s;
  s.keys_in = c.take<uint32_t>(n);
  s.bag_in = c.take<int32_t>(n);
  s.keys = c.take<uint32_t>(n);
  s.positions_in = c.take<int32_t>(n);
  s.positions = c.take<int32_t>(n);
  s.number = c.take<int32_t>(n);
  s.temporary_bytes = n > 0 ? temporary_bytes(n) : 0;
  s.temporary = c.take<char>(s.temporary_bytes);
  *bytes = c.used();
  return s;
}

void sort_positions(const SortArrays& s, const Segments& out, int64_t n64, int64_t rows, int64_t length,
                    const Launch& l) {
  const char* what = "sort by row";
  if (n64 == 0) {
    fill_zero(what, out.starts, sizeof(int64_t), l);
    fill_zero(what, out.count, sizeof(int64_t), l);
    return;
  }
  const int n = static_cast<int>(n64);
  const unsigned blocks = grid_x(div_up(n, kThreads));
  launch(what, count_up_kernel, blocks, kThreads, 0, l, s.positions_in, n);
  // Only the low bits are sorted: as many as `rows` has, rows <= 2^bits - 1, so that every key, at most rows - 1,
  // stays below kNoKey, whose low bits are 2^bits - 1.
  int bits = 1;
  while (bits < 32 && (rows >> bits) != 0) ++bits;
  size_t bytes = static_cast<size_t>(s.temporary_bytes);
  check(cub::DeviceRadixSort::SortPairs(s.temporary, bytes, static_cast<const uint32_t*>(s.keys_in), s.keys,
                                        static_cast<const int32_t*>(s.positions_in), s.positions, n, 0, bits,
                                        stream_of(l)),
        what);
  int32_t* head = s.positions_in;  // not needed any more
  launch(what, heads_kernel, blocks, kThreads, 0, l, s.keys, head, n);
  bytes = static_cast<size_t>(s.temporary_bytes);
  check(cub::DeviceScan::InclusiveSum(s.temporary, bytes, static_cast<const int32_t*>(head), s.number, n, stream_of(l)),
        what);
  launch(what, number_kernel, blocks, kThreads, 0, l, s, out, n, length);
}

int64_t partial_floats(int64_t n, int64_t dim) { return div_up(n, kTile) * 2 * dim; }

void add_segments(const SegmentSum& a, const char* what, const Launch& l) {
  if (a.n == 0 || a.dim == 0) return;
  switch (a.dtype) {
    case DType::f16: return by_width<__half>(a, what, l);
    case DType::bf16: return by_width<__nv_bfloat16>(a, what, l);
    default: return by_width<float>(a, what, l);
  }
}

}  // namespace cuda
}  // namespace lutra
