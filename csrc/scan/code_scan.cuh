// The loop of a scan over rows of codes, with the k best kept inside (common/select.cuh); a policy makes the scores.
//
// A block goes over its stretch of rows tile by tile. L lanes share a row and each of them looks at R rows at a time,
// in pieces; the next pieces are on their way while one is worked on. The sums are offered to the lists of the W
// queries of the block. Where a list is full the loop is left and starts again at the same tile: it costs a second look
// at a few tiles, and the loop shares no registers with the compaction.
//
//   struct Policy {
//     static constexpr int kThreads, kRows, kQueries, kLanes;   // rows * queries <= 32
//     static constexpr bool kRowTerms;                          // whether score() looks at the row
//     using Piece, Sum, RowSum;
//     void fetch(uint32_t row, int piece, Piece&) const;
//     void add(int piece, const Piece (&)[kRows], Sum (&)[kRows][kQueries], RowSum (&)[kRows]) const;
//     void close(Sum (&)[kRows][kQueries], RowSum (&)[kRows]) const;      // the lanes of a row have added theirs
//     float score(const Sum&, const RowSum&, int query, uint32_t row) const;   // the greater the better
//     bool wanted(uint32_t row) const;                                     // asked of rows that pass a threshold
//   };
#pragma once
#include "common/select.cuh"

namespace lutra {
namespace cuda {

// Codes [at, at + 16) of a row of `bytes`, read VEC at a time; 0 beyond its end.
template <int VEC>
__device__ __forceinline__ void fetch_codes(const uint8_t* row, int at, int bytes, uint32_t (&v)[4]) {
  if constexpr (VEC == 16) {
    const uint4 w = *reinterpret_cast<const uint4*>(row + at);
    v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = at + 4 * i;
      v[i] = 0;
      if (VEC == 4) {
        if (j < bytes) v[i] = *reinterpret_cast<const uint32_t*>(row + j);
      } else {
#pragma unroll
        for (int b = 0; b < 4; ++b)
          if (j + b < bytes) v[i] |= static_cast<uint32_t>(row[j + b]) << (8 * b);
      }
    }
  }
}

struct Codes16 {
  uint32_t v[4];
};

// Rows [begin, end), in `pieces`; queries: how many of the block's there are.
template <class P>
__device__ __forceinline__ void scan_codes(const P& p, Selector& select, uint32_t begin, uint32_t end, int pieces,
                                           int queries) {
  constexpr int R = P::kRows, W = P::kQueries, L = P::kLanes, kStep = P::kThreads / L;
  constexpr uint32_t kTile = kStep * R;
  constexpr bool kRowTerms = P::kRowTerms;
  static_assert(R * W <= 32, "a bit for each sum of a thread");
  typename P::Piece next[R];
  const uint32_t own = threadIdx.x / L;
  const auto fetch = [&](uint32_t row0, int piece) {
    if (end - row0 >= kTile) {
#pragma unroll
      for (int r = 0; r < R; ++r) p.fetch(row0 + own + r * kStep, piece, next[r]);
    } else {
#pragma unroll
      for (int r = 0; r < R; ++r)
        p.fetch(own + r * kStep < end - row0 ? row0 + own + r * kStep : end - 1, piece, next[r]);
    }
  };
  unsigned todo = ~0u;  // the sums of this tile that found no place in their lists
  for (uint32_t row0 = begin; row0 < end;) {
    fetch(row0, 0);
    for (;;) {
      typename P::Sum sum[R][W];
      typename P::RowSum row_sum[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        row_sum[r] = typename P::RowSum{};
#pragma unroll
        for (int w = 0; w < W; ++w) sum[r][w] = typename P::Sum{};
      }
      const uint32_t rows = end - row0;  // that are left
      for (int piece = 0; piece < pieces; ++piece) {
        typename P::Piece now[R];
#pragma unroll
        for (int r = 0; r < R; ++r) now[r] = next[r];
        if (piece + 1 < pieces)
          fetch(row0, piece + 1);
        else if (rows > kTile)
          fetch(row0 + kTile, 0);
        p.add(piece, now, sum, row_sum);
      }
      p.close(sum, row_sum);
      unsigned passing = 0;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const float bar = select.least_score[w];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const uint32_t row = kRowTerms ? row0 + (own + r * kStep < rows ? own + r * kStep : rows - 1) : 0;
          if (!(p.score(sum[r][w], row_sum[r], w, row) < bar)) passing |= 1u << (r * W + w);
        }
      }
      passing &= todo;
      unsigned refused = 0;
      if (passing && (L == 1 || threadIdx.x % L == 0)) {
#pragma unroll
        for (int w = 0; w < W; ++w) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const uint32_t after = own + r * kStep, row = row0 + after;
            if ((passing >> (r * W + w) & 1) && after < rows && w < queries && p.wanted(row) &&
                !select.add(w, p.score(sum[r][w], row_sum[r], w, row), row))
              refused |= 1u << (r * W + w);
          }
        }
      }
      todo = refused;
      if (__syncthreads_or(refused != 0)) break;
      if (rows <= kTile) return;
      todo = ~0u;
      row0 += kTile;
    }
    select.compact<int>(false);
    __syncthreads();
  }
}

// Writes what scan_codes would offer: ordered_bits of the score of each row of [0, n), 0 where it is not wanted. Blocks
// (gridDim.y of them) take tiles in turn; all[w * n + row].
template <class P>
__device__ __forceinline__ void score_codes(const P& p, uint32_t n, int pieces, int queries, uint32_t* all) {
  constexpr int R = P::kRows, W = P::kQueries, kTile = P::kThreads * R;
  static_assert(P::kLanes == 1, "a thread a row");
  for (int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTile; row0 < n;
       row0 += static_cast<int64_t>(gridDim.y) * kTile) {
    typename P::Sum sum[R][W];
    typename P::RowSum row_sum[R];
    uint32_t rows[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = row0 + r * P::kThreads + threadIdx.x;
      rows[r] = static_cast<uint32_t>(row < n ? row : n - 1);
      row_sum[r] = typename P::RowSum{};
#pragma unroll
      for (int w = 0; w < W; ++w) sum[r][w] = typename P::Sum{};
    }
    for (int piece = 0; piece < pieces; ++piece) {
      typename P::Piece now[R];
#pragma unroll
      for (int r = 0; r < R; ++r) p.fetch(rows[r], piece, now[r]);
      p.add(piece, now, sum, row_sum);
    }
    p.close(sum, row_sum);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (row0 + r * P::kThreads + threadIdx.x >= n) continue;
      const bool wanted = p.wanted(rows[r]);
#pragma unroll
      for (int w = 0; w < W; ++w)
        if (w < queries)
          all[static_cast<uint64_t>(w) * n + rows[r]] =
              wanted ? ordered_bits(p.score(sum[r][w], row_sum[r], w, P::kRowTerms ? rows[r] : 0)) : 0;
    }
  }
}

// The place of a block's lists in the workspace: queries from q0 on, part blockIdx.y.
__device__ __forceinline__ Key* lists_of(Key* keys, const ListPlan& lists, int64_t q0) {
  return keys + (q0 * lists.parts + blockIdx.y) * lists.stride;
}

// Lists of the k best of n rows for `width` queries a block, cut into parts of whole tiles so that `slots` blocks have
// work; lists.queries: as many of nq as have room in about `room` bytes.
inline ListPlan cut_lists(int64_t nq, int width, int64_t n, int64_t k, int64_t tile_rows, int64_t slots, int64_t room) {
  ListPlan s;
  s.best = static_cast<int>(k < n ? k : n);
  s.capacity = list_capacity(s.best);
  s.stride = s.best <= kShortK ? s.best : s.capacity;
  const int64_t tiles = div_up(n > 0 ? n : 1, tile_rows);
  s.parts = parts_for(div_up(nq > 0 ? nq : 1, width), tiles, slots, 2);
  s.tiles_per_part = div_up(tiles, s.parts);
  s.parts = static_cast<int>(div_up(tiles, s.tiles_per_part));
  const int64_t list = static_cast<int64_t>(sizeof(Key)) * (s.stride > 0 ? s.stride : 1) * s.parts;
  const int64_t fit = room / list / width * width;
  s.queries = fit < width ? width : fit;
  if (s.queries > nq) s.queries = nq;
  return s;
}

}  // namespace cuda
}  // namespace lutra
