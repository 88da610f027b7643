#include "gather/bag.h"

#include "common/parallel.h"
#include "common/team.h"
#include "gather/bag_ids.h"
#include "gather/entries.h"
#include "gather/rows.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// The maxima of a bag and, in argmax, the ids that gave them first. Used by the gradient of max only.
template <class T>
void bag_argmax(const RowTable<T>& t, const RowList& rows, int64_t dim, float* best, int64_t* argmax) {
  for (int64_t j = 0; j < dim; ++j) argmax[j] = -1;
  for (int64_t i = 0; i < rows.n; ++i) {
    const int64_t r = rows.index[i];
    const auto* p = t.data + r * t.ld;
    const float scale = is_code<T>::value ? t.scale[r] : 1, low = is_code<T>::value ? t.minimum[r] : 0;
    for (int64_t j = 0; j < dim; ++j) {
      const float x = is_code<T>::value ? T::get(p + j) * scale + low : T::get(p + j);
      const bool better = i == 0 || x > best[j] || (x != x && best[j] == best[j]);
      best[j] = better ? x : best[j];
      argmax[j] = better ? r : argmax[j];
    }
  }
}

template <class T, class Id>
void bags(const BagArgs& a, const BagBounds& bounds, int64_t b0, int64_t b1, BadFirst* bad) {
  typedef typename result_of<T>::type Out;
  const Entries entries(a.bag, a.rows, a.weights, bounds, static_cast<const Id*>(a.bag.ids), b0, b1, bad);
  if (entries.failed) return;
  const RowTable<T> t{static_cast<const typename T::type*>(a.table), a.ld, a.scale, a.minimum};
  auto* out = static_cast<typename Out::type*>(a.out) + b0 * a.dim;
  Buffer<float> best(a.argmax ? a.dim : 0);
  const int64_t e0 = bounds.begin(b0);
  // what fits into the second-level cache needs no prefetch
  const bool far = a.rows * a.ld * static_cast<int64_t>(sizeof(typename T::type)) > (1 << 19);
  if (far) prefetch_first(t, RowList{entries.index, nullptr, entries.n, entries.n}, a.dim);
  int64_t begin = 0;
  for (int64_t b = b0; b < b1; ++b, out += a.dim) {
    const int64_t end = entries.compacted ? entries.ends[b - b0] : bounds.begin(b + 1) - e0;
    const RowList list{entries.index + begin, entries.weights + (entries.weights ? begin : 0), end - begin,
                       far ? entries.n - begin : 0};
    begin = end;
    if (a.bag.mode == Mode::max) {
      reduce_rows<T, Reduce::max>(t, list, a.dim, nullptr, 1.0f, out);
      if (a.argmax) bag_argmax<T>(t, list, a.dim, best.data, a.argmax + b * a.dim);
    } else if (entries.weights) {
      reduce_rows<T, Reduce::weighted>(t, list, a.dim, nullptr, 1.0f, out);
    } else {
      const float factor = a.bag.mode == Mode::mean && list.n > 1 ? 1.0f / static_cast<float>(list.n) : 1.0f;
      reduce_rows<T, Reduce::sum>(t, list, a.dim, nullptr, factor, out);
    }
  }
}

template <class T>
void all_bags(const BagArgs& a, const BagBounds& bounds, BadFirst* bad) {
  const int64_t row = a.dim * static_cast<int64_t>(sizeof(typename T::type));
  const double each = 6 + static_cast<double>(row) / 16;  // rough nanoseconds for a row
  const int64_t n = bounds.begin(a.bag.bags) - bounds.begin(0);
  const double cost = static_cast<double>(n) * each + static_cast<double>(a.bag.bags) * 10;
  const double pieces = cost / 60e3;  // of that many nanoseconds
  const int64_t grain = pieces <= 1 ? a.bag.bags : static_cast<int64_t>(a.bag.bags / pieces) + 1;
  team_ranges(a.bag.bags, grain, cost, [&](int64_t b0, int64_t b1) {
    if (a.bag.id_type == DType::i32)
      bags<T, int32_t>(a, bounds, b0, b1, bad);
    else
      bags<T, int64_t>(a, bounds, b0, b1, bad);
  });
}

}  // namespace

void bag(const BagArgs& a) {
  const BagBounds bounds(a.bag);
  *a.bad = bounds.check();
  if (*a.bad != -1) return;
  BadFirst bad;
  switch (a.dtype) {
    case DType::f16: all_bags<F16>(a, bounds, &bad); break;
    case DType::bf16: all_bags<BF16>(a, bounds, &bad); break;
    case DType::u8: all_bags<U8>(a, bounds, &bad); break;
    case DType::i8: all_bags<I8>(a, bounds, &bad); break;
    default: all_bags<F32>(a, bounds, &bad); break;
  }
  *a.bad = bad.result();
}

}  // namespace LUTRA_NS
}  // namespace lutra
