// Tables on CUDA; the formula is in tables.h.
//
// Forward, few tokens: a group of 8 or 32 lanes holds 32 or 128 columns (16 bytes a lane in fp32) of one token's
// output and adds up rows, four in flight. One token alone (a decoding step) is split over up to 32 groups of a
// block, each taking a stretch of the tables, combined in order. Blocks run over the tokens first and over the
// columns last, so that those that run together read the same columns.
//
// Forward, many tokens: each row is read by several tokens, and reading it from L2 every time is the limit
// (34 GB for 4096 tokens and 512 tables of 4096 columns). So a block takes 1024 tokens and 128 bytes of the columns,
// keeps its sums in registers, and walks the tables: the slab of a table (256 entries are 32 KB) is copied to shared
// memory once, while the one before is in use, and every token finds its row there.
//
// Backward: (token, table) is a position with key table * entries + code, so the tables' gradient is the segment
// sum of gather/segments.cuh, and needs its workspace; the weights' gradient is a warp per (token, table).
//
// Nothing can be raised here: a code outside [0, entries) makes its token's output NaN, its weight's gradient
// NaN, and is left out of the tables' gradient.
//
// Overflow: row offsets are 64-bit; sums are fp32 in increasing k within a stretch; the backward pass takes fewer
// than 2^31 codes and 2^32 - 1 rows (checked).
#include "gather/tables.h"

#include "common/device.cuh"
#include "gather/segments.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads) tables_kernel(TablesArgs a, int log_lanes, int log_parts) {
  const int lanes = 1 << log_lanes, parts = 1 << log_parts;
  const int lane = threadIdx.x & (lanes - 1), part = (threadIdx.x >> log_lanes) & (parts - 1);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kThreads >> (log_lanes + log_parts)) +
                        (threadIdx.x >> (log_lanes + log_parts));
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * lanes + lane) * VEC;
  const bool active = token < a.tokens && column < a.dim;
  float sum[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) sum[j] = 0;
  if (active) {
    const int64_t begin = a.n_tables * part / parts, end = a.n_tables * (part + 1) / parts;
    const int32_t* codes = a.codes + token * a.n_tables;
    const float* weights = a.weights ? a.weights + token * a.n_tables : nullptr;
    const T* tables = static_cast<const T*>(a.tables) + column;
    if (part == 0 && a.bias) {
      const auto b = load_pack<T, VEC>(static_cast<const T*>(a.bias) + column);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[j] = b[j];
    }
    for (int64_t k = begin; k < end; k += kInFlight) {
      Pack<T, VEC> row[kInFlight];
      float weight[kInFlight];
      bool here[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (k + u >= end) continue;
        const int32_t code = codes[k + u];
        weight[u] = weights ? weights[k + u] : 1.0f;
        here[u] = code >= 0 && code < a.entries;
        if (here[u]) row[u] = load_pack<T, VEC>(tables + ((k + u) * a.entries + code) * a.dim);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (k + u >= end) continue;
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] = fmaf(weight[u], here[u] ? row[u][j] : quiet_nan(), sum[j]);
      }
    }
  }
  if (parts > 1) {
    float* shared = dynamic_shared<float>();  // [VEC][kThreads]
#pragma unroll
    for (int j = 0; j < VEC; ++j) shared[j * kThreads + threadIdx.x] = sum[j];
    __syncthreads();
    if (part == 0) {
      for (int p = 1; p < parts; ++p) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] += shared[j * kThreads + threadIdx.x + (p << log_lanes)];
      }
    }
  }
  if (active && part == 0) store_pack<T, VEC>(static_cast<T*>(a.out) + token * a.dim + column, sum);
}

constexpr int kSlabThreads = 512, kSlabLanes = 8, kSlabGroups = kSlabThreads / kSlabLanes;
constexpr int kPairs = 8;               // tables whose codes are fetched at once: 32 bytes of a token's codes
constexpr int kPairPitch = kPairs + 1;  // the four tokens of a warp fall into different banks

template <class T>
struct Slab {
  static constexpr int kVec = 16 / sizeof(T), kColumns = kSlabLanes * kVec;
  static constexpr int kEach = 64 / kVec;  // tokens of a group: 64 sums a thread
  static constexpr int kTokens = kSlabGroups * kEach;
  static size_t bytes(int64_t entries) {
    return static_cast<size_t>(entries) * 128 * 2 + sizeof(int2) * kTokens * kPairPitch;
  }
};

template <class T>
__global__ void __launch_bounds__(kSlabThreads, 1) slab_kernel(TablesArgs a) {
  using S = Slab<T>;
  constexpr int VEC = S::kVec;
  const int lane = threadIdx.x % kSlabLanes, group = threadIdx.x / kSlabLanes;
  const int entries = static_cast<int>(a.entries), slab_values = entries * S::kColumns;
  T* slabs = dynamic_shared<T>();                                  // [2][entries][kColumns]
  auto* pairs = reinterpret_cast<int2*>(slabs + 2 * slab_values);  // [kTokens][kPairPitch]: offset, weight
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * S::kTokens;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * S::kColumns, column = column0 + lane * VEC;

  const auto start_copies = [&](int64_t k) {
    if (k < a.n_tables) {
      const T* from = static_cast<const T*>(a.tables) + k * a.entries * a.dim;
      T* to = slabs + (k & 1) * slab_values;
#pragma unroll 2  // more would take registers from the sums
      for (int c = threadIdx.x; c < entries * kSlabLanes; c += kSlabThreads) {
        const int64_t at = column0 + c % kSlabLanes * VEC;
        const bool here = at < a.dim;
        copy_async_16(to + c * VEC, here ? from + c / kSlabLanes * a.dim + at : from, here);
      }
    }
    copy_commit();
  };

  float sum[S::kEach][VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    const float b = a.bias && column < a.dim ? to_float(static_cast<const T*>(a.bias)[column + j]) : 0.0f;
#pragma unroll
    for (int i = 0; i < S::kEach; ++i) sum[i][j] = b;
  }
  start_copies(0);
  for (int64_t k = 0; k < a.n_tables; ++k) {
    copy_wait<0>();
    __syncthreads();  // table k is here, and nobody reads the slab of table k - 1 any more
    start_copies(k + 1);
    if (k % kPairs == 0) {
#pragma unroll 2
      for (int p = threadIdx.x; p < S::kTokens * kPairs; p += kSlabThreads) {
        const int64_t token = token0 + p / kPairs, table = k + p % kPairs;
        int code = 0;
        float weight = 0;
        if (token < a.tokens && table < a.n_tables) {
          code = a.codes[token * a.n_tables + table];
          weight = a.weights ? a.weights[token * a.n_tables + table] : 1.0f;
          if (code < 0 || code >= entries) code = 0, weight = quiet_nan();
        }
        pairs[p / kPairs * kPairPitch + p % kPairs] = make_int2(code * S::kColumns, __float_as_int(weight));
      }
      __syncthreads();
    }
    const T* slab = slabs + (k & 1) * slab_values + lane * VEC;
    const int2* mine = pairs + group * kPairPitch + k % kPairs;
#pragma unroll
    for (int i = 0; i < S::kEach; ++i) {
      const int2 pair = mine[i * kSlabGroups * kPairPitch];
      const auto row = load_pack<T, VEC>(slab + pair.x);
      const float weight = __int_as_float(pair.y);
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum[i][j] = fmaf(weight, row[j], sum[i][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < S::kEach; ++i) {
    const int64_t token = token0 + group + i * kSlabGroups;
    if (token < a.tokens && column < a.dim) store_pack<T, VEC>(static_cast<T*>(a.out) + token * a.dim + column, sum[i]);
  }
}

// Whether the tokens share rows enough to fill the machine with slabs; runs it if so.
template <class T>
bool run_slabs(const TablesArgs& a, const Launch& l) {
  using S = Slab<T>;
  const int64_t blocks = div_up(a.tokens, S::kTokens), slabs = div_up(a.dim, S::kColumns);
  if (a.tokens < 2 * a.entries || a.n_tables == 0 || slabs > 65535) return false;
  if (blocks * slabs * 4 < 3 * multiprocessors(l.device)) return false;
  if (S::bytes(a.entries) > static_cast<size_t>(shared_limit(l.device))) return false;
  launch("tables", slab_kernel<T>, dim3(grid_x(blocks), static_cast<unsigned>(slabs)), kSlabThreads,
         S::bytes(a.entries), l, a);
  return true;
}

template <class T, int VEC>
void run(const TablesArgs& a, const Launch& l) {
  // Narrow groups where tokens are few: more blocks share the columns.
  const int64_t vectors = div_up(a.dim, VEC);
  const int lanes = power_of_two(vectors, a.tokens * vectors < 16384 ? 8 : 32);
  int parts = 1;
  while (parts * 2 * lanes <= kThreads && a.tokens * vectors * parts * 2 <= 131072 && a.n_tables >= parts * 8)
    parts *= 2;
  const int64_t slabs = div_up(a.dim, static_cast<int64_t>(lanes) * VEC);
  if (slabs > 65535) throw std::length_error("lutra: tables on CUDA takes rows of at most 65535 * 32 values");
  const dim3 grid(grid_x(div_up(a.tokens, kThreads / (lanes * parts))), static_cast<unsigned>(slabs));
  launch("tables", tables_kernel<T, VEC>, grid, kThreads, parts > 1 ? kThreads * VEC * sizeof(float) : 0, l, a,
         log2_of(lanes), log2_of(parts));
}

template <class T, int WIDE>
void by_width(const TablesArgs& a, const Launch& l) {
  const size_t bytes = WIDE * sizeof(T);
  const bool wide = a.dim % WIDE == 0 && aligned(a.tables, bytes) && aligned(a.out, bytes) && aligned(a.bias, bytes);
  if (wide && run_slabs<T>(a, l)) return;
  if (wide)
    run<T, WIDE>(a, l);
  else
    run<T, 1>(a, l);
}

__global__ void __launch_bounds__(kThreads)
    table_keys_kernel(const int32_t* codes, int64_t n, int64_t n_tables, int64_t entries, uint32_t* keys) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const int32_t code = codes[i];
  keys[i] = code >= 0 && code < entries ? static_cast<uint32_t>((i % n_tables) * entries + code) : kNoKey;
}

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads) table_weight_kernel(TablesBackwardArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;  // token * n_tables + table
  const int lane = threadIdx.x & 31;
  if (i >= a.tokens * a.n_tables) return;
  const int32_t code = a.codes[i];
  const bool here = code >= 0 && code < a.entries;
  float dot = 0;
  if (here) {
    const T* row = static_cast<const T*>(a.tables) + ((i % a.n_tables) * a.entries + code) * a.dim;
    const T* g = static_cast<const T*>(a.grad_out) + (i / a.n_tables) * a.dim;
    for (int64_t j = static_cast<int64_t>(lane) * VEC; j < a.dim; j += 32 * VEC) {
      const auto r = load_pack<T, VEC>(row + j);
      const auto v = load_pack<T, VEC>(g + j);
#pragma unroll
      for (int u = 0; u < VEC; ++u) dot = fmaf(r[u], v[u], dot);
    }
  }
  dot = warp_sum(dot);
  if (lane == 0) a.grad_weights[i] = here ? dot : quiet_nan();
}

template <class T, int WIDE>
void weight_grad(const TablesBackwardArgs& a, const Launch& l) {
  const size_t bytes = WIDE * sizeof(T);
  const bool wide = a.dim % WIDE == 0 && aligned(a.tables, bytes) && aligned(a.grad_out, bytes);
  launch("tables_backward", wide ? table_weight_kernel<T, WIDE> : table_weight_kernel<T, 1>,
         grid_x(div_up(a.tokens * a.n_tables, kWarps)), kThreads, 0, l, a);
}

struct BackwardArrays {
  SortArrays sort;
  Segments segments;
  float* partial;
};
BackwardArrays backward_arrays(void* workspace, int64_t n, int64_t dim, int64_t* bytes) {
  BackwardArrays s;
  int64_t used = 0;
  s.sort = sort_arrays(workspace, n, &used);
  Carve c(workspace ? static_cast<char*>(workspace) + used : nullptr);
  s.segments.order = c.take<int64_t>(n);
  s.segments.starts = c.take<int64_t>(n + 1);
  s.segments.touched = c.take<int64_t>(n);
  s.segments.bag = c.take<int32_t>(n);
  s.segments.count = c.take<int64_t>(1);
  s.partial = c.take<float>(partial_floats(n, dim));
  *bytes = used + c.used();
  return s;
}

}  // namespace

void tables(const TablesArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.dtype) {
    case DType::f16: return by_width<__half, 8>(a, l);
    case DType::bf16: return by_width<__nv_bfloat16, 8>(a, l);
    default: return by_width<float, 4>(a, l);
  }
}

int64_t tables_backward_workspace(int64_t tokens, int64_t n_tables, int64_t dim, const Launch& l) {
  const DeviceGuard guard(l.device);
  int64_t bytes = 0;
  backward_arrays(nullptr, tokens * n_tables, dim, &bytes);
  return bytes;
}

void tables_backward(const TablesBackwardArgs& a, const Launch& l) {
  const int64_t n = a.tokens * a.n_tables, rows = a.n_tables * a.entries;
  if (rows >= 0xffffffff) throw std::length_error("lutra: CUDA gradients take fewer than 2^32 - 1 rows of tables");
  const DeviceGuard guard(l.device);
  if (a.grad_tables) {
    int64_t bytes = 0;
    const BackwardArrays s = backward_arrays(l.workspace, n, a.dim, &bytes);
    const size_t size = a.dtype == DType::f32 ? 4 : 2;
    fill_zero("tables_backward", a.grad_tables, static_cast<size_t>(rows * a.dim) * size, l);
    if (n > 0) {
      launch("tables_backward", table_keys_kernel, grid_x(div_up(n, kThreads)), kThreads, 0, l, a.codes, n, a.n_tables,
             a.entries, s.sort.keys_in);
      const Segments& g = s.segments;
      sort_positions(s.sort, g, n, rows, a.n_tables, l);
      add_segments(SegmentSum{g.order, g.starts, g.touched, g.bag, g.count, n, a.dim, a.grad_out, a.dtype, a.weights,
                              nullptr, nullptr, true, a.grad_tables, s.partial},
                   "tables_backward", l);
    }
  }
  if (a.grad_weights && n > 0) {
    switch (a.dtype) {
      case DType::f16: return weight_grad<__half, 8>(a, l);
      case DType::bf16: return weight_grad<__nv_bfloat16, 8>(a, l);
      default: return weight_grad<float, 4>(a, l);
    }
  }
}

}  // namespace cuda
}  // namespace lutra
