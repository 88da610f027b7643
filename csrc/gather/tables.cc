#include "gather/tables.h"

#include "common/parallel.h"
#include "gather/bag_ids.h"
#include "gather/rows.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// The position of the first code outside [0, entries), or -1.
int64_t first_bad(const int32_t* codes, int64_t n, int64_t entries) {
  const uint32_t limit = entries > INT32_MAX ? static_cast<uint32_t>(INT32_MAX) + 1u : static_cast<uint32_t>(entries);
  const int64_t block = 1 << 14;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = begin + block < n ? begin + block : n;
    uint32_t outside = 0;
    for (int64_t i = begin; i < end; ++i) outside |= static_cast<uint32_t>(codes[i]) >= limit;
    if (!outside) continue;
    int64_t i = begin;
    while (static_cast<uint32_t>(codes[i]) < limit) ++i;
    return i;
  }
  return -1;
}

template <class T>
void forward_tokens(const TablesArgs& a, int64_t t0, int64_t t1) {
  typedef typename T::type type;
  Buffer<int64_t> index(a.n_tables);
  const RowTable<T> table{static_cast<const type*>(a.tables), a.dim, nullptr, nullptr};
  for (int64_t t = t0; t < t1; ++t) {
    const int32_t* codes = a.codes + t * a.n_tables;
    for (int64_t k = 0; k < a.n_tables; ++k) index[k] = k * a.entries + codes[k];
    const RowList rows{index.data, a.weights ? a.weights + t * a.n_tables : nullptr, a.n_tables, a.n_tables};
    auto* out = static_cast<type*>(a.out) + t * a.dim;
    const auto* bias = static_cast<const type*>(a.bias);
    if (a.weights) reduce_rows<T, Reduce::weighted>(table, rows, a.dim, bias, 1.0f, out);
    else reduce_rows<T, Reduce::sum>(table, rows, a.dim, bias, 1.0f, out);
  }
}

template <class T>
void backward_tables(const TablesBackwardArgs& a, int64_t k0, int64_t k1) {
  typedef typename T::type type;
  Buffer<float> acc(a.entries * a.dim);
  for (int64_t k = k0; k < k1; ++k) {
    memset(acc.data, 0, static_cast<size_t>(a.entries * a.dim) * sizeof(float));
    for (int64_t t = 0; t < a.tokens; ++t) {
      const auto* g = static_cast<const type*>(a.grad_out) + t * a.dim;
      const float w = a.weights ? a.weights[t * a.n_tables + k] : 1.0f;
      float* row = acc.data + a.codes[t * a.n_tables + k] * a.dim;
      for (int64_t j = 0; j < a.dim; ++j) row[j] += w * T::get(g + j);
    }
    auto* out = static_cast<type*>(a.grad_tables) + k * a.entries * a.dim;
    for (int64_t i = 0; i < a.entries * a.dim; ++i) T::put(out + i, acc[i]);
  }
}

template <class T>
void backward_weights(const TablesBackwardArgs& a, int64_t t0, int64_t t1) {
  typedef typename T::type type;
  for (int64_t t = t0; t < t1; ++t) {
    const auto* g = static_cast<const type*>(a.grad_out) + t * a.dim;
    for (int64_t k = 0; k < a.n_tables; ++k) {
      const auto* row = static_cast<const type*>(a.tables) + (k * a.entries + a.codes[t * a.n_tables + k]) * a.dim;
      vf acc = {};
      int64_t j = 0;
      for (; j + W <= a.dim; j += W) acc += T::load(g + j) * T::load(row + j);
      float rest = 0;
      for (; j < a.dim; ++j) rest += T::get(g + j) * T::get(row + j);
      a.grad_weights[t * a.n_tables + k] = reduce_add(acc) + rest;
    }
  }
}

template <class T>
void forward(const TablesArgs& a) {
  const double each = static_cast<double>(a.n_tables) * static_cast<double>(a.dim) * 0.1;
  parallel_ranges(a.tokens, 1 + static_cast<int64_t>(30e3 / (1 + each)), each * static_cast<double>(a.tokens),
                  [&](int64_t t0, int64_t t1) { forward_tokens<T>(a, t0, t1); });
}

template <class T>
void backward(const TablesBackwardArgs& a) {
  const double cost = static_cast<double>(a.n_tables * a.dim) * static_cast<double>(a.tokens + a.entries) * 0.1;
  if (a.grad_tables)
    parallel_ranges(a.n_tables, 1, cost, [&](int64_t k0, int64_t k1) { backward_tables<T>(a, k0, k1); });
  if (a.grad_weights)
    parallel_ranges(a.tokens, 1, cost, [&](int64_t t0, int64_t t1) { backward_weights<T>(a, t0, t1); });
}

}  // namespace

void tables(const TablesArgs& a) {
  *a.bad = first_bad(a.codes, a.tokens * a.n_tables, a.entries);
  if (*a.bad != -1) return;
  switch (a.dtype) {
    case DType::f16: return forward<F16>(a);
    case DType::bf16: return forward<BF16>(a);
    default: return forward<F32>(a);
  }
}

void tables_backward(const TablesBackwardArgs& a) {
  *a.bad = first_bad(a.codes, a.tokens * a.n_tables, a.entries);
  if (*a.bad != -1) return;
  switch (a.dtype) {
    case DType::f16: return backward<F16>(a);
    case DType::bf16: return backward<BF16>(a);
    default: return backward<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
