// Gradients of tables: of the tables by slabs of columns, of the weights by blocks of tokens.
#include "common/parallel.h"
#include "common/team.h"
#include "gather/rows.h"
#include "gather/tables.h"
#include "gather/tables_codes.h"
#include "gather/tables_rows.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

constexpr int NV = W >= 16 ? 4 : 8;
constexpr int64_t kColumns = NV * W;  // of a slab
constexpr int64_t kWide = 256;        // columns of a piece of a dot product
constexpr int64_t kTokens = 256;      // tokens whose pieces stay in the cache meanwhile

// Columns [c0, c0 + columns) of all tokens' gradients as f32, rows of kColumns.
template <class T>
void copy_slab(const TablesBackwardArgs& a, int64_t c0, int64_t columns, float* to) {
  const auto* g = static_cast<const typename T::type*>(a.grad_out) + c0;
  for (int64_t t = 0; t < a.tokens; ++t, g += a.dim, to += kColumns) {
    if (columns == kColumns) {
      for (int v = 0; v < NV; ++v) store(to + v * W, T::load(g + v * W));
    } else {
      for (int64_t c = 0; c < kColumns; ++c) to[c] = c < columns ? T::get(g + c) : 0.0f;
    }
  }
}

// grad_tables[:, :, c0 : c0 + columns]: one table's slab of sums lies in the cache while all tokens are added to it,
// in their order.
template <class T>
void table_slab(const TablesBackwardArgs& a, int64_t c0, int64_t columns) {
  typedef typename T::type type;
  Buffer<float> grads(a.tokens * kColumns), sums(a.entries * kColumns);
  copy_slab<T>(a, c0, columns, grads.data);
  for (int64_t k = 0; k < a.n_tables; ++k) {
    memset(sums.data, 0, static_cast<size_t>(a.entries * kColumns) * sizeof(float));
    const int32_t* codes = a.codes + k;
    const float* weights = a.weights ? a.weights + k : nullptr;
    for (int64_t t = 0; t < a.tokens; ++t) {
      const float* g = grads.data + t * kColumns;
      float* sum = sums.data + codes[t * a.n_tables] * kColumns;
      const float w = weights ? weights[t * a.n_tables] : 1.0f;
      __builtin_prefetch(codes + (t + 16) * a.n_tables);
      if (weights) __builtin_prefetch(weights + (t + 16) * a.n_tables);
      LUTRA_UNROLL
      for (int v = 0; v < NV; ++v) store(sum + v * W, load(sum + v * W) + load(g + v * W) * w);
    }
    type* out = static_cast<type*>(a.grad_tables) + k * a.entries * a.dim + c0;
    for (int64_t e = 0; e < a.entries; ++e, out += a.dim) {
      const float* sum = sums.data + e * kColumns;
      if (columns == kColumns) {
        for (int v = 0; v < NV; ++v) T::store(out + v * W, load(sum + v * W));
      } else {
        for (int64_t c = 0; c < columns; ++c) T::put(out + c, sum[c]);
      }
    }
  }
}

template <class T>
LUTRA_INLINE float dot(const float* g, const typename T::type* row, int64_t n) {
  vf a = {}, b = {};
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    a += load(g + j) * T::load(row + j);
    b += load(g + j + W) * T::load(row + j + W);
  }
  if (j + W <= n) {
    a += load(g + j) * T::load(row + j);
    j += W;
  }
  float rest = 0;
  for (; j < n; ++j) rest += g[j] * T::get(row + j);
  return reduce_add(a + b) + rest;
}

// grad_weights of the tokens [t0, t1): pieces of kWide columns, added up in their order.
template <class T>
void weight_block(const TablesBackwardArgs& a, int64_t t0, int64_t t1) {
  typedef typename T::type type;
  Buffer<float> piece((t1 - t0) * kWide);
  for (int64_t i = t0 * a.n_tables; i < t1 * a.n_tables; ++i) a.grad_weights[i] = 0;
  for (int64_t c0 = 0; c0 < a.dim; c0 += kWide) {
    const int64_t n = a.dim - c0 < kWide ? a.dim - c0 : kWide;
    for (int64_t t = t0; t < t1; ++t) {
      const auto* g = static_cast<const char*>(a.grad_out) + (t * a.dim + c0) * size_of(a.grad_dtype);
      widen_row(a.grad_dtype, g, n, piece.data + (t - t0) * kWide);
    }
    for (int64_t k = 0; k < a.n_tables; ++k) {
      const auto* table = static_cast<const type*>(a.tables) + k * a.entries * a.dim + c0;
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t i = t * a.n_tables + k;
        if (t + 8 < t1) {  // the rows of the tokens to come
          const auto* p = reinterpret_cast<const char*>(table + a.codes[i + 8 * a.n_tables] * a.dim);
          for (int64_t c = 0; c < n * static_cast<int64_t>(sizeof(type)); c += 64) prefetch_far(p + c);
        }
        float product = dot<T>(piece.data + (t - t0) * kWide, table + a.codes[i] * a.dim, n);
        if (is_code<T>::value) {
          const int64_t row = k * a.entries + a.codes[i];
          float sum = 0;
          for (int64_t c = 0; c < n; ++c) sum += piece[(t - t0) * kWide + c];
          product = product * a.scale[row] + a.minimum[row] * sum;
        }
        a.grad_weights[i] += product;
      }
    }
  }
}

template <class T>
void backward(const TablesBackwardArgs& a) {
  typedef typename result_of<T>::type G;
  const double work = static_cast<double>(a.n_tables) * static_cast<double>(a.dim) * 0.1;
  if (a.grad_tables) {
    const int64_t slabs = (a.dim + kColumns - 1) / kColumns;
    team_for(slabs, work * static_cast<double>(a.tokens + a.entries), [&](int64_t i) {
      const int64_t c0 = i * kColumns;
      table_slab<G>(a, c0, a.dim - c0 < kColumns ? a.dim - c0 : kColumns);
    });
  }
  if (a.grad_weights) {
    const int64_t grain = a.tokens >= 4 * kTokens ? kTokens : 1 + a.tokens / 4;
    team_ranges(a.tokens, grain, work * static_cast<double>(a.tokens),
                [&](int64_t t0, int64_t t1) { weight_block<T>(a, t0, t1); });
  }
}

}  // namespace

void tables_backward(const TablesBackwardArgs& a) {
  *a.bad = first_bad_code(a.codes, a.tokens * a.n_tables, a.entries);
  if (*a.bad != -1) return;
  switch (a.dtype) {
    case DType::f16: return backward<F16>(a);
    case DType::bf16: return backward<BF16>(a);
    case DType::i8: return backward<I8>(a);
    default: return backward<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
