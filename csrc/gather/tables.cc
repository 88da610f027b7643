#include "gather/tables.h"

#include "common/parallel.h"
#include "common/team.h"
#include "gather/rows.h"
#include "gather/tables_codes.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// ---- few tokens: each output is a weighted sum of rows that lie anywhere. A task is a part of one token's columns,
// so that even a single token keeps all threads busy.
template <class T>
void few_tokens(const TablesArgs& a, int64_t t, int64_t c0, int64_t columns) {
  typedef typename T::type type;
  Buffer<int64_t> index(a.n_tables);
  const int32_t* codes = a.codes + t * a.n_tables;
  for (int64_t k = 0; k < a.n_tables; ++k) index[k] = k * a.entries + codes[k];
  const RowTable<T> table{static_cast<const type*>(a.tables) + c0, a.dim, nullptr, nullptr};
  const RowList rows{index.data, a.weights ? a.weights + t * a.n_tables : nullptr, a.n_tables, a.n_tables};
  prefetch_first(table, rows, columns);
  auto* out = static_cast<type*>(a.out) + t * a.dim + c0;
  const auto* bias = a.bias ? static_cast<const type*>(a.bias) + c0 : nullptr;
  if (a.weights)
    reduce_rows<T, Reduce::weighted>(table, rows, columns, bias, 1.0f, out);
  else
    reduce_rows<T, Reduce::sum>(table, rows, columns, bias, 1.0f, out);
}

// ---- many tokens: a slab of columns (256 bytes of each entry) of a few tables at a time is copied to one place, where
// it stays in the second-level cache while all tokens of a block take their rows from it. The tables are read once
// for each block of tokens, instead of a row for every code. (Used where they lie, rows whose distance is a power of
// two would share a few sets of the cache and drive each other out: 25 ms instead of 10 for 1,024 tokens of
// 128 x 256 x 1,024 on one thread.)
template <class T>
constexpr int slab_vectors() {
  return W * sizeof(typename T::type) >= 64 ? 4 : 8;
}

template <class T>
struct Slabs {
  static constexpr int NV = slab_vectors<T>(), kColumns = NV * W;
  static constexpr int64_t kBytes = kColumns * static_cast<int64_t>(sizeof(typename T::type));
  static constexpr int64_t kCache = 1 << 18;  // bytes of slabs in use

  static bool fits(const TablesArgs& a) {
    return a.dim >= kColumns && a.entries * kBytes <= kCache && a.tokens * 2 >= a.entries * 3 && a.tokens >= 16;
  }

  // Columns [c0, c0 + kColumns) of the tokens [t0, t1); only those from c0 + skip on are written.
  template <bool Weighted>
  static void run(const TablesArgs& a, int64_t c0, int64_t skip, int64_t t0, int64_t t1) {
    typedef typename T::type type;
    const int64_t tokens = t1 - t0, K = a.n_tables, group = kCache / (a.entries * kBytes);
    const int64_t G = group < 8 ? group : 8;
    const type* base = static_cast<const type*>(a.tables) + c0;
    Buffer<float> sums(tokens * kColumns);
    for (int64_t t = 0; t < tokens; ++t) {
      const type* bias = static_cast<const type*>(a.bias);
      for (int v = 0; v < NV; ++v) store(sums.data + t * kColumns + v * W, bias ? T::load(bias + c0 + v * W) : (vf){});
    }
    Buffer<type> packed(G * a.entries * kColumns);
    const int64_t rows = K * a.entries;
    for (int64_t k0 = 0; k0 < K; k0 += G) {
      const int64_t g = K - k0 < G ? K - k0 : G;
      for (int64_t r = 0; r < g * a.entries; ++r) {
        const int64_t from = k0 * a.entries + r;
        if (from + 48 < rows) {
          const auto* p = reinterpret_cast<const char*>(base + (from + 48) * a.dim);
          for (int64_t c = 0; c < kBytes; c += 64) prefetch_far(p + c);
        }
        memcpy(packed.data + r * kColumns, base + from * a.dim, static_cast<size_t>(kBytes));
      }
      const int32_t* codes = a.codes + t0 * K + k0;
      const float* weights = a.weights + (Weighted ? t0 * K + k0 : 0);
      for (int64_t t = 0; t < tokens; ++t, codes += K, weights += Weighted ? K : 0) {
        float* sum = sums.data + t * kColumns;
        __builtin_prefetch(codes + 16 * K);
        if (Weighted) __builtin_prefetch(weights + 16 * K);
        vf acc[NV];
        LUTRA_UNROLL
        for (int v = 0; v < NV; ++v) acc[v] = load(sum + v * W);
        const type* table = packed.data;
        for (int64_t k = 0; k < g; ++k, table += a.entries * kColumns) {
          const type* row = table + static_cast<int64_t>(codes[k]) * kColumns;
          const float w = Weighted ? weights[k] : 1.0f;
          LUTRA_UNROLL
          for (int v = 0; v < NV; ++v) {
            if (Weighted)
              acc[v] += T::load(row + v * W) * w;
            else
              acc[v] += T::load(row + v * W);
          }
        }
        LUTRA_UNROLL
        for (int v = 0; v < NV; ++v) store(sum + v * W, acc[v]);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      type* out = static_cast<type*>(a.out) + (t0 + t) * a.dim + c0;
      const float* sum = sums.data + t * kColumns;
      if (skip == 0) {
        for (int v = 0; v < NV; ++v) T::store(out + v * W, load(sum + v * W));
      } else {
        for (int64_t c = skip; c < kColumns; ++c) T::put(out + c, sum[c]);
      }
    }
  }
};

template <class T>
void forward(const TablesArgs& a) {
  const int64_t size = static_cast<int64_t>(sizeof(typename T::type));
  if (Slabs<T>::fits(a)) {
    constexpr int64_t columns = Slabs<T>::kColumns;
    const int64_t slabs = (a.dim + columns - 1) / columns;
    int64_t block = a.tokens < 4096 ? a.tokens : 4096;
    if (slabs < 8 && block > 512) block = block / 4;  // few slabs: cut the tokens, so that there is work for all
    const int64_t blocks = (a.tokens + block - 1) / block;
    team_for(slabs * blocks, 1e9, [&](int64_t i) {
      const int64_t slab = i % slabs, b = i / slabs;
      const int64_t skip = (slab + 1) * columns > a.dim ? (slab + 1) * columns - a.dim : 0;
      const int64_t t0 = b * block, t1 = t0 + block < a.tokens ? t0 + block : a.tokens;
      if (a.weights)
        Slabs<T>::template run<true>(a, slab * columns - skip, skip, t0, t1);
      else
        Slabs<T>::template run<false>(a, slab * columns - skip, skip, t0, t1);
    });
    return;
  }
  const int64_t unit = kMaxVectors * W;  // columns that one walk sums
  const double each = static_cast<double>(a.n_tables) * (4 + static_cast<double>(a.dim * size) / 16);
  const double cost = each * static_cast<double>(a.tokens);
  const int64_t units = (a.dim + unit - 1) / unit, want = a.tokens >= 8 ? 1 : 2 * num_threads();
  const int64_t parts = cost < 20e3 ? 1 : units < want ? (units > 0 ? units : 1) : want;
  const int64_t width = (units + parts - 1) / parts * unit;  // of a part
  // 20 instead of 40 microseconds make a fork pay: the threads are wanted for the bandwidth of a single token
  team_for(a.tokens * parts, cost * 2, [&](int64_t i) {
    const int64_t c0 = i % parts * width;
    if (c0 < a.dim) few_tokens<T>(a, i / parts, c0, a.dim - c0 < width ? a.dim - c0 : width);
  });
}

}  // namespace

void tables(const TablesArgs& a) {
  *a.bad = first_bad_code(a.codes, a.tokens * a.n_tables, a.entries);
  if (*a.bad != -1) return;
  switch (a.dtype) {
    case DType::f16: return forward<F16>(a);
    case DType::bf16: return forward<BF16>(a);
    default: return forward<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
