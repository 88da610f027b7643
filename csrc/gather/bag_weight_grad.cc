#include "common/parallel.h"
#include "gather/bag.h"
#include "gather/entry_grads.h"
#include "gather/rows.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// <g, row>, in four partial sums of vectors: the same order for every row, whatever else runs.
template <class T>
LUTRA_INLINE float dot(const float* g, const typename T::type* row, int64_t dim) {
  vf a = {}, b = {}, c = {}, d = {};
  int64_t j = 0;
  for (; j + 4 * W <= dim; j += 4 * W) {
    a += load(g + j) * T::load(row + j);
    b += load(g + j + W) * T::load(row + j + W);
    c += load(g + j + 2 * W) * T::load(row + j + 2 * W);
    d += load(g + j + 3 * W) * T::load(row + j + 3 * W);
  }
  for (; j + W <= dim; j += W) a += load(g + j) * T::load(row + j);
  float rest = 0;
  for (; j < dim; ++j) rest += g[j] * T::get(row + j);
  return reduce_add((a + b) + (c + d)) + rest;
}

template <class T, class G, class Id>
void weight_grads(const BagWeightGradArgs& a, const BagBounds& bounds, const Id* ids, int64_t b0, int64_t b1,
                  BadFirst* bad) {
  constexpr int kAhead = 8;
  Buffer<float> g(a.dim);
  const auto* table = static_cast<const typename T::type*>(a.table);
  const int64_t last = bounds.begin(b1), row_bytes = a.dim * static_cast<int64_t>(sizeof(*table));
  for (int64_t b = b0; b < b1; ++b) {
    const auto* grad = static_cast<const typename G::type*>(a.grad_out) + b * a.dim;
    float total = 0;
    for (int64_t j = 0; j < a.dim; ++j) g[j] = G::get(grad + j);
    if (is_code<T>::value)
      for (int64_t j = 0; j < a.dim; ++j) total += g[j];
    for (int64_t e = bounds.begin(b), end = bounds.begin(b + 1); e < end; ++e) {
      if (e + kAhead < last) {  // an id that is out of range is only prefetched, which cannot fault
        const auto* next =
            reinterpret_cast<const char*>(table) + static_cast<uint64_t>(ids[e + kAhead]) * a.ld * sizeof(*table);
        for (int64_t c = 0; c < row_bytes && c < 1024; c += 64) __builtin_prefetch(next + c);
      }
      const int64_t id = ids[e];
      if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(a.rows)) {
        bad->report(e);
        return;
      }
      if (id == a.bag.padding_idx) {
        a.grad_weights[e] = 0;
        continue;
      }
      const float product = dot<T>(g.data, table + id * a.ld, a.dim);
      a.grad_weights[e] = is_code<T>::value ? a.minimum[id] * total + a.scale[id] * product : product;
    }
  }
}

template <class T>
struct Work {
  const BagWeightGradArgs& a;
  const BagBounds& bounds;
  BadFirst* bad;
  template <class G>
  void run() const {
    each_entry(a.bag, bounds, a.grad_weights, 1, 10 + static_cast<double>(a.dim) * 0.25,
               [&](const auto* ids, int64_t b0, int64_t b1) { weight_grads<T, G>(a, bounds, ids, b0, b1, bad); });
  }
};

}  // namespace

void bag_weight_grad(const BagWeightGradArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  BadFirst bad;
  switch (a.dtype) {
    case DType::f16: of_grads(a.grad_dtype, Work<F16>{a, bounds, &bad}); break;
    case DType::bf16: of_grads(a.grad_dtype, Work<BF16>{a, bounds, &bad}); break;
    case DType::u8: of_grads(a.grad_dtype, Work<U8>{a, bounds, &bad}); break;
    case DType::i8: of_grads(a.grad_dtype, Work<I8>{a, bounds, &bad}); break;
    default: of_grads(a.grad_dtype, Work<F32>{a, bounds, &bad}); break;
  }
  *a.bad = bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
