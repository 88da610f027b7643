// Sorting ids by row; see row_plan.cuh.
#include "gather/row_plan.cuh"

#include <cub/device/device_radix_sort.cuh>

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kEach = 4;  // entries of a thread in a step
constexpr int kStep = kThreads * kEach;
constexpr int kChunks = 1024;  // at most: a block adds up the heads of all chunks before its own

int64_t padded(int64_t n) { return round_up(n, kLongestTile) + kLongestTile; }

__global__ void __launch_bounds__(kThreads)
    keys_kernel(BagView b, int64_t rows, bool positions, int64_t padded, uint32_t* keys, int32_t* values,
                int32_t* bag_at, uint32_t* sorted_keys, int32_t* sorted_values) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kStep + threadIdx.x;
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    const int64_t i = first + u * kThreads;
    if (i >= padded) return;
    if (i >= b.n_ids) {  // the sort writes n entries, what is behind them stays as it is written here
      sorted_keys[i] = kNoRow;
      sorted_values[i] = 0;
      continue;
    }
    const int64_t id = b.ids[i];
    int64_t bag = -1;  // without offsets there may still be ids in no bag: where no bag is asked for
    if (b.offsets.p)
      bag = b.bag_of(i);
    else if (b.length > 0)
      bag = static_cast<uint32_t>(i) / static_cast<uint32_t>(b.length);
    const bool here = bag >= 0 && id >= 0 && id < rows && !(b.padding_idx >= 0 && id == b.padding_idx);
    keys[i] = here ? static_cast<uint32_t>(id) : kNoRow;
    values[i] = static_cast<int32_t>(positions ? i : bag >= 0 ? bag : 0);
    if (bag_at) bag_at[i] = bag >= 0 ? static_cast<int32_t>(bag) : 0;
  }
}

__device__ __forceinline__ bool is_head(const uint32_t* keys, int64_t p) {
  const uint32_t key = keys[p];
  return key != kNoRow && (p == 0 || keys[p - 1] != key);
}

// Sum over the block; all threads get it. `scratch` holds kWarps + 1 ints.
__device__ __forceinline__ int block_sum(int v, int* scratch) {
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) v += __shfl_xor_sync(kFullWarp, v, s);
  __syncthreads();  // scratch of an earlier call has been read
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  int total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += scratch[w];
  return total;
}

// Runs that begin in each chunk.
__global__ void __launch_bounds__(kThreads)
    heads_kernel(const uint32_t* keys, int64_t n, int64_t chunk, int32_t* heads) {
  __shared__ int scratch[kWarps];
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < n ? begin + chunk : n;
  int mine = 0;
  for (int64_t p = begin + threadIdx.x; p < end; p += kThreads) mine += is_head(keys, p);
  const int total = block_sum(mine, scratch);
  if (threadIdx.x == 0) heads[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    numbers_kernel(const uint32_t* keys, int64_t n, int64_t chunk, const int32_t* heads, int log_tile, int64_t* touched,
                   int32_t* starts, int32_t* tile_number, int64_t* count) {
  __shared__ int scratch[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  int before = 0;
  for (int c = threadIdx.x; c < static_cast<int>(blockIdx.x); c += kThreads) before += heads[c];
  int number = block_sum(before, scratch);  // runs that began before this chunk
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < n ? begin + chunk : n;
  for (int64_t at = begin; at < end; at += kStep) {
    const int64_t p0 = at + threadIdx.x * kEach;
    // Behind the entries the keys are filled up; chunks are multiples of steps.
    uint32_t key[kEach + 1] = {kNoRow, kNoRow, kNoRow, kNoRow, kNoRow};
    uint32_t previous = kNoRow;
    if (p0 < n) {
      const uint4 k = *reinterpret_cast<const uint4*>(keys + p0);
      key[0] = k.x, key[1] = k.y, key[2] = k.z, key[3] = k.w, key[4] = keys[p0 + 4];
      if (p0 > 0) previous = keys[p0 - 1];
    }
    bool head[kEach];
    int mine = 0;
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      head[u] = key[u] != kNoRow && (p0 + u == 0 || key[u] != (u ? key[u ? u - 1 : 0] : previous));
      mine += head[u];
    }
    int scan = mine;  // inclusive over the warp
#pragma unroll
    for (int s = 1; s < 32; s <<= 1) {
      const int other = __shfl_up_sync(kFullWarp, scan, s);
      if (lane >= s) scan += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = scan;
    __syncthreads();
    int total = 0, mark = number + scan - mine;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) mark += scratch[w];
      total += scratch[w];
    }
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      const int64_t p = p0 + u;
      if (p >= n) continue;
      if (head[u]) {
        touched[mark] = key[u];
        if (starts) starts[mark] = static_cast<int32_t>(p);
      }
      mark += head[u];
      if (tile_number && (p & ((1 << log_tile) - 1)) == 0) tile_number[p >> log_tile] = mark - 1;
      // The end of the last run: behind it nothing, or what belongs to no row.
      const bool last = key[u] != kNoRow && key[u + 1] == kNoRow;
      if (last) {
        *count = mark;
        if (starts) starts[mark] = static_cast<int32_t>(p + 1);
      }
      if (p == 0 && key[u] == kNoRow) {
        *count = 0;
        if (starts) starts[0] = 0;
      }
    }
    number += total;
  }
}

__global__ void __launch_bounds__(kThreads) factors_kernel(BagView b, float* factor) {
  const int64_t bag = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (bag >= b.bags) return;
  int64_t begin, end;
  b.range(bag, &begin, &end);
  int64_t count = end - begin;
  if (b.padding_idx >= 0) {
    int mine = 0;
    for (int64_t i = begin + lane; i < end; i += 32) mine += b.ids[i] != b.padding_idx;
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) mine += __shfl_xor_sync(kFullWarp, mine, s);
    count = mine;
  }
  if (lane == 0) factor[bag] = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
}

// What the sort needs on the current device, whose multiprocessors and compute capability it depends on. Asking CUB
// costs some microseconds, and a training loop asks for the same n again and again.
int64_t temporary_bytes(int n) {
  static thread_local int last_n = -1, last_device = -1;
  static thread_local size_t last = 0;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (n != last_n || device != last_device) {
    size_t bytes = 0;
    const uint32_t* keys = nullptr;
    const int32_t* values = nullptr;
    check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys, static_cast<uint32_t*>(nullptr), values,
                                          static_cast<int32_t*>(nullptr), n),
          "sort by row");
    last = bytes;
    last_n = n;
    last_device = device;
  }
  return static_cast<int64_t>(last);
}

void sort_pairs(const RowPlan& p, int64_t rows, const Launch& l) {
  if (p.n == 0) return;
  // Only the low bits are sorted: as many as `rows` has, rows <= 2^bits - 1, so that every key, at most rows - 1,
  // stays below kNoRow, whose low bits are 2^bits - 1.
  int bits = 1;
  while (bits < 32 && (rows >> bits) != 0) ++bits;
  size_t bytes = static_cast<size_t>(p.temporary_bytes);
  check(cub::DeviceRadixSort::SortPairs(p.temporary, bytes, static_cast<const uint32_t*>(p.keys_in), p.keys,
                                        static_cast<const int32_t*>(p.values_in), p.values, p.n, 0, bits, stream_of(l)),
        "sort by row");
}

}  // namespace

RowPlan take_keys(Carve* c, int64_t n, bool numbered) {
  if (n > 0x7fffffff - 65536) throw std::length_error("lutra: CUDA gradients take fewer than 2^31 ids in a call");
  RowPlan p{};
  p.n = static_cast<int>(n);
  p.positions = true;
  p.keys = c->take<uint32_t>(padded(n));
  p.values = c->take<int32_t>(padded(n));
  p.keys_in = c->take<uint32_t>(n);
  p.values_in = c->take<int32_t>(n);
  p.bag_at = c->take<int32_t>(n);
  p.temporary_bytes = n > 0 ? temporary_bytes(p.n) : 0;
  p.temporary = c->take<char>(p.temporary_bytes);
  if (numbered) {
    p.tile_number = c->take<int32_t>(div_up(n, 4) + 1);
    p.chunk_heads = c->take<int32_t>(kChunks);
  }
  return p;
}

RowPlan take_plan(Carve* c, const BagIds& b, bool positions, bool numbered) {
  if (b.bags > 0x7fffffff) throw std::length_error("lutra: CUDA gradients take fewer than 2^31 bags in a call");
  RowPlan p = take_keys(c, b.n_ids, numbered);
  p.positions = positions;
  p.length = positions && !b.offsets ? static_cast<int>(b.length) : 0;
  if (!positions || !b.offsets) p.bag_at = nullptr;
  return p;
}

void sort_rows(const RowPlan& p, const BagIds& b, int64_t rows, const Launch& l) {
  if (rows >= 0xffffffff) throw std::length_error("lutra: CUDA gradients take fewer than 2^32 - 1 rows");
  const char* what = "sort by row";
  const int64_t all = padded(p.n);
  launch(what, keys_kernel, grid_x(div_up(all, kStep)), kThreads, 0, l, view_of(b), rows, p.positions, all, p.keys_in,
         p.values_in, p.bag_at, p.keys, p.values);
  sort_pairs(p, rows, l);
}

void sort_keys(const RowPlan& p, int64_t rows, const Launch& l) {
  const size_t behind = static_cast<size_t>(padded(p.n) - p.n);
  check(cudaMemsetAsync(p.keys + p.n, 0xff, behind * sizeof(uint32_t), stream_of(l)), "sort by row");
  check(cudaMemsetAsync(p.values + p.n, 0, behind * sizeof(int32_t), stream_of(l)), "sort by row");
  sort_pairs(p, rows, l);
}

void number_rows(const RowPlan& p, int tile, int64_t* touched, int32_t* starts, int64_t* count, const Launch& l) {
  const char* what = "number rows";
  if (p.n == 0) {
    fill_zero(what, count, sizeof(int64_t), l);
    if (starts) fill_zero(what, starts, sizeof(int32_t), l);
    return;
  }
  const int64_t chunk = round_up(div_up(p.n, kChunks), kStep);
  const unsigned chunks = grid_x(div_up(p.n, chunk));
  launch(what, heads_kernel, chunks, kThreads, 0, l, p.keys, p.n, chunk, p.chunk_heads);
  launch(what, numbers_kernel, chunks, kThreads, 0, l, p.keys, p.n, chunk, p.chunk_heads, log2_of(tile), touched,
         starts, p.tile_number, count);
}

void bag_factors(const BagIds& b, float* factor, const Launch& l) {
  launch("bag_factors", factors_kernel, grid_x(div_up(b.bags, kWarps)), kThreads, 0, l, view_of(b), factor);
}

}  // namespace cuda
}  // namespace lutra
