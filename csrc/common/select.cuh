// The k best of a stream of scores, inside the kernel that computes them.
//
// A candidate is one 64-bit key: the score in the upper half, mapped to an unsigned integer that grows with it
// (the sign bit and, below zero, all others flipped; NaN above everything), and ~id in the lower half. Keys of one
// query are all different, a larger key is a better candidate, and equal scores go to the lower id: the k largest keys
// are the answer whatever the order in which blocks and threads found them. Scores for which smaller is better are
// negated first. ids < 2^32 - 1; the key 0 is below every candidate and marks an empty place.
//
// A block keeps, for each of its queries, a list of `capacity` keys of which the k best so far are always part,
// and the k-th best key as of the last compaction, the threshold. A thread with a score above the threshold
// takes a place in the list with an atomic counter in shared memory. Whoever finds no place waits until the block has
// compacted the full lists to their k best (which raises the thresholds), and tries again. Short lists (k <= 16) lie in
// shared memory and are sorted by a warp in registers; long ones lie in the workspace and a warp finds their
// k-th largest key by its digits, base 256.
#pragma once
#include "common/device.cuh"

namespace lutra {
namespace cuda {

using Key = unsigned long long;

constexpr int kShortK = 16, kShortCapacity = 32;
constexpr int kMaxK = 2048;
constexpr int64_t kMaxRows = 0xfffffffe;  // ids have 32 bits in a key

__device__ __forceinline__ uint32_t ordered_bits(float s) {
  const uint32_t u = __float_as_uint(s + 0.0f);  // -0 and +0 are equal
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
constexpr uint32_t kLowestBar = 0x007fffffu;  // ordered_bits of -infinity: every score reaches it
__device__ __forceinline__ float from_ordered_bits(uint32_t o) {
  if (o == 0xffffffffu) return quiet_nan();
  return __uint_as_float(o & 0x80000000u ? o & 0x7fffffffu : ~o);
}
__device__ __forceinline__ Key make_key(float score, uint32_t id) {
  return static_cast<Key>(ordered_bits(score)) << 32 | static_cast<uint32_t>(~id);
}
__device__ __forceinline__ float key_score(Key k) { return from_ordered_bits(static_cast<uint32_t>(k >> 32)); }
__device__ __forceinline__ int64_t key_id(Key k) {  // -1 for an empty place and for an id that is none
  const uint32_t id = ~static_cast<uint32_t>(k);
  return id == 0xffffffffu ? -1 : static_cast<int64_t>(id);
}

// Room for the lists. capacity * 8 bytes a query; k places beyond the k best at least.
inline int list_capacity(int64_t k) {
  if (k <= kShortK) return kShortCapacity;
  return static_cast<int>(round_up(k + (k > 128 ? k : 128), 32));
}

// The 32 keys of a warp, sorted, largest in lane 0.
__device__ __forceinline__ Key warp_sort(Key key) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int size = 2; size <= 32; size <<= 1) {
#pragma unroll
    for (int stride = size >> 1; stride > 0; stride >>= 1) {
      const Key other = __shfl_xor_sync(kFullWarp, key, stride);
      const bool lower = (lane & stride) == 0, descending = (lane & size) == 0;
      // The lane of the pair that comes first keeps the larger key in a descending stretch.
      key = (lower == descending) == (key > other) ? key : other;
    }
  }
  return key;
}

// Leaves the k largest of list[0..count) in list[0..k), in any order, and returns the smallest of them. One warp;
// the keys are different; 0 < k <= count. `bins` has 256 places in shared memory, the warp's own.
__device__ inline Key warp_keep_best(Key* list, int count, int k, int* bins) {
  const int lane = threadIdx.x & 31;
  const Key first = list[0];
  Key differ = 0;
  for (int i = lane; i < count; i += 32) differ |= list[i] ^ first;
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) differ |= __shfl_xor_sync(kFullWarp, differ, s);
  Key cut = first;  // becomes a bound with exactly k keys at or above it
  if (differ) {
    int shift = (63 - __clzll(static_cast<long long>(differ))) / 8 * 8;  // the highest digit that is not common to all
    Key mask = shift == 56 ? 0 : ~static_cast<Key>(0) << (shift + 8);
    Key prefix = first & mask;
    int wanted = k;  // of the keys with this prefix
    for (;; shift -= 8) {
      for (int b = lane; b < 256; b += 32) bins[b] = 0;
      __syncwarp();
      for (int i = lane; i < count; i += 32) {
        const Key key = list[i];
        if ((key & mask) == prefix) atomicAdd(&bins[static_cast<int>(key >> shift) & 255], 1);
      }
      __syncwarp();
      int own = 0;  // lane l has the digits 8 l to 8 l + 7
#pragma unroll
      for (int b = 0; b < 8; ++b) own += bins[lane * 8 + b];
      int from_here = own;  // keys with this lane's digits or higher ones
#pragma unroll
      for (int s = 1; s < 32; s <<= 1) {
        const int v = __shfl_down_sync(kFullWarp, from_here, s);
        if (lane + s < 32) from_here += v;
      }
      const bool mine = from_here >= wanted && from_here - own < wanted;
      int digit = 0, above = from_here - own, inside = 0;
      if (mine) {
        for (int b = 7; b >= 0; --b) {
          inside = bins[lane * 8 + b];
          digit = lane * 8 + b;
          if (above + inside >= wanted) break;
          above += inside;
        }
      }
      const int source = __ffs(static_cast<int>(__ballot_sync(kFullWarp, mine))) - 1;
      digit = __shfl_sync(kFullWarp, digit, source);
      above = __shfl_sync(kFullWarp, above, source);
      inside = __shfl_sync(kFullWarp, inside, source);
      wanted -= above;
      prefix |= static_cast<Key>(digit) << shift;
      mask |= static_cast<Key>(255) << shift;
      if (inside == wanted || shift == 0) break;
      __syncwarp();
    }
    cut = prefix;
  }
  int kept = 0;
  Key smallest = ~static_cast<Key>(0);
  for (int i0 = 0; i0 < count; i0 += 32) {
    const Key key = i0 + lane < count ? list[i0 + lane] : 0;
    const bool keep = i0 + lane < count && key >= cut;
    const unsigned votes = __ballot_sync(kFullWarp, keep);
    __syncwarp();  // every lane has read before any writes
    if (keep) {
      list[kept + __popc(votes & ((1u << lane) - 1))] = key;
      smallest = key < smallest ? key : smallest;
    }
    kept += __popc(votes);
  }
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) {
    const Key other = __shfl_xor_sync(kFullWarp, smallest, s);
    smallest = other < smallest ? other : smallest;
  }
  __syncwarp();
  return smallest;
}

// The lists of one block of kThreads threads and `queries` queries, and their thresholds.
struct Selector {
  Key* lists;          // [queries][capacity], in shared memory (k <= kShortK) or in the workspace
  Key* least;          // [queries] the threshold, 0 at first; shared memory, as the rest
  float* least_score;  // [queries] its score; NaN at first, which lets every score pass to the test of the keys
  int* counts;         // [queries] places taken; more than capacity means that the list is full
  int* bins;           // [warps][256] where k > kShortK
  int64_t pitch;       // from one query's list to the next
  int queries, capacity, k;

  static __host__ __device__ size_t bytes(int queries, int k, int warps) {
    return static_cast<size_t>(queries) * (k <= kShortK ? 16 + 8 * kShortCapacity : 16) +
           (k <= kShortK ? 0 : warps * 1024);
  }

  // Lays the arrays out, at fixed places but for the last from `shared` (8-byte aligned). `far` (and its pitch) are the
  // lists where they do not fit.
  __device__ __forceinline__ void init(void* shared, Key* far, int64_t far_pitch, int queries_, int capacity_, int k_) {
    queries = queries_;
    capacity = capacity_;
    k = k_;
    least = static_cast<Key*>(shared);
    least_score = reinterpret_cast<float*>(least + queries);
    counts = reinterpret_cast<int*>(least_score + queries);
    bins = counts + queries;
    lists = k <= kShortK ? reinterpret_cast<Key*>(bins) : far;
    pitch = k <= kShortK ? kShortCapacity : far_pitch;
    for (int q = threadIdx.x; q < queries; q += blockDim.x) {
      least[q] = 0;
      least_score[q] = quiet_nan();
      counts[q] = 0;
    }
  }

  // Tries to add a candidate; false where the list of q is full.
  __device__ __forceinline__ bool add(int q, float score, uint32_t id) {
    const Key key = make_key(score, id);
    if (key <= least[q]) return true;
    const int place = atomicAdd(&counts[q], 1);
    if (place >= capacity) return false;
    lists[q * pitch + place] = key;
    return true;
  }

  // Reduces each full list to its k best; the caller's barriers lie before and after. With `last`, every list. Number:
  // the type in which the thread's number is taken, by which ptxas keeps more or less of what follows from it in
  // registers during the caller's loop; the kernels have none to spare (tests/test_cuda_registers.py).
  template <class Number = unsigned>
  __device__ __forceinline__ void compact(bool last) {
    const Number thread = threadIdx.x;
    const int warp = thread >> 5, lane = thread & 31, warps = blockDim.x >> 5;
    for (int q = warp; q < queries; q += warps) {
      const int taken = counts[q];
      if (taken < capacity && !(last && taken > 0)) continue;
      const int count = taken < capacity ? taken : capacity;
      Key* list = lists + q * pitch;
      Key smallest = 0;
      int left = count;
      if (k <= kShortK) {
        const Key key = warp_sort(lane < count ? list[lane] : 0);
        list[lane] = key;
        left = count < k ? count : k;
        smallest = __shfl_sync(kFullWarp, key, k - 1);
        __syncwarp();
      } else if (count > k) {
        smallest = warp_keep_best(list, count, k, bins + warp * 256);
        left = k;
      }
      __syncwarp();  // every lane has read the count
      if (lane == 0) {
        counts[q] = left;
        if (left == k && smallest) least[q] = smallest, least_score[q] = key_score(smallest);
      }
    }
  }
  // The end of a block's work: writes the `k` best of each query < valid to out[q * out_pitch], padded with 0.
  // Lists in the workspace are already there.
  __device__ __forceinline__ void finish(Key* out, int64_t out_pitch, int64_t valid) {
    __syncthreads();
    compact<int>(true);
    __syncthreads();
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    for (int q = warp; q < queries && q < valid; q += warps) {
      const int count = counts[q];
      if (k <= kShortK) {
        if (lane < k) out[q * out_pitch + lane] = lane < count ? lists[q * pitch + lane] : 0;
      } else {
        for (int i = count + lane; i < k; i += 32) lists[q * pitch + i] = 0;
      }
    }
  }
};

// ---- how a scan is cut: `groups` blocks side by side for the queries, `parts` stretches of the collection

inline int parts_for(int64_t groups, int64_t tiles, int64_t slots, int64_t least_tiles) {
  // Fill the machine once where that needs four parts or more; else aim at four rounds, so that the last one
  // leaves little of it idle.
  int64_t parts = groups * 4 <= slots ? slots / groups : 4 * slots / groups;
  const int64_t most = tiles / least_tiles;
  parts = parts > most ? most : parts;
  parts = parts > 65535 ? 65535 : parts;
  return static_cast<int>(parts < 1 ? 1 : parts);
}

// Where the lists of a scan lie in the workspace and how many queries are served by one launch.
struct ListPlan {
  int best;  // min(k, n)
  int capacity;
  int64_t stride;  // places per list in the workspace
  int parts;
  int64_t tiles_per_part;
  int64_t queries;  // per launch
  int64_t bytes() const { return queries * parts * stride * static_cast<int64_t>(sizeof(Key)); }
};

// ---- the second launch: one list of k out of the blocks' lists

struct Merge {
  const Key* lists;  // [queries][parts][stride], of each list the first `per_part` places; 0 is empty
  int64_t queries;
  int parts, per_part;
  int64_t stride;
  bool drop_duplicates;  // equal keys count once
  int best, k;           // best = min(k, n) are looked for, the rest of k is padded
  bool smaller_better;   // l2: scores were negated
  float* scores;         // [queries][k]
  int64_t* ids;
  const int* done = nullptr;  // [queries], or null: where it is not 0 nothing is read or written
  // Some queries only, where count is given: lists 0 to *count - 1 are those of the queries which[i], whose results
  // they replace.
  const int* which = nullptr;
  const int* count = nullptr;
  void* scratch = nullptr;  // where best is above kMaxK: long_lists_bytes()
};
void merge_lists(const Merge& m, const char* what, const Launch& l);

// The same for any k, by sorting the lists (scan/long_lists.cu); merge_lists calls it where there is scratch memory.
int64_t long_lists_bytes(int64_t queries, int64_t total);  // total: keys of a query
void long_lists(const Merge& m, const char* what, const Launch& l);
inline bool is_long(int64_t k, int64_t total) { return k > kMaxK && total > kMaxK; }

}  // namespace cuda
}  // namespace lutra
