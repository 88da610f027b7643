#include "common/parallel.h"
#include "gather/entry_grads.h"
#include "gather/packed.h"
#include "gather/packed_rows.h"
#include "gather/rows.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// <g, row>: the codes of a group times g, times its scale; its minimum times the sum of g over it. g is padded with
// zeros to whole vectors.
template <Packed K>
LUTRA_INLINE float dot(const PackedTable& t, const uint8_t* row, const float* g, const float* sums) {
  typedef PackedCodes<K> C;
  const uint8_t* groups = C::groups(t, row);
  vf total = {};
  float rest = 0;
  for (int64_t c = 0, k = 0; c < t.dim; ++k) {
    const int64_t end = c + t.group < t.dim ? c + t.group : t.dim;
    const Affine a = C::group_at(groups, k);
    vf even = {}, odd = {};
    for (; c + 2 * W <= end; c += 2 * W) {
      even += load(g + c) * C::load(row, c);
      odd += load(g + c + W) * C::load(row, c + W);
    }
    for (; c + W <= end; c += W) even += load(g + c) * C::load(row, c);
    if (c < end) odd += load(g + c) * C::load_part(row, c, static_cast<int>(end - c));
    c = end;
    total += (even + odd) * a.scale;
    if (C::has_minimum) rest += a.minimum * sums[k];
  }
  return reduce_add(total) + rest;
}

template <Packed K, class G, class Id>
void weight_grads(const BagPackedWeightGradArgs& a, const BagBounds& bounds, const Id* ids, int64_t b0, int64_t b1,
                  BadFirst* bad) {
  const PackedTable& t = a.table;
  const int64_t padded = (t.dim + W - 1) / W * W, groups = (t.dim + t.group - 1) / t.group;
  Buffer<float> g(padded), sums(groups);
  const int64_t last = bounds.begin(b1), ahead = rows_ahead(t.row_bytes);
  const int64_t reach = t.row_bytes < 2048 ? t.row_bytes : 2048;
  for (int64_t j = t.dim; j < padded; ++j) g[j] = 0;
  for (int64_t b = b0; b < b1; ++b) {
    const auto* grad = static_cast<const typename G::type*>(a.grad_out) + b * t.dim;
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t end = (k + 1) * t.group < t.dim ? (k + 1) * t.group : t.dim;
      float total = 0;
      for (int64_t j = k * t.group; j < end; ++j) total += g[j] = G::get(grad + j);
      sums[k] = total;
    }
    for (int64_t e = bounds.begin(b), end = bounds.begin(b + 1); e < end; ++e) {
      if (e + ahead < last && reach) {  // an id that is out of range is only prefetched, which cannot fault
        const auto* next = reinterpret_cast<const char*>(t.data) +
                           static_cast<uint64_t>(ids[e + ahead]) * static_cast<uint64_t>(t.row_bytes);
        for (int64_t c = 0; c < reach; c += 64) prefetch_far(next + c);
        prefetch_far(next + reach - 1);
      }
      const int64_t id = ids[e];
      if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(t.rows)) return bad->report(e);
      a.grad_weights[e] = id == a.bag.padding_idx ? 0 : dot<K>(t, t.data + id * t.row_bytes, g.data, sums.data);
    }
  }
}

template <Packed K>
struct Work {
  const BagPackedWeightGradArgs& a;
  const BagBounds& bounds;
  BadFirst* bad;
  template <class G>
  void run() const {
    each_entry(a.bag, bounds, a.grad_weights, 1, 10 + static_cast<double>(a.table.dim) * 0.2,
               [&](const auto* ids, int64_t b0, int64_t b1) { weight_grads<K, G>(a, bounds, ids, b0, b1, bad); });
  }
};

}  // namespace

void bag_packed_weight_grad(const BagPackedWeightGradArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  BadFirst bad;
  switch (a.table.kind) {
    case Packed::int8: of_grads(a.grad_dtype, Work<Packed::int8>{a, bounds, &bad}); break;
    case Packed::int4: of_grads(a.grad_dtype, Work<Packed::int4>{a, bounds, &bad}); break;
    case Packed::int2: of_grads(a.grad_dtype, Work<Packed::int2>{a, bounds, &bad}); break;
    case Packed::nf4: of_grads(a.grad_dtype, Work<Packed::nf4>{a, bounds, &bad}); break;
    case Packed::e4m3: of_grads(a.grad_dtype, Work<Packed::e4m3>{a, bounds, &bad}); break;
    case Packed::e5m2: of_grads(a.grad_dtype, Work<Packed::e5m2>{a, bounds, &bad}); break;
  }
  *a.bad = bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
