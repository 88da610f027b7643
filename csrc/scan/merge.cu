// Merges the lists that the blocks of a scan leave, sorts the k best and writes scores and ids.
//
// Few keys (32 at most: one or two lists of small k): a warp per query sorts them in registers. Many, but few of them
// wanted (16 at most): the warps of a block keep the 16 best of theirs in registers, and meet two by two. Else, up to
// 1024 keys: a block per query sorts them (bitonic, in shared memory). More: a block finds the k-th largest digit by
// digit, by counting (radix selection; 11 bits a pass from the highest bit in which keys differ, so that the first pass
// already spreads them over the bins), and sorts only the k that reach it. Where equal keys, the same candidate given
// twice, count once, they must be neighbours: then a block sorts 8192 at a time, keeps the best and goes on with the
// next.
//
// Overflow: at most 8192 places are sorted at a time; places in memory are counted in 64 bits, keys of a query in 32
// (parts <= 65535 and k <= 2048: fewer than 2^27).
#include "common/select.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kRoom = 8192;
constexpr int kAhead = 4;  // loads of a thread that are on their way at a time, where little is done with a key

__device__ __forceinline__ void write_result(const Merge& m, int64_t query, int place, Key key) {
  const int64_t at = (m.which ? m.which[query] : query) * m.k + place;
  const float infinity = __int_as_float(0x7f800000);
  float score = m.smaller_better ? infinity : -infinity;
  if (key) score = m.smaller_better ? 0.0f - key_score(key) : key_score(key);
  m.scores[at] = score;
  m.ids[at] = key ? key_id(key) : -1;
}

__global__ void __launch_bounds__(256) warp_merge_kernel(Merge m) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
  const int lane = threadIdx.x & 31;
  if (query >= (m.count ? *m.count : m.queries) || (m.done && m.done[query])) return;
  const int part = lane / m.per_part, i = lane - part * m.per_part;
  Key key = part < m.parts ? m.lists[(query * m.parts + part) * m.stride + i] : 0;
  key = warp_sort(key);
  if (m.drop_duplicates) {
    const Key before = __shfl_up_sync(kFullWarp, key, 1);
    key = warp_sort(lane > 0 && key == before ? 0 : key);
  }
  if (lane < m.best) write_result(m, query, lane, key);
  for (int i2 = m.best + lane; i2 < m.k; i2 += 32) write_result(m, query, i2, 0);
}

// Sorts keys[0..size), size a power of two, largest first.
__device__ void block_sort(Key* keys, int size) {
  for (int span = 2; span <= size; span <<= 1) {
    for (int stride = span >> 1; stride > 0; stride >>= 1) {
      __syncthreads();
      for (int t = threadIdx.x; t < size / 2; t += blockDim.x) {
        const int i = 2 * t - (t & (stride - 1));
        const Key a = keys[i], b = keys[i + stride];
        if ((a < b) == ((i & span) == 0)) keys[i] = b, keys[i + stride] = a;
      }
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(1024) block_merge_kernel(Merge m, int room) {
  Key* keys = dynamic_shared<Key>();
  const int64_t query = blockIdx.x;
  if ((m.count && query >= *m.count) || (m.done && m.done[query])) return;
  const Key* lists = m.lists + query * m.parts * m.stride;
  const int64_t total = static_cast<int64_t>(m.parts) * m.per_part;
  int held = 0;  // places [0, held) hold the best so far, sorted
  for (int64_t done = 0; done < total;) {
    const int64_t rest = total - done;
    const int fresh = static_cast<int>(rest < room - held ? rest : room - held);
    int size = 2;
    while (size < held + fresh) size <<= 1;
    for (int i = held + threadIdx.x; i < size; i += blockDim.x) {
      Key key = 0;
      if (i < held + fresh) {
        const int64_t at = done + i - held, part = at / m.per_part;
        key = lists[part * m.stride + (at - part * m.per_part)];
      }
      keys[i] = key;
    }
    block_sort(keys, size);
    if (m.drop_duplicates) {
      unsigned equal = 0;  // one bit for each of a thread's places, at most 8192 / 256
      int bit = 0;
      for (int i = threadIdx.x; i < size; i += blockDim.x, ++bit)
        if (i > 0 && keys[i] && keys[i] == keys[i - 1]) equal |= 1u << bit;
      if (__syncthreads_or(equal != 0)) {
        bit = 0;
        for (int i = threadIdx.x; i < size; i += blockDim.x, ++bit)
          if (equal >> bit & 1) keys[i] = 0;
        block_sort(keys, size);
      }
    }
    done += fresh;
    held = held + fresh < m.best ? held + fresh : m.best;
  }
  for (int i = threadIdx.x; i < m.k; i += blockDim.x) write_result(m, query, i, i < held ? keys[i] : 0);
}

// The 16 largest of two lists of 16, largest first: `mine` in lanes 0 to 15 and again in 16 to 31, as the result is,
// and `theirs` in the reverse order.
__device__ __forceinline__ Key best_of_two(Key mine, Key theirs) {
  const int lane = threadIdx.x & 31;
  mine = theirs > mine ? theirs : mine;
#pragma unroll
  for (int stride = 8; stride > 0; stride >>= 1) {
    const Key other = __shfl_xor_sync(kFullWarp, mine, stride);
    mine = ((lane & stride) == 0) == (mine > other) ? mine : other;
  }
  return mine;
}

// best <= 16; the keys are different, but for 0. Warps keep the 16 best of theirs, then meet two by two.
__global__ void __launch_bounds__(1024, 1) short_merge_kernel(Merge m) {
  __shared__ Key best[32][16];
  const int64_t query = blockIdx.x;
  if ((m.count && query >= *m.count) || (m.done && m.done[query])) return;
  const Key* lists = m.lists + query * m.parts * m.stride;
  const int64_t total = static_cast<int64_t>(m.parts) * m.per_part;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const bool dense = m.stride == m.per_part;  // as list scans have them
  const int64_t step = blockDim.x;
  Key mine = 0, bar = 0;
  for (int64_t first = warp * 32; first < total; first += step * kAhead) {
    Key fresh[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t at = first + u * step + lane;
      fresh[u] = 0;
      if (at >= total) continue;
      const unsigned part = dense ? 0 : static_cast<unsigned>(at) / static_cast<unsigned>(m.per_part);
      fresh[u] = lists[at + part * (m.stride - m.per_part)];
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (!__any_sync(kFullWarp, fresh[u] > bar)) continue;
      const Key key = warp_sort(fresh[u]);
      mine = best_of_two(mine, __shfl_sync(kFullWarp, key, 15 - (lane & 15)));
      bar = __shfl_sync(kFullWarp, mine, 15);
    }
  }
  if (lane < 16) best[warp][lane] = mine;
  for (int half = blockDim.x / 64; half > 0; half >>= 1) {
    __syncthreads();
    if (warp < half) {
      mine = best_of_two(mine, best[warp + half][15 - (lane & 15)]);
      if (lane < 16) best[warp][lane] = mine;  // which no other warp reads before the next barrier
    }
  }
  if (warp > 0) return;
  if (lane < m.best) write_result(m, query, lane, mine);
  for (int i = m.best + lane; i < m.k; i += 32) write_result(m, query, i, 0);
}

constexpr int kSelectThreads = 1024;
constexpr int kBins = 2048;

// Of the bins [0, kBins): the one in which the `wanted`-th largest lies, how many lie above it and inside. One warp. A
// lane's bins are added up from another one on in each lane, so that the lanes read different banks.
__device__ __forceinline__ void find_bin(const int* bins, int wanted, int* digit, int* above, int* inside) {
  constexpr int kOwn = kBins / 32;
  const int lane = threadIdx.x & 31;
  int own = 0;
#pragma unroll 16  // all of them would not fit into the registers
  for (int b = 0; b < kOwn; ++b) own += bins[lane * kOwn + ((b + lane) & (kOwn - 1))];
  int from_here = own;  // keys in this lane's bins or higher ones
#pragma unroll
  for (int s = 1; s < 32; s <<= 1) {
    const int v = __shfl_down_sync(kFullWarp, from_here, s);
    if (lane + s < 32) from_here += v;
  }
  if (from_here < wanted || from_here - own >= wanted) return;
  int higher = from_here - own;
#pragma unroll 8
  for (int b = kOwn - 1; b >= 0; --b) {
    const int here = bins[lane * kOwn + b];
    if (higher + here >= wanted) {
      *digit = lane * kOwn + b, *above = higher, *inside = here;
      return;
    }
    higher += here;
  }
}

// Dynamic shared memory: `room` keys, room a power of two >= best. The keys are different, but for 0, no key.
__global__ void __launch_bounds__(kSelectThreads, 1) block_select_kernel(Merge m, int room) {
  __shared__ int bins[kBins];
  __shared__ Key differ_of[kSelectThreads / 32], some_of[kSelectThreads / 32];
  __shared__ int digit, above, inside, taken, present;
  Key* keys = dynamic_shared<Key>();
  const int64_t query = blockIdx.x;
  if ((m.count && query >= *m.count) || (m.done && m.done[query])) return;
  const Key* lists = m.lists + query * m.parts * m.stride;
  const int total = m.parts * m.per_part;
  const auto each = [&](auto f) {
    for (int at = threadIdx.x; at < total; at += kSelectThreads) {
      const int part = at / m.per_part;
      const Key key = lists[part * m.stride + (at - part * m.per_part)];
      if (key) f(key);
    }
  };

  // The bits in which keys differ, and how many keys there are.
  if (threadIdx.x == 0) taken = 0, present = 0;
  Key some = 0, differ = 0;
  int mine = 0;
  each([&](Key key) {
    if (!some) some = key;
    differ |= key ^ some;
    ++mine;
  });
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) {
    const Key other = __shfl_xor_sync(kFullWarp, some, s);
    differ |= __shfl_xor_sync(kFullWarp, differ, s);
    if (some && other) differ |= some ^ other;
    if (!some) some = other;
    mine += __shfl_xor_sync(kFullWarp, mine, s);
  }
  __syncthreads();
  if ((threadIdx.x & 31) == 0) {
    differ_of[threadIdx.x >> 5] = differ, some_of[threadIdx.x >> 5] = some;
    if (mine) atomicAdd(&present, mine);
  }
  __syncthreads();
  some = 0, differ = 0;
#pragma unroll 4
  for (int w = 0; w < kSelectThreads / 32; ++w) {
    const Key other = some_of[w];
    differ |= differ_of[w];
    if (some && other) differ |= some ^ other;
    if (!some) some = other;
  }

  // The largest bound that `best` keys reach; 1, which every key does, where there are no more.
  Key least = 1;
  if (present > m.best) {
    int top = 64 - __clzll(static_cast<long long>(differ));  // bits [0, top) are still open
    Key prefix = top < 64 ? some >> top << top : 0;
    int wanted = m.best;
    for (;;) {
      const int low = top > 11 ? top - 11 : 0, width = top - low;
      const Key closed = top < 64 ? ~static_cast<Key>(0) << top : 0;
      for (int b = threadIdx.x; b < kBins; b += kSelectThreads) bins[b] = 0;
      __syncthreads();
      each([&](Key key) {
        if ((key & closed) == prefix) atomicAdd(&bins[static_cast<int>(key >> low) & ((1 << width) - 1)], 1);
      });
      __syncthreads();
      if (threadIdx.x < 32) find_bin(bins, wanted, &digit, &above, &inside);
      __syncthreads();
      wanted -= above;
      prefix |= static_cast<Key>(digit) << low;
      top = low;
      if (inside == wanted || low == 0) break;
      __syncthreads();  // before the bins are cleared and the results written again
    }
    least = prefix;
  }
  each([&](Key key) {
    if (key < least) return;
    const int place = atomicAdd(&taken, 1);
    if (place < room) keys[place] = key;
  });
  __syncthreads();
  const int held = taken < room ? taken : room;
  for (int i = held + threadIdx.x; i < room; i += kSelectThreads) keys[i] = 0;
  block_sort(keys, room);  // in this order, whatever the order of the atomics
  for (int i = threadIdx.x; i < m.k; i += kSelectThreads) write_result(m, query, i, i < m.best ? keys[i] : 0);
}

}  // namespace

void merge_lists(const Merge& m, const char* what, const Launch& l) {
  if (m.scratch) return long_lists(m, what, l);
  const int64_t total = static_cast<int64_t>(m.parts) * m.per_part;
  if (total <= 32) {
    Merge small = m;
    if (small.per_part < 1) small.per_part = 1, small.parts = 0;  // nothing to merge: all padding
    launch(what, warp_merge_kernel, grid_x(div_up(m.queries, 8)), 256, 0, l, small);
    return;
  }
  if (!m.drop_duplicates && m.best <= 16)
    return launch(what, short_merge_kernel, grid_x(m.queries), total > 1024 ? 1024 : 256, 0, l, m);
  if (!m.drop_duplicates && total > 1024) {
    const int room = power_of_two(m.best < 2 ? 2 : m.best, kRoom);
    const size_t shared = static_cast<size_t>(room) * sizeof(Key);
    return launch(what, block_select_kernel, grid_x(m.queries), kSelectThreads, shared, l, m, room);
  }
  const int room = power_of_two(total < 2 * m.best ? 2 * m.best : total, kRoom);
  const int threads = room >= 2048 ? 1024 : 256;
  launch(what, block_merge_kernel, grid_x(m.queries), threads, static_cast<size_t>(room) * sizeof(Key), l, m, room);
}

}  // namespace cuda
}  // namespace lutra
