// What the CUDA scans of inverted lists share; the convention of lists is in lists.h.
//
// A probe is a pair of a query and one of its lists. A list is cut into stretches of rows, so that a long one keeps
// many blocks busy; block (i, s) scans stretch s of the list of probe i and leaves its k best in place
// [i * stretches + s] of the workspace, and merge_lists finds each query's k best among these. Where a batch probes
// lists several times over, the probes are sorted by list first (radix sort on the device) and a block serves up to
// kGroup probes of one list, which share each load of its rows; the blocks of the others return at once. Nothing of
// this is read by the host: it knows the sizes of the lists from the index (`longest`, `typical`), and they decide no
// more than how the work is cut.
// k > 2048: stretches are so short that a block leaves all their rows, and these are sorted (long_lists.cu).
//
// The candidates of a block lie in shared memory. Positions and the filter are looked up for those only that pass the
// query's threshold, which a block does not find by trial: with a k of up to 128 it begins with the k-th largest of
// the threads' best scores of the first tile, for so many rows are at least as good. And in calls of more blocks than
// run at once, blocks leave their thresholds to those that come later. Which blocks do changes no result, only how much
// they look at. Fewer than 2^31 probes of a launch, positions below 2^31.
#pragma once
#include "common/select.cuh"
#include "scan/list_cuda.h"

namespace lutra {
namespace cuda {

constexpr int kListThreads = 256;   // of a block that serves one probe
constexpr int kGroupThreads = 128;  // of one that serves a group: smaller tiles, for lists are short
constexpr int kGroup = 8;           // probes of a list that a block serves
constexpr int kSeedK = 128;         // with a larger k a block begins without a threshold

struct ListScan {   // what a kernel gets
  ListsArgs lists;  // of the queries of this launch; scores, ids and bad are not used
  int stretches;
  int64_t stretch;  // rows, a multiple of 16
  // Sorted by list (kGroup probes a block), or null. Probes without a list have the key nlist.
  const uint32_t* sorted_lists;
  const int32_t* sorted_probes;
  const int32_t* first;  // (nlist + 2,) where the probes of each list begin
  int best, capacity;
  float sign;    // -1 where smaller is better
  int run;       // probes of a query that a block scans one after another
  int64_t runs;  // of a query; nprobe where run is 1
  Key* keys;     // [queries * runs][stretches][best]
  Key* bars;     // [queries] keys that `best` others reach, or 0; null where no blocks come later
};

// ---- host side
struct ListScanPlan {
  bool grouped, repeated, barred;
  int best, capacity, stretches, run;
  int64_t stretch, runs, queries;  // queries of a launch
  int64_t wanted;                  // of a query; best: of a block
};

struct ListScanShape {
  int64_t tile;         // rows that a block scans at a time
  int64_t group_tile;   // and one that serves a group; 0: the kernel has no such form
  size_t shared_alone;  // shared memory besides the selection, for one probe
  int most_run;         // probes of a query that a block may scan one after another
};

inline size_t list_select_bytes(int probes, int threads, int best, int capacity) {
  return Selector::bytes(probes, best, threads / 32) +
         (best <= kShortK ? 0 : static_cast<size_t>(probes) * capacity * sizeof(Key)) +
         (best <= kSeedK ? static_cast<size_t>(probes) * threads * sizeof(uint32_t) : 0);
}

// Keys of a query that are looked for. A position that is in two lists has two of them, unless their scores are equal.
inline int64_t list_wanted(const ListsArgs& a, const ListSizes& sizes) {
  const int64_t most = sizes.repeated ? 2 * a.npositions : a.npositions;
  return a.k < most ? a.k : most;
}

ListScanPlan plan_list_scan(const ListsArgs&, const ListSizes&, const ListScanShape&, int device);
int64_t list_scan_bytes(const ListScanPlan&, const ListsArgs&);

// scan(ListScan, first query of the launch, grid) for each part of the queries, between sorting and merging.
struct ListScanCall {
  void* context;
  void (*scan)(void* context, const ListScan&, int64_t first_query, dim3 grid);
};
void run_list_scan(const ListsArgs&, const ListScanPlan&, const char* what, const Launch&, const ListScanCall&);

template <class F>
void each_list_scan(const ListsArgs& a, const ListScanPlan& p, const char* what, const Launch& l, F f) {
  run_list_scan(a, p, what, l, {&f, [](void* context, const ListScan& s, int64_t first, dim3 grid) {
                                  (*static_cast<F*>(context))(s, first, grid);
                                }});
}

// ---- device side: what a block has to do
struct ListWork {
  int64_t list;        // -1: none
  int64_t begin, end;  // rows of the arena
  int probes;          // that it serves; 0: the block leaves
  int64_t head;        // where they stand among the sorted ones
};

// The block's stretch of a list, as rows of the arena; none where there is no such list.
__device__ __forceinline__ void list_stretch(const ListScan& a, int64_t list, int64_t* first, int64_t* last) {
  *first = *last = 0;
  if (list < 0 || list >= a.lists.nlist) return;
  const int64_t begin = a.lists.list_begin[list], rows = a.lists.list_rows[list];
  // A list that leaves the arena is damaged: it has no rows.
  if (begin < 0 || begin % 16 || rows < 0 || begin > a.lists.arena_rows || rows > a.lists.arena_rows - begin) return;
  const int64_t from = blockIdx.y * a.stretch;
  int64_t to = from + a.stretch;
  if (to > rows || static_cast<int>(blockIdx.y) == a.stretches - 1) to = rows;
  if (from < to) *first = begin + from, *last = begin + to;
}

template <int Q>
__device__ __forceinline__ ListWork list_work(const ListScan& a) {
  ListWork w;
  const int64_t i = blockIdx.x;
  w.head = i;
  w.probes = 1;
  if (Q == 1) {
    w.list = a.lists.probes[i];
  } else {
    w.list = a.sorted_lists[i];
    const int64_t from = a.first[w.list], to = a.first[w.list + 1];
    const int64_t rest = to - i;
    w.probes = (i - from) % Q ? 0 : static_cast<int>(rest < Q ? rest : Q);
  }
  if (w.list < 0 || w.list >= a.lists.nlist) w.list = -1;
  list_stretch(a, w.list, &w.begin, &w.end);
  return w;
}

// The probe (query of the launch * nprobe + place) that is number i of the block.
template <int Q>
__device__ __forceinline__ int64_t list_probe(const ListScan& a, const ListWork& w, int i) {
  return Q == 1 ? w.head : a.sorted_probes[w.head + i];
}

// A block's candidates and thresholds; THREADS are in the block.
template <int Q, int THREADS>
struct ListSelection {
  Selector select;
  uint32_t* best_of_threads;  // [Q][THREADS] where best <= kSeedK

  // Lays them out from `shared` on; the caller's barrier follows.
  __device__ __forceinline__ void start(void* shared, const ListScan& a, const ListWork& w) {
    auto* near = static_cast<Key*>(shared);
    void* own = a.best <= kShortK ? near : near + static_cast<int64_t>(Q) * a.capacity;
    select.init(own, near, a.capacity, Q, a.capacity, a.best);
    best_of_threads = reinterpret_cast<uint32_t*>(static_cast<char*>(own) + Selector::bytes(Q, a.best, THREADS / 32));
    if (a.bars && threadIdx.x < w.probes) {  // the thread that has cleared them
      const int q = threadIdx.x;
      const Key bar = load_relaxed(a.bars + list_probe<Q>(a, w, q) / a.runs);
      if (bar) select.least[q] = bar, select.least_score[q] = key_score(bar);
    }
  }
};

__device__ __forceinline__ int64_t list_position(const ListScan& a, int64_t row) {  // -1: the row does not count
  const int64_t position = a.lists.positions ? a.lists.positions[row] : row;
  if (position < 0 || position >= a.lists.npositions) return -1;
  if (a.lists.keep && !(a.lists.keep[position >> 3] >> (position & 7) & 1)) return -1;
  return position;
}

// The first thresholds, from the scores of the first tile. Arguments as below.
template <int Q, int V, int STEP, int THREADS>
__device__ __forceinline__ void seed_thresholds(const ListScan& a, const ListWork& w, ListSelection<Q, THREADS>& s,
                                                const float (&scores)[Q][V], int64_t row, unsigned pending) {
  bool open = false;
#pragma unroll
  for (int q = 0; q < Q; ++q) open |= q < w.probes && s.select.least[q] == 0;
  if (!open) return;  // the whole block
  unsigned counts = 0;
#pragma unroll
  for (int v = 0; v < V; ++v)
    if ((pending >> v & 1) && list_position(a, row + v * STEP) >= 0) counts |= 1u << v;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    uint32_t best = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const uint32_t bits = counts >> v & 1 ? ordered_bits(scores[q][v]) : 0;
      best = bits > best ? bits : best;
    }
    s.best_of_threads[q * THREADS + threadIdx.x] = best;
  }
  __syncthreads();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int q = warp; q < w.probes; q += THREADS / 32) {
    uint32_t value[THREADS / 32];
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) value[i] = s.best_of_threads[q * THREADS + i * 32 + lane];
    uint32_t bar = 0;  // the largest that `best` threads reach, but for its last digits
#pragma unroll 1
    for (int bit = 31; bit >= 10; --bit) {
      const uint32_t trial = bar | 1u << bit;
      unsigned count = 0;
#pragma unroll
      for (int i = 0; i < THREADS / 32; ++i) count += value[i] >= trial;
      if (static_cast<int>(__reduce_add_sync(kFullWarp, count)) >= a.best) bar = trial;
    }
    const Key key = static_cast<Key>(bar) << 32;  // below every candidate of this score
    if (lane == 0 && key > s.select.least[q]) s.select.least[q] = key, s.select.least_score[q] = from_ordered_bits(bar);
  }
  __syncthreads();
}

// Offers the scores of V rows for Q probes; scores[q][v] of row `row` + v STEP, where bit q * V + v of `pending` is
// set. All threads of the block call it, and the block's threads wait for one another. `first`: of the block's first
// tile.
template <int Q, int V, int STEP, int THREADS>
__device__ __forceinline__ void offer_list_rows(const ListScan& a, const ListWork& w, ListSelection<Q, THREADS>& s,
                                                const float (&scores)[Q][V], int64_t row, unsigned pending,
                                                bool first) {
  static_assert(Q * V <= 32, "one bit for each score");
  Selector& select = s.select;
  if (first && a.best <= kSeedK) seed_thresholds<Q, V, STEP, THREADS>(a, w, s, scores, row, pending);
  for (;;) {
    unsigned refused = 0;
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const float bar = select.least_score[q];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (!(pending >> (q * V + v) & 1) || scores[q][v] < bar) continue;
        const int64_t position = list_position(a, row + v * STEP);
        if (position < 0) continue;
        if (!select.add(q, scores[q][v], static_cast<uint32_t>(position))) refused |= 1u << (q * V + v);
      }
    }
    if (!__syncthreads_or(refused != 0)) break;
    select.compact(false);
    __syncthreads();
    pending = refused;
  }
}

// The end of the block: each probe's best to its place, the rest of the place 0.
template <int Q, int THREADS>
__device__ __forceinline__ void finish_list_selection(const ListScan& a, const ListWork& w,
                                                      ListSelection<Q, THREADS>& s) {
  Selector& select = s.select;
  __syncthreads();
  select.compact(true);
  __syncthreads();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int q = warp; q < w.probes; q += THREADS / 32) {
    const int64_t probe = list_probe<Q>(a, w, q);
    Key* to = a.keys + (probe * a.stretches + blockIdx.y) * a.best;
    const Key* from = select.lists + q * select.pitch;
    const int count = select.counts[q];
    for (int i = lane; i < a.best; i += 32) to[i] = i < count ? from[i] : 0;
    if (a.bars && lane == 0 && select.least[q]) atomicMax(a.bars + probe / a.runs, select.least[q]);
  }
}

}  // namespace cuda
}  // namespace lutra
