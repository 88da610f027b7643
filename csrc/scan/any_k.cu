// Radix selection: six times the rows that are still in question are counted by a digit of their keys (a score and the
// complement of an id, as in common/select.cuh), and those of the digit in which the k-th best lies remain in question.
// Then the k best are gathered and sorted: up to 8192 by a block a query, more by CUB's radix sort, query after query.
//
// Every pass reads 4 bytes a row; passes after the one that leaves nothing in question return at once. Counts are
// 32-bit (n < 2^32 - 1), places 64-bit.
#include "scan/any_k.cuh"

#include <cub/device/device_radix_sort.cuh>

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 512, kBins = 2048, kPasses = 6, kSorted = 8192;
constexpr int kAhead = 4;  // loads of a thread that are on their way at a time
constexpr int kPickThreads = 256;
// Digits from the highest on: 11, 11 and 10 bits of the score, then of the id.
__host__ __device__ constexpr int low_bit(int pass) {
  return 64 - 32 * (pass / 3) - (pass % 3 < 2 ? 11 * (pass % 3 + 1) : 32);
}
__host__ __device__ constexpr int high_bit(int pass) { return pass == 0 ? 64 : low_bit(pass - 1); }

struct State {      // of a query
  Key prefix;       // digits that are decided; at the end the bound that the k best reach
  uint32_t wanted;  // of the keys with this prefix
  int decided;      // the prefix is the bound
  uint32_t taken;   // places of the gathered keys
};

struct Select {
  const uint32_t* scores;
  int64_t n, k;
  State* states;
  uint32_t* bins;  // [queries][kBins]
  Key* keys;       // [queries][k]
};

__device__ __forceinline__ Key key_of(uint32_t score, int64_t row) {
  return static_cast<Key>(score) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(row));
}

__global__ void __launch_bounds__(kThreads) start_kernel(Select a) {
  const int64_t query = blockIdx.x;
  for (int b = threadIdx.x; b < kBins; b += kThreads) a.bins[query * kBins + b] = 0;
  for (int64_t i = threadIdx.x; i < a.k; i += kThreads) a.keys[query * a.k + i] = 0;
  if (threadIdx.x == 0) a.states[query] = State{0, static_cast<uint32_t>(a.k < a.n ? a.k : a.n), 0, 0};
}

// f(score, row) for the block's rows of a query, 0 beyond the last; the threads of a warp call it together.
template <class F>
__device__ __forceinline__ void each_score(const Select& a, int64_t query, const F& f) {
  const uint32_t* scores = a.scores + query * a.n;
  for (int64_t row0 = static_cast<int64_t>(blockIdx.x) * kThreads * kAhead; row0 < a.n;
       row0 += static_cast<int64_t>(gridDim.x) * kThreads * kAhead) {
    uint32_t score[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t row = row0 + u * kThreads + threadIdx.x;
      score[u] = row < a.n ? scores[row] : 0;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) f(score[u], row0 + u * kThreads + threadIdx.x);
  }
}

// Grid: (parts, queries).
__global__ void __launch_bounds__(kThreads) count_kernel(Select a, int pass) {
  __shared__ uint32_t bins[kBins];
  const int64_t query = blockIdx.y;
  const State state = a.states[query];
  if (state.decided) return;
  for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  const int low = low_bit(pass), high = high_bit(pass);
  const Key closed = high < 64 ? ~static_cast<Key>(0) << high : 0;
  const unsigned mask = (1u << (high - low)) - 1;
  each_score(a, query, [&](uint32_t score, int64_t row) {
    const Key key = key_of(score, row);
    if (score && (key & closed) == state.prefix) atomicAdd(&bins[static_cast<unsigned>(key >> low) & mask], 1u);
  });
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kThreads)
    if (bins[b]) atomicAdd(&a.bins[query * kBins + b], bins[b]);
}

// A block a query: the digit in which the `wanted`-th largest lies.
__global__ void __launch_bounds__(kPickThreads) pick_kernel(Select a, int pass) {
  constexpr int kOwn = kBins / kPickThreads, kWarps = kPickThreads / 32;
  static_assert(kOwn == 8, "two loads");
  __shared__ uint32_t of_warps[kWarps];
  const int64_t query = blockIdx.x;
  State state = a.states[query];
  if (state.decided) return;
  uint4* bins = reinterpret_cast<uint4*>(a.bins + query * kBins) + threadIdx.x * 2;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const uint4 low = bins[0], high = bins[1];
  const uint32_t mine[kOwn] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  bins[0] = bins[1] = uint4{0, 0, 0, 0};  // for the next pass
  uint32_t own = 0;
#pragma unroll
  for (int b = 0; b < kOwn; ++b) own += mine[b];
  uint32_t from_here = own;  // keys in this thread's bins or higher ones
#pragma unroll
  for (int s = 1; s < 32; s <<= 1) {
    const uint32_t v = __shfl_down_sync(kFullWarp, from_here, s);
    if (lane + s < 32) from_here += v;
  }
  if (lane == 0) of_warps[warp] = from_here;
  __syncthreads();  // and all have read the state
  uint32_t all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w > warp) from_here += of_warps[w];
    all += of_warps[w];
  }
  uint32_t higher = from_here - own;
  if (all <= state.wanted) {  // in the first pass only: all that may be found is wanted
    if (threadIdx.x == 0) state.prefix = 1, state.decided = 1, a.states[query] = state;
  } else if (from_here >= state.wanted && higher < state.wanted) {  // one thread
    int digit = 0;
    uint32_t inside = 0;
#pragma unroll
    for (int b = kOwn - 1; b >= 0; --b) {
      if (higher + inside >= state.wanted) break;
      higher += inside;
      inside = mine[b], digit = b;
    }
    state.wanted -= higher;
    state.prefix |= static_cast<Key>(threadIdx.x * kOwn + digit) << low_bit(pass);
    state.decided = inside == state.wanted || pass == kPasses - 1;
    a.states[query] = state;
  }
}

__global__ void __launch_bounds__(kThreads) gather_kernel(Select a) {
  const int64_t query = blockIdx.y;
  const int lane = threadIdx.x & 31;
  const Key bound = a.states[query].prefix;
  const uint32_t least = static_cast<uint32_t>(bound >> 32);
  each_score(a, query, [&](uint32_t score, int64_t row) {
    const Key key = key_of(score, row);
    const bool keep = score && score >= least && key >= bound;
    const unsigned votes = __ballot_sync(kFullWarp, keep);
    if (!votes) return;
    uint32_t first = 0;  // of the warp's places
    if (lane == 0) first = atomicAdd(&a.states[query].taken, static_cast<uint32_t>(__popc(votes)));
    const uint32_t place = __shfl_sync(kFullWarp, first, 0) + __popc(votes & ((1u << lane) - 1));
    if (keep && place < a.k) a.keys[query * a.k + place] = key;
  });
}

__global__ void __launch_bounds__(kThreads)
    write_kernel(const Key* keys, int64_t k, bool smaller_better, float* scores, int64_t* ids) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= k) return;
  const Key key = keys[i];
  const float infinity = __int_as_float(0x7f800000);
  float score = smaller_better ? infinity : -infinity;
  if (key) score = smaller_better ? 0.0f - key_score(key) : key_score(key);
  scores[i] = score;
  ids[i] = key ? key_id(key) : -1;
}

struct Arrays {
  uint32_t* scores;
  State* states;
  uint32_t* bins;
  Key *keys, *sorted;
  char* sort;
  size_t sort_bytes;
};
// k places a query are sorted; what k has beyond n is padding.
Arrays arrays(int64_t queries, int64_t n, int64_t k, void* workspace, int64_t* bytes) {
  Carve c(workspace);
  Arrays a{};
  a.scores = c.take<uint32_t>(queries * n);
  a.states = c.take<State>(queries);
  a.bins = c.take<uint32_t>(queries * kBins);
  a.keys = c.take<Key>(queries * k);
  if (k > kSorted) {
    a.sorted = c.take<Key>(k);
    check(cub::DeviceRadixSort::SortKeysDescending(nullptr, a.sort_bytes, a.keys, a.sorted, k), "any_k");
    a.sort = c.take<char>(static_cast<int64_t>(a.sort_bytes));
  }
  if (bytes) *bytes = c.used();
  return a;
}

}  // namespace

int64_t any_k_queries(int64_t nq, int64_t n) {
  const int64_t fit = (int64_t{1} << 27) / (n > 0 ? n : 1);
  const int64_t most = fit < 1 ? 1 : fit > 65535 ? 65535 : fit;
  return nq < most ? nq : most;
}

int64_t any_k_bytes(int64_t queries, int64_t n, int64_t k) {
  int64_t bytes = 0;
  arrays(queries, n, k, nullptr, &bytes);
  return bytes;
}

AnyK any_k_arrays(int64_t queries, int64_t n, int64_t k, void* workspace) {
  return {queries, n, k, arrays(queries, n, k, workspace, nullptr).scores, workspace};
}

void any_k(const AnyK& a, int64_t count, bool smaller_better, float* scores, int64_t* ids, const char* what,
           const Launch& l) {
  if (count < 1 || a.k < 1) return;
  const Arrays w = arrays(a.queries, a.n, a.k, a.scratch, nullptr);
  const Select s{w.scores, a.n, a.k, w.states, w.bins, w.keys};
  launch(what, start_kernel, grid_x(count), kThreads, 0, l, s);
  const int64_t parts = div_up(a.n, kThreads * 8), most = 4 * multiprocessors(l.device);
  const dim3 grid(grid_x(parts < most ? parts : most), static_cast<unsigned>(count));
  for (int pass = 0; pass < kPasses; ++pass) {
    launch(what, count_kernel, grid, kThreads, 0, l, s, pass);
    launch(what, pick_kernel, grid_x(count), kPickThreads, 0, l, s, pass);
  }
  launch(what, gather_kernel, grid, kThreads, 0, l, s);
  if (a.k <= kSorted) {
    const int k = static_cast<int>(a.k);
    merge_lists(Merge{w.keys, count, 1, k, k, false, k, k, smaller_better, scores, ids}, what, l);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    size_t bytes = w.sort_bytes;
    check(cub::DeviceRadixSort::SortKeysDescending(w.sort, bytes, w.keys + i * a.k, w.sorted, a.k, 0, 64, stream_of(l)),
          what);
    launch(what, write_kernel, grid_x(div_up(a.k, kThreads)), kThreads, 0, l, w.sorted, a.k, smaller_better,
           scores + i * a.k, ids + i * a.k);
  }
}

}  // namespace cuda
}  // namespace lutra
