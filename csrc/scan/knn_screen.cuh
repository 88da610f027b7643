// What the two kernels that screen a collection by tensor cores share (knn_screen.cu, knn_screen_sm90.cu): the
// arguments, what belongs to a row, the selection. How the screen is used is in knn_screen.h.
//
// Queries are panels: tiles of 64 queries x 64 columns of bf16, in rows of 128 bytes with swizzled() pieces, in the
// order tile of 64 queries, term (the value rounded; what the rounding lost), slab of 64 columns. Rows of the
// collection become the same kind of tile in shared memory, one slab at a time.
//
// The score of a row is an upper bound of its exact score, in the scale of the inner product:
//   ip, l2:  reach * r0 + (product + r1), reach of the query, r0 = norm of the row, r1 = bias or -norm^2 / 2
//   cosine:  product * r0 + r1, r0 = 1 / norm
// A row that may not be found has r0 = -infinity (cosine: r1).
//
// Selection. A thread has the scores of 2 MT queries with a quarter of a tile's rows: the 4 threads of a group share
// them. Each pushes what exceeds the query's bar into its own quarter of the list that this warp keeps of the query for
// the rows of this block. A list that could overflow at the next tile is cut to its `keep` best and some more, whereby
// its bar rises; the bar goes to all blocks through memory: `keep` rows have scores at or above it, so that a row at or
// below it is not missed whatever the time at which a block hears of it. A score that is NaN always passes. The first
// bars come from a sample of the tiles, so that cuts are rare. For long lists (k above 128) there are only these bars,
// and what exceeds them is counted and written.
#pragma once
#include "common/mma.cuh"
#include "common/select.cuh"
#include "scan/knn_screen.h"

namespace lutra {
namespace cuda {

constexpr int kSlab = 64;                    // columns of a tile: 128 bytes of bf16
constexpr int kPanelBytes = 64 * kSlab * 2;  // 64 queries
constexpr int kPushes = 32;                  // of a thread, a tile and a query, at most

// ---- the threads' share of the selection
template <int MT>
struct Lane {
  float bar[2 * MT], reach[2 * MT];
  int count[2 * MT];
  Key* list;  // of the first query; the others' lie 8 and 64 queries on
};

__device__ __forceinline__ float bar_of(unsigned ordered) {
  return ordered == 0xffffffffu ? __int_as_float(0x7f800000) : from_ordered_bits(ordered);
}

template <int MT>
__device__ __forceinline__ int64_t query_offset(int i) {  // of a thread's i-th query from its first
  return (i >> 1) * 64 + (i & 1) * 8;
}

// Cuts one query's list (the 4 quarters of the lanes from `source` on) to at least `keep` and at most `most` keys.
// Returns how many are left; *bar is raised. All lanes of the warp call it with the same list.
__device__ __forceinline__ int cut_list(Key* list, int own_count, int source, int per_lane, int keep, int most,
                                        unsigned* bar) {
  const int lane = threadIdx.x & 31;
  const int count = __shfl_sync(kFullWarp, own_count, source + (lane & 3));
  const int rows = (per_lane + 7) / 8;
  const unsigned* scores = reinterpret_cast<const unsigned*>(list) + 1;  // the upper halves of the keys
  // How many keys f takes; read again each time, since the sums of a tile leave few registers.
  const auto count_of = [&](auto f) {
    int total = 0;
#pragma unroll 2
    for (int i = 0; i < rows; ++i) {
      const bool here = i * 8 + (lane >> 2) < count;
      total += __popc(__ballot_sync(kFullWarp, here && f(scores[2 * (i * 32 + lane)])));
    }
    return total;
  };
  unsigned highest = 0;
  for (int i = lane >> 2; i < count; i += 8) {
    const unsigned score = scores[2 * (i * 4 + (lane & 3))];
    highest = score > highest ? score : highest;
  }
  highest = __reduce_max_sync(kFullWarp, highest);
  const unsigned old = *bar;
  unsigned cut = old;  // keys at or above it are left; of those equal to it only `equal`
  int equal = 1 << 30, above = count_of([&](unsigned score) { return score >= old; });
  if (above > most) {
    const int top = 32 - __clz(static_cast<int>(highest ^ old));  // bits [0, top) are open
    cut = top < 32 ? highest >> top << top : 0;
    for (int bit = top - 1; bit >= 0 && above > most; --bit) {
      const unsigned trial = cut | 1u << bit;
      const int here = count_of([&](unsigned score) { return score >= trial; });
      if (here >= keep) cut = trial, above = here;
    }
    // many equal scores: any of them will do
    if (above > most) equal = keep - count_of([&](unsigned score) { return score > cut; });
  }
  int left = 0;
#pragma unroll 1
  for (int i = 0; i < rows; ++i) {
    const unsigned below = (1u << lane) - 1;
    Key key = 0;
    if (i * 8 + (lane >> 2) < count) key = list[i * 32 + lane];
    const unsigned score = static_cast<unsigned>(key >> 32);
    const bool same = key && score == cut;
    const unsigned equals = __ballot_sync(kFullWarp, same);
    const bool kept = score > cut || (same && __popc(equals & below) < equal);
    equal -= __popc(equals);
    const unsigned votes = __ballot_sync(kFullWarp, kept);
    __syncwarp();  // keys move to earlier places only: these have been read
    if (kept) list[left + __popc(votes & below)] = key;
    left += __popc(votes);
    __syncwarp();
  }
  *bar = cut > old ? cut : old;
  return left;
}

// Cuts those of the warp's lists that have no room for what a thread pushes next.
template <int MT>
__device__ __forceinline__ void make_room(const ScreenArgs& a, Lane<MT>& own, const unsigned (&mask)[2 * MT],
                                          unsigned* bars) {
  const int lane = threadIdx.x & 31, most = 4 * (a.lists.per_lane - kPushes) - 4;
  bool full = false;
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) full = full || own.count[i] + __popc(mask[i]) > a.lists.per_lane;
  if (!__any_sync(kFullWarp, full)) return;
#pragma unroll 1
  for (int i = 0; i < 2 * MT; ++i) {
    int count = own.count[0], more = __popc(mask[0]);
    float bar = own.bar[0];
#pragma unroll
    for (int j = 1; j < 2 * MT; ++j)
      if (i == j) count = own.count[j], more = __popc(mask[j]), bar = own.bar[j];
    unsigned lists = __ballot_sync(kFullWarp, count + more > a.lists.per_lane);
#pragma unroll 1
    while (lists) {
      const int source = (__ffs(static_cast<int>(lists)) - 1) & ~3;
      lists &= ~(15u << source);
      Key* mine = own.list + query_offset<MT>(i) * a.lists.pitch;
      Key* list = reinterpret_cast<Key*>(__shfl_sync(kFullWarp, reinterpret_cast<unsigned long long>(mine), source));
      unsigned cut = ordered_bits(__shfl_sync(kFullWarp, bar, source));
      const unsigned before = cut;
      const int left = cut_list(list, count, source, a.lists.per_lane, a.lists.keep, most, &cut);
      if ((lane & ~3) == source) {
        count = (left - (lane & 3) + 3) >> 2;
        bar = bar_of(cut);
        if (lane == source && cut > before) atomicMax(bars + query_offset<MT>(i), cut);
      }
    }
#pragma unroll
    for (int j = 0; j < 2 * MT; ++j)
      if (i == j) own.count[j] = count, own.bar[j] = bar;
  }
}

template <int MODE>
__device__ __forceinline__ float bounded_score(float product, float reach, float r0, float r1) {
  if (MODE == kScreenCosine) return fmaf(product, r0, r1);
  return fmaf(reach, r0, MODE == kScreenPlain ? product : product + r1);
}

template <int MODE, int MT, int BN>
__device__ __forceinline__ unsigned passing(const float (&acc)[MT][BN / 2], const float* r0, const float* r1,
                                            const Lane<MT>& own) {
  const int t = threadIdx.x & 3;
  bool any[2 * MT];
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) any[i] = false;
#pragma unroll
  for (int j = 0; j < BN / 8; ++j) {
    const float2 w = *reinterpret_cast<const float2*>(r0 + 8 * j + 2 * t);
    float2 v = make_float2(0, 0);
    if (MODE != kScreenPlain) v = *reinterpret_cast<const float2*>(r1 + 8 * j + 2 * t);
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      const float s0 = bounded_score<MODE>(acc[i >> 1][4 * j + 2 * (i & 1)], own.reach[i], w.x, v.x);
      const float s1 = bounded_score<MODE>(acc[i >> 1][4 * j + 2 * (i & 1) + 1], own.reach[i], w.y, v.y);
      any[i] |= !(s0 <= own.bar[i]);
      any[i] |= !(s1 <= own.bar[i]);
    }
  }
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) bits |= any[i] ? 1u << i : 0;
  return bits;
}

// As bounded_score of the mode, to the bit: without shifts r1 is 0.
__device__ __forceinline__ float any_score(bool cosine, float product, float reach, float r0, float r1) {
  return cosine ? fmaf(product, r0, r1) : fmaf(reach, r0, product + r1);
}

// Of a query that has more candidates than there is room for, no more are wanted: it goes through the exact pass. Its
// bar becomes infinite (a sample's never is), which a NaN score passes all the same: such a row is not counted, so that
// counts end near the capacity, and above it.
__device__ __forceinline__ void add_candidate(const ScreenLists& lists, int64_t query, uint32_t row) {
  if (load_relaxed(lists.bars + query) >= 0xff800000u) return;
  const int place = atomicAdd(lists.counts + query, 1);
  if (place < lists.capacity)
    lists.candidates[query * lists.capacity + place] = row;
  else
    atomicMax(lists.bars + query, 0xff800000u);  // infinity
}

// Pushes what passes of a warp's scores; `hit`: the thread's queries that have some.
template <int MT, int BN>
__device__ __forceinline__ void push(const float (&acc)[MT][BN / 2], const float* r0, const float* r1, uint32_t row0,
                                     const ScreenArgs& a, Lane<MT>& own, unsigned* bars, unsigned hit) {
  const int t = threadIdx.x & 3;
  const bool cosine = a.mode == kScreenCosine;
  unsigned mask[2 * MT];  // bit 2 j + e: column 8 j + 2 t + e
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) {
    mask[i] = 0;
    if (__any_sync(kFullWarp, hit >> i & 1)) {
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        const float2 w = *reinterpret_cast<const float2*>(r0 + 8 * j + 2 * t);
        const float2 v = *reinterpret_cast<const float2*>(r1 + 8 * j + 2 * t);
        const float s0 = any_score(cosine, acc[i >> 1][4 * j + 2 * (i & 1)], own.reach[i], w.x, v.x);
        const float s1 = any_score(cosine, acc[i >> 1][4 * j + 2 * (i & 1) + 1], own.reach[i], w.y, v.y);
        mask[i] |= s0 <= own.bar[i] ? 0 : 1u << (2 * j);
        mask[i] |= s1 <= own.bar[i] ? 0 : 2u << (2 * j);
      }
    }
  }
  const bool counted = MT == 1 && a.lists.counts;
  if (!counted) make_room<MT>(a, own, mask, bars);
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) {
    Key* to = own.list + query_offset<MT>(i) * a.lists.pitch + t;
    unsigned left = mask[i];
    while (left) {
      const int at = __ffs(static_cast<int>(left)) - 1, column = 4 * (at & ~1) + 2 * t + (at & 1);
      left &= left - 1;
      float product = 0;
#pragma unroll
      for (int j = 0; j < BN / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) product = at == 2 * j + e ? acc[i >> 1][4 * j + 2 * (i & 1) + e] : product;
      const float w = r0[column], v = r1[column];
      const float s = any_score(cosine, product, own.reach[i], w, v);
      const bool valid = (cosine ? v : w) != -__int_as_float(0x7f800000);
      if (s <= own.bar[i] || !valid) continue;
      if (!counted)
        to[4 * own.count[i]++] = make_key(s, row0 + column);
      else
        add_candidate(a.lists, bars - a.lists.bars + query_offset<MT>(i), row0 + column);
    }
  }
  __syncwarp();  // the next cut reads what other lanes wrote
}

// Of a sample of the tiles: only the largest score of each thread with each of its queries, for the first bars.
template <int MT, int BN>
__device__ __forceinline__ void largest(const float (&acc)[MT][BN / 2], const float* r0, const float* r1, float* to,
                                        const ScreenArgs& a, const Lane<MT>& own) {
  const int t = threadIdx.x & 3;
  const bool cosine = a.mode == kScreenCosine;
  float most[2 * MT];
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) most[i] = -__int_as_float(0x7f800000);
#pragma unroll
  for (int j = 0; j < BN / 8; ++j) {
    const float2 w = *reinterpret_cast<const float2*>(r0 + 8 * j + 2 * t);
    const float2 v = *reinterpret_cast<const float2*>(r1 + 8 * j + 2 * t);
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      most[i] = fmaxf(most[i], any_score(cosine, acc[i >> 1][4 * j + 2 * (i & 1)], own.reach[i], w.x, v.x));
      most[i] = fmaxf(most[i], any_score(cosine, acc[i >> 1][4 * j + 2 * (i & 1) + 1], own.reach[i], w.y, v.y));
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) to[query_offset<MT>(i) * a.sample_pitch] = most[i];
}

template <int MT, int BN>
__device__ __forceinline__ void select_tile(const float (&acc)[MT][BN / 2], const float* r0, const float* r1,
                                            int64_t tile, const ScreenArgs& a, Lane<MT>& own, int64_t query) {
  if (a.sample) {
    float* to = a.sample + query * a.sample_pitch + tile * 4 + (threadIdx.x & 3);
    return largest<MT, BN>(acc, r0, r1, to, a, own);
  }
  unsigned hit;
  if (a.mode == kScreenPlain)
    hit = passing<kScreenPlain, MT, BN>(acc, r0, r1, own);
  else if (a.mode == kScreenShifted)
    hit = passing<kScreenShifted, MT, BN>(acc, r0, r1, own);
  else
    hit = passing<kScreenCosine, MT, BN>(acc, r0, r1, own);
  if (__any_sync(kFullWarp, hit != 0))
    push<MT, BN>(acc, r0, r1, static_cast<uint32_t>(tile * BN), a, own, a.lists.bars + query, hit);
}

}  // namespace cuda
}  // namespace lutra
