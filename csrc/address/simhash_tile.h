// Partitions of a tile of rows: what simhash and fde share. See simhash.h.
#pragma once
#include "common/parts.h"
#include "common/simd.h"
#include "common/transpose.h"

namespace lutra {
namespace LUTRA_NS {

constexpr int kTileVectors = 2, kTileRows = kTileVectors * W;
#if defined(LUTRA_LEVEL_v4)
constexpr int kTileColumns = 12;  // by two vectors of rows: 24 sums of 32 registers
#else
constexpr int kTileColumns = 6;  // 12 sums of 16 registers
#endif

// Rows [0, count) of x, d apart, as columns of tile (d, kTileRows); the columns behind are of the last row again. The
// first row that holds NaN or infinity, or -1.
template <class T>
int turn_rows(const typename T::type* x, int64_t d, int count, float* tile) {
  for (int g = 0; g < kTileVectors; ++g) {
    const typename T::type* row[W];
    for (int i = 0; i < W; ++i) row[i] = x + (g * W + i < count ? g * W + i : count - 1) * d;
    vi odd = {};
    for (int64_t j = 0; j < d; j += W) {
      const int columns = d - j < W ? static_cast<int>(d - j) : W;
      vf v[W];
      if (columns == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = T::load(row[i] + j);
      } else {
        for (int i = 0; i < W; ++i) v[i] = load_part<T>(row[i] + j, columns);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) odd |= ((vi)v[i] & 0x7f800000) == 0x7f800000;
      for (int l = 0; l < columns; ++l) store(tile + (j + l) * kTileRows + g * W, v[l]);
    }
    const uint32_t found = mask_bits(odd);
    if (found) {
      const int at = g * W + __builtin_ctz(found);
      return at < count ? at : count - 1;
    }
  }
  return -1;
}

// The first of n * d values that is NaN or infinite, as its row; or -1.
template <class T>
int64_t odd_row(const typename T::type* x, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < d; ++j) {
      const float f = T::get(x + i * d + j);
      if (!(__builtin_fabsf(f) <= 3.4028235e38f)) return i;
    }
  return -1;
}

// The numbers under way: of a repetition's k planes, `have` are in.
struct Numbers {
  vi g[kTileVectors];
  int have, k;
  int32_t* out;  // of this repetition
  int64_t step;  // to the next
};

// Products with N neighbouring planes, which are `ld` apart from one dimension to the next.
template <int N>
void tile_columns(const float* tile, int64_t d, const float* planes, int64_t ld, Numbers* to) {
  vf sum[N][kTileVectors];
  for (int c = 0; c < N; ++c)
    for (int v = 0; v < kTileVectors; ++v) sum[c][v] = (vf){};
  for (int64_t j = 0; j < d; ++j, tile += kTileRows, planes += ld) {
    vf x[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) x[v] = load(tile + v * W);
#pragma GCC unroll 12
    for (int c = 0; c < N; ++c) {
      const vf p = splat(planes[c]);
      for (int v = 0; v < kTileVectors; ++v) sum[c][v] += x[v] * p;
    }
  }
#pragma GCC unroll 12
  for (int c = 0; c < N; ++c) {
    for (int v = 0; v < kTileVectors; ++v) {
      const vi bit = sum[c][v] > 0;  // all ones where it is set
      to->g[v] = to->g[v] + to->g[v] + ((to->g[v] ^ bit) & 1);
    }
    if (++to->have == to->k) {
      for (int v = 0; v < kTileVectors; ++v) {
        *reinterpret_cast<vi_unaligned*>(to->out + v * W) = to->g[v];
        to->g[v] = (vi){};
      }
      to->out += to->step;
      to->have = 0;
    }
  }
}

// Bytes of the next tile, of which `left` rows are there.
template <class T>
int64_t tile_bytes(int64_t left, int64_t d) {
  return (left < kTileRows ? left : kTileRows) * d * static_cast<int64_t>(sizeof(typename T::type));
}

// out[r * step + i]: the number of row i of the tile in repetition r. k > 0. kTileRows are written for each. Meanwhile
// the `bytes` at `ahead`, the rows of the next tile, are brought nearer: sixteen rows read at once are more streams
// than the hardware follows.
static inline void tile_numbers(const float* tile, int64_t d, const float* planes, int64_t repetitions, int k,
                                int32_t* out, int64_t step, const void* ahead, int64_t bytes) {
  const int64_t columns = repetitions * k, tiles = (columns + kTileColumns - 1) / kTileColumns;
  const char* line = static_cast<const char*>(ahead);
  Numbers to = {{}, 0, k, out, step};
  for (int64_t t = 0, c = 0; t < tiles; ++t) {
    for (const char* end = static_cast<const char*>(ahead) + bytes * (t + 1) / tiles; line < end; line += 64)
      __builtin_prefetch(line, 0, 2);
    const int64_t count = columns / tiles + (t < columns % tiles);
    switch (count) {
#if defined(LUTRA_LEVEL_v4)
      case 12: tile_columns<12>(tile, d, planes + c, columns, &to); break;
      case 11: tile_columns<11>(tile, d, planes + c, columns, &to); break;
      case 10: tile_columns<10>(tile, d, planes + c, columns, &to); break;
      case 9: tile_columns<9>(tile, d, planes + c, columns, &to); break;
      case 8: tile_columns<8>(tile, d, planes + c, columns, &to); break;
      case 7: tile_columns<7>(tile, d, planes + c, columns, &to); break;
#endif
      case 6: tile_columns<6>(tile, d, planes + c, columns, &to); break;
      case 5: tile_columns<5>(tile, d, planes + c, columns, &to); break;
      case 4: tile_columns<4>(tile, d, planes + c, columns, &to); break;
      case 3: tile_columns<3>(tile, d, planes + c, columns, &to); break;
      case 2: tile_columns<2>(tile, d, planes + c, columns, &to); break;
      default: tile_columns<1>(tile, d, planes + c, columns, &to); break;
    }
    c += count;
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
