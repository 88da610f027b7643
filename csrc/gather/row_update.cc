#include "gather/row_update.h"

#include "common/team.h"
#include "gather/segment_sums.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

LUTRA_INLINE vf root(vf x) {
#if defined(LUTRA_LEVEL_v4)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(LUTRA_LEVEL_v3)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  vf out;
  for (int i = 0; i < W; ++i) out[i] = __builtin_sqrtf(x[i]);
  return out;
#endif
}

LUTRA_INLINE uint32_t row_key(uint64_t seed, int64_t row) {  // splitmix64
  uint64_t x = seed + (static_cast<uint64_t>(row) + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
}

// 16 random bits for each of the columns from j on.
LUTRA_INLINE vu column_bits(uint32_t key, int64_t j) {
  vu x;
  for (int i = 0; i < W; ++i) x[i] = key + (static_cast<uint32_t>(j) + static_cast<uint32_t>(i)) * 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return (x ^ (x >> 16)) >> 16;
}

// v with random bits added below those that bf16 keeps, and these cleared: a bf16 that a store takes as it is.
LUTRA_INLINE vf round_randomly(vf v, vu bits) {
  const vu u = (vu)v;
  const vu finite = (vu)((u & 0x7f800000u) != 0x7f800000u);
  return (vf)((u + (bits & finite)) & (~finite | 0xffff0000u));
}

template <class T>
LUTRA_INLINE vf take(const typename T::type* p, int part) {
  return part ? load_part<T>(p, part) : T::load(p);
}
template <class T>
LUTRA_INLINE void put(typename T::type* p, vf v, int part) {
  if (part)
    store_part<T>(p, v, part);
  else
    T::store(p, v);
}

// A vector of columns from j on (part > 0: only so many) of one row.
template <class T, Rule R, bool Random>
LUTRA_INLINE void update_columns(const RowUpdateArgs& a, typename T::type* w, const float* g, float* s0, float* s1,
                                 float rate, uint32_t key, int64_t j, int part) {
  vf x = take<T>(w + j, part) * a.shrink;
  const vf grad = take<F32>(g + j, part);
  if (R == Rule::sgd || R == Rule::rowwise_adagrad) {
    x -= grad * rate;
  } else if (R == Rule::momentum) {
    const vf m = take<F32>(s0 + j, part) * a.a + grad;
    put<F32>(s0 + j, m, part);
    x -= m * rate;
  } else if (R == Rule::adagrad) {
    const vf sum = take<F32>(s0 + j, part) + grad * grad;
    put<F32>(s0 + j, sum, part);
    x -= grad * rate / (root(sum) + a.eps);
  } else {
    vf m = take<F32>(s0 + j, part), v = take<F32>(s1 + j, part);
    m += (grad - m) * a.a;  // here a and b hold 1 - beta
    v += (grad * grad - v) * a.b;
    put<F32>(s0 + j, m, part);
    put<F32>(s1 + j, v, part);
    x -= m * rate / (root(v) * a.scale + a.eps);
  }
  if (Random) x = round_randomly(x, column_bits(key, j));
  put<T>(w + j, x, part);
}

template <class T, Rule R, bool Random>
void update_row(const RowUpdateArgs& a, int64_t row, const float* g) {
  auto* w = static_cast<typename T::type*>(a.table) + row * a.dim;
  const bool wide = R != Rule::sgd && R != Rule::rowwise_adagrad;
  float* s0 = wide ? a.s0 + row * a.dim : nullptr;
  float* s1 = R == Rule::adam ? a.s1 + row * a.dim : nullptr;
  const int64_t whole = a.dim / W * W;
  const int part = static_cast<int>(a.dim - whole);
  float rate = a.lr;
  if (R == Rule::rowwise_adagrad) {
    vf squares = {};
    for (int64_t j = 0; j < whole; j += W) {
      const vf x = load(g + j);
      squares += x * x;
    }
    if (part) {
      const vf x = load_part<F32>(g + whole, part);
      squares += x * x;
    }
    const float sum = a.s0[row] + reduce_add(squares) / static_cast<float>(a.dim);
    a.s0[row] = sum;
    rate = a.lr / (__builtin_sqrtf(sum) + a.eps);
  }
  const uint32_t key = Random ? row_key(a.seed, row) : 0;
  for (int64_t j = 0; j < whole; j += W) update_columns<T, R, Random>(a, w, g, s0, s1, rate, key, j, 0);
  if (part) update_columns<T, R, Random>(a, w, g, s0, s1, rate, key, whole, part);
}

LUTRA_INLINE void prefetch_row(const void* p, int64_t bytes) {
  const char* c = static_cast<const char*>(p);
  for (int64_t i = 0; i < bytes; i += 64) prefetch_far(c + i);
}

// The rows that come into the cache while others are worked on.
template <class T>
struct Ahead {
  const RowUpdateArgs& a;
  int64_t bytes, state_bytes, rows;
  explicit Ahead(const RowUpdateArgs& args) : a(args) {
    const int64_t most = 4096;
    bytes = a.dim * static_cast<int64_t>(sizeof(typename T::type));
    state_bytes = a.rule == Rule::rowwise_adagrad ? 4 : a.dim * 4;
    const int64_t all = bytes + (a.s0 ? state_bytes : 0) + (a.s1 ? state_bytes : 0);
    rows = rows_ahead(all);
    if (bytes > most) bytes = most;
    if (state_bytes > most) state_bytes = most;
  }
  LUTRA_INLINE void fetch(const Ahead& h, int64_t k) {
    if (k >= h.a.count) return;
    const int64_t row = h.a.touched[k];
    prefetch_row(static_cast<const typename T::type*>(h.a.table) + row * h.a.dim, h.bytes);
    if (h.a.s0) prefetch_row(h.a.s0 + (h.a.rule == Rule::rowwise_adagrad ? row : row * h.a.dim), h.state_bytes);
    if (h.a.s1) prefetch_row(h.a.s1 + row * h.a.dim, h.state_bytes);
  }
};

// The touched rows [k0, k1): some sums into a buffer that stays in the cache, then these rows.
template <class T, class G, Rule R, bool Random>
void update_range(const RowUpdateArgs& a, int64_t k0, int64_t k1) {
  int64_t step = 4096 / (a.dim > 0 ? a.dim : 1);
  if (step < 1) step = 1;
  if (step > k1 - k0) step = k1 - k0;
  Buffer<float> sums(step * a.dim);
  const Ahead<T> ahead(a);
  for (int64_t k = k0; k < k0 + ahead.rows && k < k1; ++k) Ahead<T>::fetch(ahead, k);
  SegmentSums plan{a.order, a.starts, a.touched, a.bag_of, a.bag_scale, a.weights, a.argmax,
                   a.grad,  a.dim,    a.mode,    false,    0,           false};
  for (int64_t k = k0; k < k1; k += step) {
    const int64_t end = k + step < k1 ? k + step : k1;
    plan.first = k;
    const float* g = sums.data;
    if (a.starts) {
      sum_segments<G, F32>(plan, sums.data, k, end);
    } else if (sizeof(typename G::type) == 4) {
      g = static_cast<const float*>(a.grad) + k * a.dim;
    } else {
      const auto* from = static_cast<const typename G::type*>(a.grad) + k * a.dim;
      for (int64_t i = 0; i < (end - k) * a.dim; ++i) sums[i] = G::get(from + i);
    }
    for (int64_t r = k; r < end; ++r) {
      Ahead<T>::fetch(ahead, r + ahead.rows);
      update_row<T, R, Random>(a, a.touched[r], g + (r - k) * a.dim);
    }
  }
}

template <class T, class G, Rule R, bool Random>
void update_all(const RowUpdateArgs& a) {
  const double row = a.dim * (a.rule == Rule::adam ? 0.6 : 0.3) + 10;
  const double cost = a.count * row + (a.starts ? a.starts[a.count] * (4 + a.dim / 4.0) : 0.0);
  const int64_t grain = cost <= 40e3 ? a.count : static_cast<int64_t>(a.count / (cost / 40e3)) + 1;
  team_ranges(a.count, grain, cost, [&](int64_t k0, int64_t k1) { update_range<T, G, R, Random>(a, k0, k1); });
}

template <class T, class G, Rule R>
void with_rounding(const RowUpdateArgs& a) {
  if (a.stochastic && a.dtype == DType::bf16) return update_all<BF16, G, R, true>(a);
  update_all<T, G, R, false>(a);
}

template <class T, class G>
void with_rule(const RowUpdateArgs& a) {
  switch (a.rule) {
    case Rule::momentum: return with_rounding<T, G, Rule::momentum>(a);
    case Rule::adagrad: return with_rounding<T, G, Rule::adagrad>(a);
    case Rule::rowwise_adagrad: return with_rounding<T, G, Rule::rowwise_adagrad>(a);
    case Rule::adam: return with_rounding<T, G, Rule::adam>(a);
    default: return with_rounding<T, G, Rule::sgd>(a);
  }
}

template <class T>
void with_gradient(const RowUpdateArgs& a) {
  switch (a.grad_dtype) {
    case DType::f16: return with_rule<T, F16>(a);
    case DType::bf16: return with_rule<T, BF16>(a);
    default: return with_rule<T, F32>(a);
  }
}

}  // namespace

void row_update(const RowUpdateArgs& a) {
  *a.bad = -1;
  if (!a.starts) {
    int64_t before = -1;
    for (int64_t k = 0; k < a.count; ++k) {
      const int64_t row = a.touched[k];
      if (row < 0 || row >= a.rows) {
        *a.bad = k;
        return;
      }
      if (row <= before) {
        if (*a.bad == -1) *a.bad = -2 - k;  // an id out of range further on comes first
      }
      before = row;
    }
    if (*a.bad != -1) return;
  }
  if (a.count == 0 || a.dim == 0) return;
  switch (a.dtype) {
    case DType::f16: return with_gradient<F16>(a);
    case DType::bf16: return with_gradient<BF16>(a);
    default: return with_gradient<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
