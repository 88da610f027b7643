// Few queries go along the rows of the keys, as these lie in memory; for many the keys are packed once into panels with
// keys in the lanes, and a tile of queries by a panel is summed in registers from broadcast values of the queries.
// Either way the scores of a block of queries are written to a buffer of the second-level cache, row after row, and
// selected from there (product_select.h).
#include "address/product_keys.h"

#include "address/product_select.h"
#include "common/parts.h"
#include "common/team.h"
#include "common/transpose.h"
#include "scan/reduce_all.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

#if defined(LUTRA_LEVEL_v4)
constexpr int kTile = 8;  // queries by three vectors of keys: 24 sums of 32 registers
#else
constexpr int kTile = 4;  // 12 sums of 16 registers
#endif
constexpr int kVectors = 3, kPanel = kVectors * W;
constexpr int64_t kBlock = 32;  // queries of a chunk
constexpr int64_t kFew = 40;    // with fewer, packing the keys takes longer than it saves

template <class T>
void to_floats(const void* from, int64_t at, int64_t count, float* out) {
  const auto* x = static_cast<const typename T::type*>(from) + at;
  int64_t j = 0;
  for (; j + W <= count; j += W) store(out + j, T::load(x + j));
  for (; j < count; ++j) out[j] = T::get(x + j);
}

void floats(const void* from, DType dtype, int64_t at, int64_t count, float* out) {
  switch (dtype) {
    case DType::f16: return to_floats<F16>(from, at, count, out);
    case DType::bf16: return to_floats<BF16>(from, at, count, out);
    default: return to_floats<F32>(from, at, count, out);
  }
}

// ---------------------------------------------------------------------------------------------- along the rows
// Scores of W keys that lie one after another; q has zeros behind dim.
template <class T>
LUTRA_INLINE vf row_tile(const float* q, const typename T::type* keys, int64_t dim) {
  vf sum[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) sum[r] = (vf){};
  int64_t j = 0;
  for (; j + W <= dim; j += W) {
    const vf qj = load(q + j);
#pragma GCC unroll 4
    for (int g = 0; g < W; g += 4) {  // a pointer for four rows: there are not registers for one each
      const typename T::type* x = keys + g * dim + j;
      asm("" : "+r"(x));
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sum[place(g + r)] = fused(sum[place(g + r)], qj, T::load(x + r * dim));
    }
  }
  if (j < dim)
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r)
      sum[place(r)] = fused(sum[place(r)], load(q + j), load_part<T>(keys + r * dim + j, static_cast<int>(dim - j)));
  return reduce_all<Kind::dot>(sum);
}

// Scores of `count` queries (ldq apart, zeros behind dim) with all keys.
template <class T>
void row_scores(const float* q, int64_t ldq, int64_t count, const void* all, int64_t first, int64_t n, int64_t dim,
                float* out, int64_t ld) {
  const auto* keys = static_cast<const typename T::type*>(all) + first;
  for (int64_t i = 0; i + W <= n; i += W)
    for (int64_t t = 0; t < count; ++t) store(out + t * ld + i, row_tile<T>(q + t * ldq, keys + i * dim, dim));
  if (n % W == 0) return;
  const typename T::type* last = keys + (n - W) * dim;
  Buffer<typename T::type> few(n < W ? W * dim : 0);
  if (n < W) {
    memset(few.data, 0, W * dim * sizeof(*few.data));
    memcpy(few.data, keys, n * dim * sizeof(*few.data));
    last = few.data;
  }
  for (int64_t t = 0; t < count; ++t) {
    const vf score = row_tile<T>(q + t * ldq, last, dim);
    store(out + t * ld + (n < W ? 0 : n - W), score);
  }
}

// ---------------------------------------------------------------------------------------------- packed keys
// A panel (dim, kPanel) of the keys first, first + 1, ...; behind the last, the last again.
template <class T>
void pack(const void* all, int64_t from, int64_t first, int64_t n, int64_t dim, float* panel) {
  const auto* keys = static_cast<const typename T::type*>(all) + from;
  for (int g = 0; g < kVectors; ++g) {
    const typename T::type* x[W];
    for (int i = 0; i < W; ++i) x[i] = keys + (first + g * W + i < n ? first + g * W + i : n - 1) * dim;
    for (int64_t j = 0; j < dim; j += W) {
      const int64_t columns = dim - j < W ? dim - j : W;
      vf v[W];
      if (columns == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) v[i] = T::load(x[i] + j);
      } else {
        for (int i = 0; i < W; ++i) v[i] = load_part<T>(x[i] + j, columns);
      }
      transpose(v);
      for (int64_t l = 0; l < columns; ++l) store(panel + (j + l) * kPanel + g * W, v[l]);
    }
  }
}

void pack(const ProductKeysArgs& a, int64_t half, int64_t first, float* panel) {
  const int64_t from = half * a.n * a.dim;
  switch (a.key_dtype) {
    case DType::f16: return pack<F16>(a.keys, from, first, a.n, a.dim, panel);
    case DType::bf16: return pack<BF16>(a.keys, from, first, a.n, a.dim, panel);
    default: return pack<F32>(a.keys, from, first, a.n, a.dim, panel);
  }
}

// Scores of kTile queries with a panel.
LUTRA_INLINE void panel_tile(const float* q, int64_t ldq, int64_t dim, const float* panel, float* out, int64_t ld) {
  vf sum[kTile][kVectors];
  for (int i = 0; i < kTile; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = (vf){};
  for (int64_t j = 0; j < dim; ++j) {
    vf x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(panel + j * kPanel + v * W);
    for (int i = 0; i < kTile; ++i) {
      const vf qj = splat(q[i * ldq + j]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fused(sum[i][v], x[v], qj);
    }
  }
  for (int i = 0; i < kTile; ++i)
    for (int v = 0; v < kVectors; ++v) store(out + i * ld + v * W, sum[i][v]);
}

// ---------------------------------------------------------------------------------------------- a chunk of queries
// Queries [begin, begin + count) of a head. `packed`: panels of all halves, or null.
void chunk(const ProductKeysArgs& a, const float* packed, int64_t head, int64_t begin, int64_t count, int64_t* bad) {
  const int64_t panels = (a.n + kPanel - 1) / kPanel, ld = panels * kPanel;
  const int64_t ldq = (a.dim + W - 1) / W * W, tiles = (count + kTile - 1) / kTile;
  const int64_t slots = packed ? tiles * kTile : count;
  Buffer<float> q(2 * slots * ldq), scores(2 * slots * ld);
  memset(q.data, 0, 2 * slots * ldq * sizeof(float));
  for (int64_t half = 0; half < 2; ++half) {
    float *to = q.data + half * slots * ldq, *out = scores.data + half * slots * ld;
    for (int64_t i = 0; i < count; ++i)
      floats(a.q, a.q_dtype, (((begin + i) * a.heads + head) * 2 + half) * a.dim, a.dim, to + i * ldq);
    const int64_t keys = head * 2 + half;
    if (packed) {
      for (int64_t p = 0; p < panels; ++p) {
        const float* panel = packed + (keys * panels + p) * a.dim * kPanel;
        for (int64_t t = 0; t < slots; t += kTile)
          panel_tile(to + t * ldq, ldq, a.dim, panel, out + t * ld + p * kPanel, ld);
      }
    } else {
      switch (a.key_dtype) {
        case DType::f16: row_scores<F16>(to, ldq, count, a.keys, keys * a.n * a.dim, a.n, a.dim, out, ld); break;
        case DType::bf16: row_scores<BF16>(to, ldq, count, a.keys, keys * a.n * a.dim, a.n, a.dim, out, ld); break;
        default: row_scores<F32>(to, ldq, count, a.keys, keys * a.n * a.dim, a.n, a.dim, out, ld); break;
      }
    }
  }
  ProductSelection select(a.n, a.k);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (begin + i) * a.heads + head;
    bool good = true;
    for (int half = 0; half < 2 && good; ++half) {
      float* row = scores.data + (half * slots + i) * ld;
      for (int64_t j = a.n; j % W; ++j) row[j] = -__builtin_inff();
      good = select.half(half, row);
    }
    if (!good || !select.sums(a.scores + at * a.k, a.ids + at * a.k)) {
      if (*bad < 0 || at < *bad) *bad = at;
      return;  // later ones of the head have greater numbers
    }
  }
}

}  // namespace

void product_keys(const ProductKeysArgs& a) {
  *a.bad = -1;
  const int64_t panels = (a.n + kPanel - 1) / kPanel;
  const double product = static_cast<double>(a.tokens) * a.heads * a.n * (static_cast<double>(a.dim) * 0.04 + 0.4);
  const bool packs = a.tokens >= kFew;
  const int64_t halves = 2 * a.heads;
  Buffer<float> packed(packs ? halves * panels * a.dim * kPanel : 0);
  if (packs)
    team_for(halves * panels, static_cast<double>(halves) * a.n * static_cast<double>(a.dim) * 0.5,
             [&](int64_t c) { pack(a, c / panels, c % panels * kPanel, packed.data + c * a.dim * kPanel); });
  int64_t each = packs ? kBlock : 4;
  if (each > a.tokens) each = a.tokens > 0 ? a.tokens : 1;
  const int64_t blocks = (a.tokens + each - 1) / each;
  Buffer<int64_t> bad(a.heads * blocks);
  team_for(a.heads * blocks, product, [&](int64_t c) {
    const int64_t head = c / blocks, begin = c % blocks * each;
    bad[c] = -1;
    chunk(a, packs ? packed.data : nullptr, head, begin, begin + each < a.tokens ? each : a.tokens - begin, &bad[c]);
  });
  for (int64_t c = 0; c < a.heads * blocks; ++c)
    if (bad[c] >= 0 && (*a.bad < 0 || bad[c] < *a.bad)) *a.bad = bad[c];
}

}  // namespace LUTRA_NS
}  // namespace lutra
