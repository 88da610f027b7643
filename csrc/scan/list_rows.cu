// Exact scores of rows in inverted lists on CUDA; formula and layout are in list_rows.h, the plan in list_scan.cuh.
//
// A thread has V neighbouring rows of a block of 16 and walks their dimensions: value j of 16 rows lies side by side,
// so a warp's loads are whole sectors, and a score is a sum along d in one thread, in order, whatever the shape. The
// queries lie in shared memory, from where all threads read the same words. One probe: V rows are 4 bytes, and the
// limit is reading the lists. A group of 8 probes: 4 rows, 32 multiply-adds for each load, and a list is read once
// for all of them.
#include "scan/list_rows.h"

#include "scan/list_scan.cuh"

namespace lutra {
namespace cuda {
namespace {

struct RowsScan {
  const float* q;  // of the queries of the launch
  int64_t ldq;
  int d, pitch;  // pitch: d rounded up to 4
  const void* x;
};

// V neighbouring values as floats.
template <class T, int V>
__device__ __forceinline__ void to_floats(const Pack<T, V>& pack, float (&to)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = pack[v];
}
// By the mantissa of 2^23 + byte: conversions have a quarter of the rate of additions.
__device__ __forceinline__ void to_floats(const Pack<int8_t, 4>& pack, float (&to)[4]) {
  const uint32_t word = pack.word ^ 0x80808080u;
#pragma unroll
  for (int v = 0; v < 4; ++v) to[v] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + v)) - 8388736.0f;
}

template <int Q>
constexpr int threads_for() {
  return Q == 1 ? kListThreads : kGroupThreads;
}

template <class T, int Q, int V, bool L2>
__global__ void __launch_bounds__(threads_for<Q>(), 3) rows_kernel(ListScan a, RowsScan r) {
  constexpr int kThreads = threads_for<Q>();
  // Loads in flight. Alone, a thread waits for little else; in a group the next ones run while these are multiplied.
  constexpr int kAhead = Q == 1 ? 32 : 4;
  const ListWork w = list_work<Q>(a);
  if (w.probes == 0) return;  // the whole block
  float* queries = dynamic_shared<float>();
  ListSelection<Q, kThreads> selection;
  selection.start(queries + Q * r.pitch, a, w);
#pragma unroll 1
  for (int i = 0; i < Q; ++i) {
    const float* from = i < w.probes ? r.q + list_probe<Q>(a, w, i) / a.lists.nprobe * r.ldq : nullptr;
    for (int j = threadIdx.x; j < r.pitch; j += kThreads) queries[i * r.pitch + j] = from && j < r.d ? from[j] : 0;
  }
  __syncthreads();
  for (int64_t tile = w.begin; tile < w.end; tile += kThreads * V) {
    const int64_t row = tile + threadIdx.x * V;
    float sum[Q][V];
#pragma unroll
    for (int i = 0; i < Q; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) sum[i][v] = 0;
    unsigned pending = 0;
    if (row < w.end) {
      const T* x = static_cast<const T*>(r.x) + (row >> 4) * r.d * 16 + (row & 15);
      const auto add = [&](const float (&value)[V], int i, float q) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float difference = q - value[v];
          sum[i][v] = L2 ? fmaf(difference, -difference, sum[i][v]) : fmaf(q, value[v], sum[i][v]);
        }
      };
      int j = 0;
      Pack<T, V> next[kAhead];
      const auto fetch = [&] {
#pragma unroll
        for (int c = 0; c < kAhead; ++c) next[c] = load_pack<T, V>(x + c * 16);
      };
      if (Q > 1 && kAhead <= r.d) fetch();
#pragma unroll 1
      for (; j + kAhead <= r.d; j += kAhead) {
        if (Q == 1) fetch();
        Pack<T, V> packs[kAhead];
#pragma unroll
        for (int c = 0; c < kAhead; ++c) packs[c] = next[c];
        x += kAhead * 16;
        if (Q > 1 && j + 2 * kAhead <= r.d) fetch();
#pragma unroll
        for (int c = 0; c < kAhead; c += 4) {
          float value[4][V];
#pragma unroll
          for (int e = 0; e < 4; ++e) to_floats(packs[c + e], value[e]);
#pragma unroll
          for (int i = 0; i < Q; ++i) {
            const float4 p = *reinterpret_cast<const float4*>(queries + i * r.pitch + j + c);
            add(value[0], i, p.x), add(value[1], i, p.y), add(value[2], i, p.z), add(value[3], i, p.w);
          }
        }
      }
#pragma unroll 1
      for (; j < r.d; ++j, x += 16) {
        float value[V];
        to_floats(load_pack<T, V>(x), value);
#pragma unroll
        for (int i = 0; i < Q; ++i) add(value, i, queries[i * r.pitch + j]);
      }
#pragma unroll
      for (int i = 0; i < Q; ++i)
#pragma unroll
        for (int v = 0; v < V; ++v) pending |= static_cast<unsigned>(i < w.probes && row + v < w.end) << (i * V + v);
    }
    offer_list_rows<Q, V, 1, kThreads>(a, w, selection, sum, row, pending, tile == w.begin);
  }
  finish_list_selection<Q, kThreads>(a, w, selection);
}

constexpr int64_t kGroupedDims = 1024;  // from there on a group's queries would take the room of other blocks

int64_t tile_of(DType t) { return kListThreads * (t == DType::i8 ? 4 : t == DType::f32 ? 1 : 2); }

size_t query_bytes(int64_t d, int probes) { return static_cast<size_t>(round_up(d, 4)) * 4 * probes; }

ListScanPlan plan_for(const ListsArgs& a, const ListSizes& sizes, int64_t d, DType t, int device) {
  const ListScanShape shape{tile_of(t), d <= kGroupedDims ? kGroupThreads * 4 : 0, query_bytes(d, 1), 1};
  const ListScanPlan p = plan_list_scan(a, sizes, shape, device);
  if (query_bytes(d, 1) + list_select_bytes(1, kListThreads, p.best, p.capacity) >
      static_cast<size_t>(shared_limit(device)))
    throw std::length_error("lutra: vectors of " + std::to_string(d) + " values are too long for lists on CUDA");
  return p;
}

template <class T, bool L2>
void scan_type(const ListScan& s, const RowsScan& r, bool grouped, dim3 grid, const Launch& l) {
  constexpr int V = 4 / sizeof(T);
  const int probes = grouped ? kGroup : 1, threads = grouped ? kGroupThreads : kListThreads;
  const size_t shared = query_bytes(r.d, probes) + list_select_bytes(probes, threads, s.best, s.capacity);
  launch("list_rows", grouped ? rows_kernel<T, kGroup, 4, L2> : rows_kernel<T, 1, V, L2>, grid, threads, shared, l, s,
         r);
}

template <bool L2>
void scan_of(DType t, const ListScan& s, const RowsScan& r, bool grouped, dim3 grid, const Launch& l) {
  switch (t) {
    case DType::f16: return scan_type<__half, L2>(s, r, grouped, grid, l);
    case DType::bf16: return scan_type<__nv_bfloat16, L2>(s, r, grouped, grid, l);
    case DType::i8: return scan_type<int8_t, L2>(s, r, grouped, grid, l);
    default: return scan_type<float, L2>(s, r, grouped, grid, l);
  }
}

}  // namespace

int64_t list_rows_workspace(const ListsArgs& a, const ListSizes& sizes, int64_t d, DType t, const Launch& l) {
  const DeviceGuard guard(l.device);
  return list_scan_bytes(plan_for(a, sizes, d, t, l.device), a);
}

void list_rows(const ListRowsArgs& a, const ListSizes& sizes, const Launch& l) {
  const DeviceGuard guard(l.device);
  if (!aligned(a.x, 16)) throw std::invalid_argument("lutra: rows in lists must be aligned to 16 bytes");
  const ListScanPlan p = plan_for(a.lists, sizes, a.d, a.dtype, l.device);
  each_list_scan(a.lists, p, "list_rows", l, [&](const ListScan& s, int64_t first, dim3 grid) {
    const RowsScan r{a.q + first * a.ldq, a.ldq, static_cast<int>(a.d), static_cast<int>(round_up(a.d, 4)), a.x};
    if (a.lists.metric == Metric::l2)
      scan_of<true>(a.dtype, s, r, p.grouped, grid, l);
    else
      scan_of<false>(a.dtype, s, r, p.grouped, grid, l);
  });
}

}  // namespace cuda
}  // namespace lutra
