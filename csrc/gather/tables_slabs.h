// tables for many tokens: a slab of columns (256 bytes of each entry, 128 of 8-bit codes) of a few tables at a time is
// copied to one place, where it stays in the second-level cache while all tokens of a block take their rows from it.
// The tables are read once for each block of tokens, instead of a row for every code. (Used where they lie, rows whose
// distance is a power of two would share a few sets of the cache and drive each other out.)
//
// Before that the codes and weights of the block are laid out group by group of tables, in the order in which they are
// used: read where they lie, each token's few codes of a group cost a cache line of codes and one of weights in every
// slab, which come from the third level. Measured on a Zen 4, 4,096 tokens of 128 x 256 x 1,024 f32, one thread: the
// inner loop 22.5 ms (95 GB/s of rows out of the second level, 29 bytes a cycle) instead of 50.
#pragma once
#include "common/parallel.h"
#include "common/team.h"
#include "gather/rows.h"
#include "gather/tables_rows.h"

namespace lutra {
namespace LUTRA_NS {

template <class T>
struct Slabs {
  typedef typename T::type type;
  static constexpr int NV = W * sizeof(type) >= 64 ? 4 : 8;   // vectors of a slab
  static constexpr int TT = NV * W <= 64 && W >= 16 ? 2 : 1;  // tokens at a time
  static constexpr int kColumns = NV * W;
  static constexpr int64_t kBytes = kColumns * static_cast<int64_t>(sizeof(type));
  static constexpr int64_t kCache = 1 << 19;  // bytes of slabs in use
  static constexpr int64_t kBlock = 4096;     // tokens of a block
  static constexpr bool kCodes = is_code<T>::value;

  static int64_t group(const TablesArgs& a) {
    const int64_t most = kCache / (a.entries * kBytes);
    return most < 16 ? most : 16;
  }

  // Below four tokens a row of each table, rows read where they lie are faster: they are in the third-level cache when
  // the next token of a block wants them, and copying reads a page for each piece of a row (512 tokens of 512 x 256 x
  // 4,096 f32, one thread: 151 ms, by slabs 293; 1,024 tokens: 296 and 354).
  static bool fits(const TablesArgs& a) {
    return a.dim >= kColumns && a.entries * kBytes <= kCache && a.tokens >= a.entries * 4 && a.tokens >= 16;
  }

  // A block's codes and weights by groups of G tables: those of table k0 + j of token t lie at k0 * tokens + t * g + j,
  // g the tables of the group. Codes become places in the group's slabs.
  struct Block {
    int64_t t0, tokens, G;
    int32_t* at;
    float* weight;
    float* shift;  // per token, 8-bit codes
  };

  static void arrange(const TablesArgs& a, const Block& b, int64_t begin, int64_t end) {
    const int64_t K = a.n_tables;
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* codes = a.codes + (b.t0 + t) * K;
      const float* weights = a.weights ? a.weights + (b.t0 + t) * K : nullptr;
      float shift = 0;
      for (int64_t k0 = 0; k0 < K; k0 += b.G) {
        const int64_t g = K - k0 < b.G ? K - k0 : b.G;
        int32_t* at = b.at + k0 * b.tokens + t * g;
        float* weight = b.weight + k0 * b.tokens + t * g;
        for (int64_t j = 0; j < g; ++j) {
          at[j] = static_cast<int32_t>((j * a.entries + codes[k0 + j]) * kColumns);
          float w = weights ? weights[k0 + j] : 1.0f;
          if (kCodes) {
            const int64_t row = (k0 + j) * a.entries + codes[k0 + j];
            shift += w * a.minimum[row];
            w *= a.scale[row];
          }
          weight[j] = w;
        }
      }
      if (kCodes) b.shift[t] = shift;
    }
  }

  // N tokens' sums of a slab += the rows of g tables.
  template <int N>
  LUTRA_INLINE void add(float* sum, const type* packed, const int32_t* at, const float* weight, int64_t g) {
    vf acc[N][NV];
    LUTRA_UNROLL
    for (int u = 0; u < N; ++u) {
      LUTRA_UNROLL
      for (int v = 0; v < NV; ++v) acc[u][v] = load(sum + u * kColumns + v * W);
    }
    for (int64_t k = 0; k < g; ++k) {
      LUTRA_UNROLL
      for (int u = 0; u < N; ++u) {
        const type* row = packed + at[u * g + k];
        const vf w = splat(weight[u * g + k]);
        LUTRA_UNROLL
        for (int v = 0; v < NV; ++v) acc[u][v] += T::load(row + v * W) * w;
      }
    }
    LUTRA_UNROLL
    for (int u = 0; u < N; ++u) {
      LUTRA_UNROLL
      for (int v = 0; v < NV; ++v) store(sum + u * kColumns + v * W, acc[u][v]);
    }
  }

  // Columns [c0, c0 + kColumns) of the block's tokens [begin, end); only those from c0 + skip on are written.
  static void run(const TablesArgs& a, const Block& b, int64_t c0, int64_t skip, int64_t begin, int64_t end) {
    const int64_t K = a.n_tables, size = size_of(a.out_dtype);
    const type* base = static_cast<const type*>(a.tables) + c0;
    Buffer<float> sums((end - begin) * kColumns);
    float bias[kColumns] = {};
    if (a.bias) widen_row(a.out_dtype, static_cast<const char*>(a.bias) + c0 * size, kColumns, bias);
    for (int64_t t = 0; t < end - begin; ++t) memcpy(sums.data + t * kColumns, bias, sizeof(bias));
    Buffer<type> packed(b.G * a.entries * kColumns);
    const int64_t rows = K * a.entries;
    for (int64_t k0 = 0; k0 < K; k0 += b.G) {
      const int64_t g = K - k0 < b.G ? K - k0 : b.G;
      for (int64_t r = 0; r < g * a.entries; ++r) {
        const int64_t from = k0 * a.entries + r;
        if (from + 48 < rows) {
          const auto* p = reinterpret_cast<const char*>(base + (from + 48) * a.dim);
          for (int64_t c = 0; c < kBytes; c += 64) prefetch_far(p + c);
        }
        memcpy(packed.data + r * kColumns, base + from * a.dim, static_cast<size_t>(kBytes));
      }
      const int32_t* at = b.at + k0 * b.tokens + begin * g;
      const float* weight = b.weight + k0 * b.tokens + begin * g;
      float* sum = sums.data;
      int64_t t = begin;
      for (; t + TT <= end; t += TT, at += TT * g, weight += TT * g, sum += TT * kColumns)
        add<TT>(sum, packed.data, at, weight, g);
      for (; t < end; ++t, at += g, weight += g, sum += kColumns) add<1>(sum, packed.data, at, weight, g);
    }
    for (int64_t t = begin; t < end; ++t)
      narrow_row(a.out_dtype, sums.data + (t - begin) * kColumns + skip, kCodes ? b.shift[t] : 0.0f, kCodes,
                 kColumns - skip, static_cast<char*>(a.out) + ((b.t0 + t) * a.dim + c0 + skip) * size);
  }

  static void all(const TablesArgs& a) {
    const int64_t slabs = (a.dim + kColumns - 1) / kColumns, most = a.tokens < kBlock ? a.tokens : kBlock;
    Buffer<int32_t> at(most * a.n_tables);
    Buffer<float> weight(most * a.n_tables), shift(most);
    for (int64_t t0 = 0; t0 < a.tokens; t0 += kBlock) {
      const Block b{t0, a.tokens - t0 < kBlock ? a.tokens - t0 : kBlock, group(a), at.data, weight.data, shift.data};
      team_ranges(b.tokens, 64, static_cast<double>(b.tokens) * static_cast<double>(a.n_tables),
                  [&](int64_t begin, int64_t end) { arrange(a, b, begin, end); });
      // few slabs: cut the tokens, so that there is work for all threads
      const int64_t cut = slabs < 8 && b.tokens > 2048 ? 1024 : b.tokens, parts = (b.tokens + cut - 1) / cut;
      team_for(slabs * parts, 1e9, [&](int64_t i) {
        const int64_t slab = i % slabs, begin = i / slabs * cut, end = begin + cut < b.tokens ? begin + cut : b.tokens;
        const int64_t skip = (slab + 1) * kColumns > a.dim ? (slab + 1) * kColumns - a.dim : 0;
        run(a, b, slab * kColumns - skip, skip, begin, end);
      });
    }
  }
};

}  // namespace LUTRA_NS
}  // namespace lutra
