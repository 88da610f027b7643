// Sums of the gradients that belong to each row, in the order of the entries, deterministically; what is done with a
// row's sum is up to the caller.
//
//   g[row] = sum over the entries of the row, in increasing position, of factor * source[bag]
//
// The sorted entries (row_plan.cuh) are cut into tiles. A group of threads walks a tile and hands each row's sum to a
// sink as soon as it is known; of a row that crosses the border of a tile it leaves partial sums, which a second launch
// adds in order and hands over. So a row that occurs a million times costs no more than a million rows, nothing is
// atomic, and the tree of additions depends on the ids and the shapes alone.
//
// A sink is
//   struct Sink { static constexpr bool kPrefetch;
//                 static constexpr int kBlocks;  // of a multiprocessor, that registers are to allow
//                 __device__ void prefetch(uint32_t row, int64_t column);  // rows that are taken soon, if kPrefetch
//                 template <int VEC, int CH> __device__ void take(uint32_t row, int number, int64_t column, int64_t
//                 step,
//                                                                 const float (&sum)[CH][VEC], const Group& group); };
// take is called by all threads of a group together; thread columns are column + c * step, beyond dim: sum is 0.
#pragma once
#include "common/device.cuh"
#include "gather/row_plan.cuh"

namespace lutra {
namespace cuda {

struct RowSums {
  Entries entries;
  int64_t dim;
  const float* weights;        // per position (entries hold positions then), or null: 1
  const float* bag_factor;     // per bag, or null: 1
  float factor;                // of everything
  const int64_t* argmax;       // (bags, dim) or null: an entry counts only where argmax is its row, once a bag
  const int32_t* tile_number;  // or null
  int tile;
  float* partial;  // partial_floats
};

// Where the gradient of an entry comes from: row `bag` of an array (bags, dim).
template <class G>
struct BagRows {
  static constexpr int kBlocks = 4;  // of a multiprocessor, that registers are to allow
  template <int VEC>
  using Raw = Pack<G, VEC>;
  const G* source;
  int64_t dim;
  template <int VEC>
  __device__ __forceinline__ Raw<VEC> load(int32_t bag, int32_t, int64_t column) const {
    return load_pack<G, VEC>(source + bag * dim + column);
  }
  template <int VEC>
  static __device__ __forceinline__ float value(const Raw<VEC>& raw, int j) {
    return raw[j];
  }
};

struct Group {  // threads that work on one tile
  int lanes, lane;
  unsigned mask;
  __device__ __forceinline__ float sum(float v) const {
    for (int s = lanes / 2; s > 0; s >>= 1) v += __shfl_xor_sync(mask, v, s);
    return v;
  }
};
__device__ __forceinline__ Group group_of(int log_lanes) {
  const int lanes = 1 << log_lanes, first = (threadIdx.x & 31) & ~(lanes - 1);
  return Group{lanes, static_cast<int>(threadIdx.x) & (lanes - 1),
               lanes == 32 ? kFullWarp : ((1u << lanes) - 1) << first};
}

// VEC neighbouring values as floats, by accesses of at most 16 bytes.
template <int VEC, class T>
__device__ __forceinline__ void load_values(const T* p, float (&v)[VEC]) {
  constexpr int M = sizeof(T) * VEC > 16 ? 16 / sizeof(T) : VEC;
#pragma unroll
  for (int i = 0; i < VEC; i += M) {
    const auto part = load_pack<T, M>(p + i);
#pragma unroll
    for (int j = 0; j < M; ++j) v[i + j] = part[j];
  }
}

// Values that are not read again soon: they leave the L2 cache first, where the gradients of the bags should stay.
__device__ __forceinline__ void stream(uint4* p, uint4 v) { __stcs(p, v); }
__device__ __forceinline__ void stream(uint2* p, uint2 v) { __stcs(p, v); }
__device__ __forceinline__ void stream(uint32_t* p, uint32_t v) { __stcs(p, v); }
__device__ __forceinline__ void stream(uint16_t* p, uint16_t v) { __stcs(p, v); }
template <class T, int VEC>
__device__ __forceinline__ void store_stream(T* p, const float* values) {
  constexpr int M = sizeof(T) * VEC > 16 ? 16 / sizeof(T) : VEC;
  using W = typename Word<sizeof(T) * M>::type;
#pragma unroll
  for (int i = 0; i < VEC; i += M) {
    T v[M];
#pragma unroll
    for (int j = 0; j < M; ++j) v[j] = from_float<T>(values[i + j]);
    W w;
    memcpy(&w, v, sizeof(w));
    stream(reinterpret_cast<W*>(p + i), w);
  }
}

constexpr int kSumThreads = 256;
constexpr int kInFlightRows = 4;

// Entries of a tile: fewer where there are few entries, so that the machine is filled.
inline int tile_for(int64_t n, int64_t lanes_in_all) {
  int tile = 32;
  while (tile > 8 && n / tile * lanes_in_all < 131072) tile /= 2;
  return tile;
}
inline int64_t partial_floats(int64_t n, int tile, int64_t dim) { return (div_up(n, tile) + 1) * 2 * dim; }

template <int VEC, int CH, bool MAX, class Source, class Sink>
__global__ void __launch_bounds__(
    kSumThreads, CH > 1 ? 1 : (Sink::kBlocks < Source::kBlocks ? Sink::kBlocks : Source::kBlocks) - (VEC > 4))
    tiles_kernel(RowSums a, Source source, Sink sink, int log_lanes) {
  const Group group = group_of(log_lanes);
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * (kSumThreads >> log_lanes) + (threadIdx.x >> log_lanes));
  const int64_t begin = at * a.tile;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * group.lanes * CH + group.lane) * VEC;
  const int64_t step = static_cast<int64_t>(group.lanes) * VEC;
  const uint32_t* keys = a.entries.keys;
  if (begin >= a.entries.n) return;
  uint32_t current = keys[begin];
  if (current == kNoRow) return;
  bool carried = begin > 0 && keys[begin - 1] == current;  // the row began before this tile
  int number = a.tile_number ? a.tile_number[at] : 0;
  int32_t last_bag = MAX && carried ? a.entries.bag_of(a.entries.values[begin - 1]) : -1;
  float* partial = a.partial + at * 2 * a.dim;
  float sum[CH][VEC];
#pragma unroll
  for (int c = 0; c < CH; ++c) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[c][j] = 0;
  }
  bool done = false;
  constexpr bool kAhead = Sink::kPrefetch;  // keys are read a step ahead, so that the rows can be fetched
  uint4 next_keys;
  int4 next_values;
  if (kAhead) {
    next_keys = *reinterpret_cast<const uint4*>(keys + begin);
    next_values = *reinterpret_cast<const int4*>(a.entries.values + begin);
  }
  for (int i = 0; i < a.tile && !done; i += kInFlightRows) {
    const uint4 k = kAhead ? next_keys : *reinterpret_cast<const uint4*>(keys + begin + i);
    const int4 v = kAhead ? next_values : *reinterpret_cast<const int4*>(a.entries.values + begin + i);
    if (kAhead && i + kInFlightRows < a.tile) {
      next_keys = *reinterpret_cast<const uint4*>(keys + begin + i + kInFlightRows);
      next_values = *reinterpret_cast<const int4*>(a.entries.values + begin + i + kInFlightRows);
    }
    const uint32_t key[kInFlightRows] = {k.x, k.y, k.z, k.w};
    const int32_t value[kInFlightRows] = {v.x, v.y, v.z, v.w};
    int32_t bag[kInFlightRows];
    float factor[kInFlightRows];
    typename Source::template Raw<VEC> row[kInFlightRows][CH];
#pragma unroll
    for (int u = 0; u < kInFlightRows; ++u) {
      if (key[u] == kNoRow) continue;
      bag[u] = a.entries.bag_of(value[u]);
      factor[u] = a.factor;
      if (a.weights) factor[u] *= a.weights[value[u]];
      if (a.bag_factor) factor[u] *= a.bag_factor[bag[u]];
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        if (column + c * step < a.dim) row[u][c] = source.template load<VEC>(bag[u], value[u], column + c * step);
      }
    }
    if (kAhead && i + kInFlightRows < a.tile) {
      if (next_keys.x != kNoRow) sink.prefetch(next_keys.x, column);
      if (next_keys.y != kNoRow) sink.prefetch(next_keys.y, column);
      if (next_keys.z != kNoRow) sink.prefetch(next_keys.z, column);
      if (next_keys.w != kNoRow) sink.prefetch(next_keys.w, column);
    }
#pragma unroll
    for (int u = 0; u < kInFlightRows; ++u) {
      if (done || key[u] == kNoRow) {
        done = true;
        continue;
      }
      if (key[u] != current) {  // the row before this entry is complete
        if (carried) {
#pragma unroll
          for (int c = 0; c < CH; ++c) {
            if (column + c * step < a.dim) store_pack<float, VEC>(partial + column + c * step, sum[c]);
          }
        } else {
          sink.template take<VEC, CH>(current, number, column, step, sum, group);
        }
#pragma unroll
        for (int c = 0; c < CH; ++c) {
#pragma unroll
          for (int j = 0; j < VEC; ++j) sum[c][j] = 0;
        }
        carried = false;
        current = key[u];
        ++number;
        last_bag = -1;
      }
      if (MAX && bag[u] == last_bag) continue;  // the same id twice in a bag: the two are neighbours
      last_bag = bag[u];
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        if (column + c * step >= a.dim) continue;
        const int64_t* argmax = a.argmax + bag[u] * a.dim + column + c * step;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          if (!MAX)
            sum[c][j] = fmaf(factor[u], source.template value<VEC>(row[u][c], j), sum[c][j]);
          else if (argmax[j] == static_cast<int64_t>(current))
            sum[c][j] += source.template value<VEC>(row[u][c], j);
        }
      }
    }
  }
  const bool goes_on = !done && keys[begin + a.tile] == current;
  if (carried || goes_on) {
    float* to = partial + (carried ? 0 : a.dim);
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      if (column + c * step < a.dim) store_pack<float, VEC>(to + column + c * step, sum[c]);
    }
  } else {
    sink.template take<VEC, CH>(current, number, column, step, sum, group);
  }
}

// Adds the partial sums of tiles [first, last] into `sum`, in order.
template <int VEC, int CH>
__device__ __forceinline__ void add_partials(const float* partial, int64_t dim, int64_t first, int64_t last,
                                             int64_t column, int64_t step, float (&sum)[CH][VEC]) {
  constexpr int kAhead = VEC * CH >= 32 ? 1 : VEC * CH >= 16 ? 2 : 4;  // as many as registers hold
  for (int64_t t = first; t <= last; t += kAhead) {
    float v[kAhead][CH][VEC];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        if (t + u <= last && column + c * step < dim)
          load_values<VEC>(partial + (t + u) * 2 * dim + column + c * step, v[u][c]);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        if (t + u > last || column + c * step >= dim) continue;
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[c][j] += v[u][c][j];
      }
    }
  }
}

// A sink: a row's sum goes to its place in the table's gradient, or into the list of the touched rows.
template <class T>
struct StoreRows {
  T* grad;
  int64_t dim;
  bool dense;
  static constexpr bool kPrefetch = false;
  static constexpr int kBlocks = 4;
  __device__ __forceinline__ void prefetch(uint32_t, int64_t) const {}
  template <int VEC, int CH>
  __device__ __forceinline__ void take(uint32_t row, int number, int64_t column, int64_t, const float (&sum)[CH][VEC],
                                       const Group&) const {
    static_assert(CH == 1, "rows are stored in slabs");
    if (column < dim)
      store_stream<T, VEC>(grad + (dense ? static_cast<int64_t>(row) : static_cast<int64_t>(number)) * dim + column,
                           sum[0]);
  }
};

constexpr int kLongRun = 64;      // tiles; a row that crosses more is added up by a whole block
constexpr int kBorderTiles = 64;  // of a block

// The tile in which the row ends that begins in tile `at` and goes on behind it; 0 where there is none.
__device__ __forceinline__ int border_end(const Entries& e, int tile, int64_t at) {
  const int64_t begin = at * tile, end = begin + tile;
  if (end >= e.n) return 0;
  const uint32_t row = e.keys[end - 1];
  if (row == kNoRow || e.keys[end] != row) return 0;
  if (begin > 0 && e.keys[begin - 1] == row && e.keys[begin] == row) return 0;  // it began before
  int64_t low = end, high = e.n;  // the last entry of the run, by doubling steps and bisection
  for (int64_t jump = tile; low + jump < high; jump *= 2) {
    if (e.keys[low + jump] != row) {
      high = low + jump;
      break;
    }
    low += jump;
  }
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (e.keys[middle] == row)
      low = middle;
    else
      high = middle;
  }
  return static_cast<int>(low / tile);
}

// Rows that cross a border of tiles: where one begins its parts are added up.
template <int VEC, int CH, class Sink>
__global__ void __launch_bounds__(kSumThreads, 2) borders_kernel(RowSums a, Sink sink, int log_lanes) {
  __shared__ int ends[kBorderTiles];
  __shared__ float parts[kSumThreads * VEC];
  const Group group = group_of(log_lanes);
  const int groups = kSumThreads >> log_lanes, mine = threadIdx.x >> log_lanes;
  const int64_t tile0 = static_cast<int64_t>(blockIdx.x) * kBorderTiles;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * group.lanes * CH + group.lane) * VEC;
  const int64_t step = static_cast<int64_t>(group.lanes) * VEC;
  int end = 0;
  if (threadIdx.x < kBorderTiles) {
    end = border_end(a.entries, a.tile, tile0 + threadIdx.x);
    ends[threadIdx.x] = end;
  }
  const bool is_long = end > 0 && end - (tile0 + threadIdx.x) > kLongRun;
  if (!__syncthreads_or(end > 0)) return;
  float sum[CH][VEC];
  for (int t = mine; t < kBorderTiles; t += groups) {
    const int64_t at = tile0 + t, last = ends[t];
    if (last == 0 || last - at > kLongRun) continue;
#pragma unroll
    for (int c = 0; c < CH; ++c) {
#pragma unroll
      for (int j = 0; j < VEC; ++j)
        sum[c][j] = column + c * step < a.dim ? a.partial[(at * 2 + 1) * a.dim + column + c * step + j] : 0.0f;
    }
    add_partials<VEC, CH>(a.partial, a.dim, at + 1, last, column, step, sum);
    const uint32_t row = a.entries.keys[(at + 1) * a.tile];
    sink.template take<VEC, CH>(row, a.tile_number ? a.tile_number[at + 1] : 0, column, step, sum, group);
  }
  if (!__syncthreads_or(is_long)) return;
  for (int t = 0; t < kBorderTiles; ++t) {  // each group takes a stretch of a run, the stretches are added in order
    const int64_t first = tile0 + t + 1, last = ends[t];
    if (last == 0 || last - first + 1 <= kLongRun) continue;
    const int64_t count = last - first + 1;
    const int64_t from = first + count * mine / groups, to = first + count * (mine + 1) / groups - 1;
#pragma unroll
    for (int c = 0; c < CH; ++c) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[c][j] = 0;
    }
    add_partials<VEC, CH>(a.partial, a.dim, from, to, column, step, sum);
#pragma unroll
    for (int c = 0; c < CH; ++c) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) parts[j * kSumThreads + threadIdx.x] = sum[c][j];
      __syncthreads();
      if (mine == 0) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const int64_t at = column + c * step + j;
          float total = column + c * step < a.dim ? a.partial[((first - 1) * 2 + 1) * a.dim + at] : 0.0f;
          for (int p = 0; p < groups; ++p) total += parts[j * kSumThreads + (p << log_lanes) + group.lane];
          sum[c][j] = total;
        }
      }
      __syncthreads();
    }
    if (mine == 0)
      sink.template take<VEC, CH>(a.entries.keys[first * a.tile], a.tile_number ? a.tile_number[first] : 0, column,
                                  step, sum, group);
  }
}

// Both launches. lanes of a group: a power of two.
template <int VEC, int CH, bool MAX, class Source, class Sink>
void sum_rows(const RowSums& a, const Source& source, const Sink& sink, int lanes, const char* what, const Launch& l) {
  if (a.entries.n == 0 || a.dim == 0) return;
  const int64_t slabs = div_up(a.dim, static_cast<int64_t>(lanes) * VEC * CH);
  if (slabs > 65535) throw std::length_error(std::string("lutra: ") + what + ": rows too long for CUDA");
  const int64_t tiles = div_up(a.entries.n, a.tile);
  const dim3 grid(grid_x(div_up(tiles, kSumThreads / lanes)), static_cast<unsigned>(slabs));
  launch(what, tiles_kernel<VEC, CH, MAX, Source, Sink>, grid, kSumThreads, 0, l, a, source, sink, log2_of(lanes));
  launch(what, borders_kernel<VEC, CH, Sink>, dim3(grid_x(div_up(tiles, kBorderTiles)), static_cast<unsigned>(slabs)),
         kSumThreads, 0, l, a, sink, log2_of(lanes));
}

}  // namespace cuda
}  // namespace lutra
