// Merges the lists that the blocks of a scan leave, sorts the k best and writes scores and ids.
//
// Few keys (32 at most: one or two lists of small k): a warp per query sorts them in registers. More: a block per
// query sorts 8192 at a time (bitonic, in shared memory), keeps the best and goes on with the next, passing over keys
// that are below the k-th best. Equal keys, the same candidate given twice, are neighbours after sorting.
//
// Overflow: at most 8192 places are sorted at a time; places in memory are counted in 64 bits.
#include "common/select.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kRoom = 8192;

__device__ __forceinline__ void write_result(const Merge& m, int64_t query, int place, Key key) {
  const int64_t at = query * m.k + place;
  const float infinity = __int_as_float(0x7f800000);
  float score = m.smaller_better ? infinity : -infinity;
  if (key) score = m.smaller_better ? 0.0f - key_score(key) : key_score(key);
  m.scores[at] = score;
  m.ids[at] = key ? key_id(key) : -1;
}

__global__ void __launch_bounds__(256) warp_merge_kernel(Merge m) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
  const int lane = threadIdx.x & 31;
  if (query >= m.queries) return;
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

}  // namespace

void merge_lists(const Merge& m, const char* what, const Launch& l) {
  const int64_t total = static_cast<int64_t>(m.parts) * m.per_part;
  if (total <= 32) {
    Merge small = m;
    if (small.per_part < 1) small.per_part = 1, small.parts = 0;  // nothing to merge: all padding
    launch(what, warp_merge_kernel, grid_x(div_up(m.queries, 8)), 256, 0, l, small);
    return;
  }
  const int room = power_of_two(total < 2 * m.best ? 2 * m.best : total, kRoom);
  const int threads = room >= 2048 ? 1024 : 256;
  launch(what, block_merge_kernel, grid_x(m.queries), threads, static_cast<size_t>(room) * sizeof(Key), l, m, room);
}

}  // namespace cuda
}  // namespace lutra
