// Scores of scalar codes in inverted lists on CUDA; formula and layout are in list_scalar.h, the plan in list_scan.cuh.
//
// As list_rows.cu, with codes in place of values: a thread has 4 neighbouring rows, whose bytes of one dimension are a
// word. Codes become values by step and offset (with the list's centroid in it), which lie in shared memory beside the
// queries. Codes of 6 bits come four dimensions at a time, in three words.
#include "scan/list_scalar.h"

#include "scan/list_scan.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int V = 4;  // rows of a thread

struct ScalarScan {
  const float* q;
  int64_t ldq;
  int d, pitch;
  const uint8_t* codes;
  int64_t size;  // bytes of a row
  const float *step, *offset, *centroids;
};

// The bytes of a word as floats, by the mantissa of 2^23 + byte.
__device__ __forceinline__ void bytes_to_floats(uint32_t word, float (&to)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + v)) - 8388608.0f;
}

template <int Q>
constexpr int threads_for() {
  return Q == 1 ? kListThreads : kGroupThreads;
}

template <int BITS, int Q, bool L2>
__global__ void __launch_bounds__(threads_for<Q>(), Q == 1 ? 3 : 4) scalar_kernel(ListScan a, ScalarScan r) {
  constexpr int kThreads = threads_for<Q>();
  const ListWork w = list_work<Q>(a);
  if (w.probes == 0) return;  // the whole block
  float* queries = dynamic_shared<float>();
  float *step = queries + Q * r.pitch, *offset = step + r.pitch;
  ListSelection<Q, kThreads> selection;
  selection.start(offset + r.pitch, a, w);
#pragma unroll 1
  for (int i = 0; i < Q; ++i) {
    const float* from = i < w.probes ? r.q + list_probe<Q>(a, w, i) / a.lists.nprobe * r.ldq : nullptr;
    for (int j = threadIdx.x; j < r.pitch; j += kThreads) queries[i * r.pitch + j] = from && j < r.d ? from[j] : 0;
  }
  for (int j = threadIdx.x; j < r.pitch; j += kThreads) {
    step[j] = j < r.d ? r.step[j] : 0;
    float shift = j < r.d ? r.offset[j] : 0;
    if (r.centroids && j < r.d && w.list >= 0) shift += r.centroids[w.list * r.d + j];
    offset[j] = shift;
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
      const uint8_t* codes = r.codes + (row >> 4) * r.size * 16 + (row & 15);
      const auto word_at = [&](int64_t byte) { return *reinterpret_cast<const uint32_t*>(codes + byte * 16); };
      const auto dimension = [&](uint32_t word, int j) {
        float x[V];
        bytes_to_floats(word, x);
        const float s = step[j], o = offset[j];
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] = fmaf(x[v], s, o);
#pragma unroll
        for (int i = 0; i < Q; ++i) {
          const float q = queries[i * r.pitch + j];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float difference = q - x[v];
            sum[i][v] = L2 ? fmaf(difference, -difference, sum[i][v]) : fmaf(q, x[v], sum[i][v]);
          }
        }
      };
      if (BITS == 8) {
        int j = 0;
        constexpr int kAhead = Q == 1 ? 32 : 4;
#pragma unroll 1
        for (; j + kAhead <= r.d; j += kAhead) {
          uint32_t word[kAhead];
#pragma unroll
          for (int c = 0; c < kAhead; ++c) word[c] = word_at(j + c);
#pragma unroll
          for (int c = 0; c < kAhead; ++c) dimension(word[c], j + c);
        }
#pragma unroll 4
        for (; j < r.d; ++j) dimension(word_at(j), j);
      } else {
        constexpr uint32_t kLow = 0x3f3f3f3fu, kTwo = 0x03030303u;
        int j = 0;
        int64_t byte = 0;
#pragma unroll(Q == 1 ? 8 : 2)
        for (; j + 4 <= r.d; j += 4, byte += 3) {
          const uint32_t x = word_at(byte), y = word_at(byte + 1), z = word_at(byte + 2);
          dimension(x & kLow, j);
          dimension(y & kLow, j + 1);
          dimension(z & kLow, j + 2);
          dimension((x >> 6 & kTwo) | (y >> 6 & kTwo) << 2 | (z >> 6 & kTwo) << 4, j + 3);
        }
#pragma unroll 1
        for (; j < r.d; ++j, ++byte) dimension(word_at(byte) & kLow, j);  // a byte for each code of the last group
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

constexpr int64_t kGroupedDims = 1024;

size_t near_bytes(int64_t d, int probes) { return static_cast<size_t>(round_up(d, 4)) * 4 * (probes + 2); }

ListScanPlan plan_for(const ListsArgs& a, const ListSizes& sizes, int64_t d, int device) {
  const ListScanShape shape{kListThreads * V, d <= kGroupedDims ? kGroupThreads * V : 0, near_bytes(d, 1), 1};
  const ListScanPlan p = plan_list_scan(a, sizes, shape, device);
  if (near_bytes(d, 1) + list_select_bytes(1, kListThreads, p.best, p.capacity) >
      static_cast<size_t>(shared_limit(device)))
    throw std::length_error("lutra: vectors of " + std::to_string(d) + " values are too long for lists on CUDA");
  return p;
}

template <int BITS, bool L2>
void scan_of(const ListScan& s, const ScalarScan& r, bool grouped, dim3 grid, const Launch& l) {
  const int probes = grouped ? kGroup : 1, threads = grouped ? kGroupThreads : kListThreads;
  const size_t shared = near_bytes(r.d, probes) + list_select_bytes(probes, threads, s.best, s.capacity);
  launch("list_scalar", grouped ? scalar_kernel<BITS, kGroup, L2> : scalar_kernel<BITS, 1, L2>, grid, threads, shared,
         l, s, r);
}

}  // namespace

int64_t list_scalar_workspace(const ListsArgs& a, const ListSizes& sizes, int64_t d, const Launch& l) {
  const DeviceGuard guard(l.device);
  return list_scan_bytes(plan_for(a, sizes, d, l.device), a);
}

void list_scalar(const ListScalarArgs& a, const ListSizes& sizes, const Launch& l) {
  const DeviceGuard guard(l.device);
  if (a.bits != 8 && a.bits != 6) throw std::invalid_argument("lutra: scalar codes have 8 or 6 bits");
  if (!aligned(a.codes, 4)) throw std::invalid_argument("lutra: codes in lists must be aligned to 4 bytes");
  const ListScanPlan p = plan_for(a.lists, sizes, a.d, l.device);
  each_list_scan(a.lists, p, "list_scalar", l, [&](const ListScan& s, int64_t first, dim3 grid) {
    const ScalarScan r{a.q + first * a.ldq,
                       a.ldq,
                       static_cast<int>(a.d),
                       static_cast<int>(round_up(a.d, 4)),
                       a.codes,
                       scalar_size(a.d, a.bits),
                       a.step,
                       a.offset,
                       a.centroids};
    const bool l2 = a.lists.metric == Metric::l2;
    if (a.bits == 8)
      l2 ? scan_of<8, true>(s, r, p.grouped, grid, l) : scan_of<8, false>(s, r, p.grouped, grid, l);
    else
      l2 ? scan_of<6, true>(s, r, p.grouped, grid, l) : scan_of<6, false>(s, r, p.grouped, grid, l);
  });
}

}  // namespace cuda
}  // namespace lutra
