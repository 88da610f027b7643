#include "gather/row_update.h"

#include "common/team.h"
#include "gather/row_step.h"
#include "gather/segment_sums.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

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
