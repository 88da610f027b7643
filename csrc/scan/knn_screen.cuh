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
// bars come from a sample of the tiles, so that cuts are rare.
#pragma once
#include <type_traits>

#include "common/mma.cuh"
#include "common/select.cuh"
#include "scan/knn_screen.h"

namespace lutra {
namespace cuda {

constexpr int kSlab = 64;                    // columns of a tile: 128 bytes of bf16
constexpr int kPanelBytes = 64 * kSlab * 2;  // 64 queries
constexpr float kPacked = 0x1p-17f;          // what a score may lose, of its size, by a number in its lowest bits
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
    const unsigned votes = __ballot_sync(kFullWarp, kept);  // keys move to earlier places only: these have been read
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
  make_room<MT>(a, own, mask, bars);
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
      if (!(s <= own.bar[i]) && valid) to[4 * own.count[i]++] = make_key(s, row0 + column);
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

// ---- the nearest alone (address.nearest): a thread keeps the two best rows of each of its queries and the third's
// score
template <int MT>
struct Best {
  float v[2 * MT][3];
  int id[2 * MT][2];

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      v[i][0] = v[i][1] = v[i][2] = -__int_as_float(0x7f800000);
      id[i][0] = id[i][1] = -1;
    }
  }
  __device__ __forceinline__ void add(int i, float s, int row) {
    if (s > v[i][0]) {
      v[i][2] = v[i][1];
      v[i][1] = v[i][0], id[i][1] = id[i][0];
      v[i][0] = s, id[i][0] = row;
    } else if (s > v[i][1]) {
      v[i][2] = v[i][1];
      v[i][1] = s, id[i][1] = row;
    } else {
      v[i][2] = fmaxf(v[i][2], s);
    }
  }
};

// The lowest 5 bits of a score become its column's number within the thread's (kPacked allows for it), so that the
// three largest come out of minima and maxima. A NaN, and -infinity with a number, is never larger: rows that are not
// there.
template <int MT, int BN>
__device__ __forceinline__ void best_of_tile(const float (&acc)[MT][BN / 2], const float* r0, const float* r1, int row0,
                                             const Lane<MT>& own, Best<MT>& best) {
  const int t = threadIdx.x & 3;
  float most[2 * MT][3];
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) most[i][0] = most[i][1] = most[i][2] = -__int_as_float(0x7f800000);
#pragma unroll
  for (int j = 0; j < BN / 8; ++j) {
    const float2 w = *reinterpret_cast<const float2*>(r0 + 8 * j + 2 * t);
    const float2 v = *reinterpret_cast<const float2*>(r1 + 8 * j + 2 * t);
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float s = fmaf(own.reach[i], e ? w.y : w.x, acc[i >> 1][4 * j + 2 * (i & 1) + e] + (e ? v.y : v.x));
        const float f = __uint_as_float((__float_as_uint(s) & ~31u) | (2 * j + e));
        const float second = fminf(most[i][0], f);
        most[i][0] = fmaxf(most[i][0], f);
        const float third = fminf(most[i][1], second);
        most[i][1] = fmaxf(most[i][1], second);
        most[i][2] = fmaxf(most[i][2], third);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const int at = static_cast<int>(__float_as_uint(most[i][p]) & 31);
      if (most[i][p] > best.v[i][2]) best.add(i, most[i][p], row0 + 4 * (at & ~1) + 2 * t + (at & 1));
    }
    best.v[i][2] = fmaxf(best.v[i][2], most[i][2]);
  }
}

// The 4 threads of a query put theirs together; the first writes.
template <int MT>
__device__ __forceinline__ void write_best(const ScreenArgs& a, Best<MT>& best, int64_t query) {
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) {
#pragma unroll
    for (int s = 1; s < 4; s <<= 1) {
      const float v0 = __shfl_xor_sync(kFullWarp, best.v[i][0], s), v1 = __shfl_xor_sync(kFullWarp, best.v[i][1], s);
      const float v2 = __shfl_xor_sync(kFullWarp, best.v[i][2], s);
      const int id0 = __shfl_xor_sync(kFullWarp, best.id[i][0], s), id1 = __shfl_xor_sync(kFullWarp, best.id[i][1], s);
      best.add(i, v0, id0);
      best.add(i, v1, id1);
      best.v[i][2] = fmaxf(best.v[i][2], v2);
    }
    const int64_t q = query + query_offset<MT>(i);
    if ((threadIdx.x & 3) == 0 && q < a.nearest.queries) {
      a.nearest.candidates[2 * q] = best.id[i][0];
      a.nearest.candidates[2 * q + 1] = best.id[i][1];
      a.nearest.bounds[q] = best.v[i][2];
    }
  }
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

// ---- rows of the collection: 8 values at a time
template <class T>
struct Piece {
  static constexpr int kWords = sizeof(T) * 8 / 4;
  uint32_t word[kWords];
};

// 8 values at an address aligned to 16 bytes (8-bit values: 8), or zeros.
template <class T>
__device__ __forceinline__ Piece<T> load_vector(const T* from, bool here) {
  Piece<T> p;
#pragma unroll
  for (int i = 0; i < Piece<T>::kWords; ++i) p.word[i] = 0;
  if (!here) return p;
  if constexpr (sizeof(T) == 1) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    p.word[0] = v.x, p.word[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < Piece<T>::kWords; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from + i * 4 / sizeof(T));
      p.word[i] = v.x, p.word[i + 1] = v.y, p.word[i + 2] = v.z, p.word[i + 3] = v.w;
    }
  }
  return p;
}

// The first `columns` of 8 values, the rest 0; any address.
template <class T>
__device__ __forceinline__ Piece<T> load_values(const T* from, int columns) {
  Piece<T> p;
#pragma unroll
  for (int i = 0; i < Piece<T>::kWords; ++i) p.word[i] = 0;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if (c < columns) {
      uint32_t bits;
      if constexpr (sizeof(T) == 4) {
        bits = reinterpret_cast<const uint32_t*>(from)[c];
      } else if constexpr (sizeof(T) == 2) {
        bits = reinterpret_cast<const uint16_t*>(from)[c];
      } else {
        bits = reinterpret_cast<const uint8_t*>(from)[c];
      }
      p.word[c * sizeof(T) / 4] |= bits << (c * sizeof(T) % 4 * 8);
    }
  }
  return p;
}

template <class T>
__device__ __forceinline__ float piece_value(const Piece<T>& p, int i) {
  const uint32_t word = p.word[i * sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(word);
  } else if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    return __uint_as_float(i & 1 ? word & 0xffff0000u : word << 16);
  } else if constexpr (std::is_same<T, __half>::value) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(i & 1 ? word >> 16 : word)));
  } else if constexpr (std::is_same<T, int8_t>::value) {
    return static_cast<float>(static_cast<int8_t>(word >> (i & 3) * 8));
  } else {
    return static_cast<float>(word >> (i & 3) * 8 & 255);
  }
}

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Writes the piece as bf16 (and with RT = 2 what the rounding loses) to its places; adds the squares to *squares.
template <class T, int RT>
__device__ __forceinline__ void store_piece(const Piece<T>& p, unsigned char* high, unsigned char* low,
                                            float* squares) {
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = piece_value(p, i);
#pragma unroll
  for (int i = 0; i < 8; ++i) *squares = fmaf(v[i], v[i], *squares);
  uint4 h;
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    h = make_uint4(p.word[0], p.word[1], p.word[2], p.word[3]);
  } else {
    h = make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
  }
  *reinterpret_cast<uint4*>(high) = h;
  if constexpr (RT == 2) {
    const uint32_t w[4] = {h.x, h.y, h.z, h.w};
    uint32_t rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rest[i] = bf16_pair(v[2 * i] - __uint_as_float(w[i] << 16), v[2 * i + 1] - __uint_as_float(w[i] & 0xffff0000u));
    *reinterpret_cast<uint4*>(low) = make_uint4(rest[0], rest[1], rest[2], rest[3]);
  }
}

// r0 and r1 of a row from its sum of squares (of d values; fp32, any order of summation).
template <class T, bool NEAREST>
__device__ __forceinline__ float2 row_terms(const ScreenArgs& a, int64_t row, float squares) {
  const float infinity = __int_as_float(0x7f800000);
  const bool cosine = a.mode == kScreenCosine;
  const bool valid = row < a.n && (!a.keep || (a.keep[row >> 3] >> (row & 7) & 1));
  if (!valid) return cosine ? make_float2(0, -infinity) : make_float2(-infinity, 0);
  const float slack = static_cast<float>(a.d + 16) * 0x1p-24f;
  if (!cosine) {
    // 1e-17 for what squares lose below 1e-38; the sum of squares is right to a part in `slack`.
    const float norm = fmaf(sqrtf(squares), 1.0f + slack + 0x1p-20f, 1e-17f);
    float shift = 0;
    if (a.l2) shift = -0.5f * squares * (1.0f - 2 * slack - (NEAREST ? kPacked : 0x1p-20f));
    if (NEAREST && !(squares < kPlainSquares)) *a.nearest.broken = 1;
    if (a.bias) shift = fmaf(fabsf(a.bias[row]), 0x1p-20f, a.bias[row]);
    return make_float2(norm, shift);
  }
  if (squares > 1e-30f && squares < 1e37f) return make_float2(rsqrtf(squares), 0);
  if (squares == 0) {
    const T* x = static_cast<const T*>(a.x) + row * a.ldx;
    bool zero = true;
    for (int k = 0; k < a.d; ++k) zero = zero && to_float(x[k]) == 0;
    if (zero) return make_float2(0, 0);
  }
  return make_float2(0, infinity);  // always a candidate: its norm is not known well enough
}

}  // namespace cuda
}  // namespace lutra
