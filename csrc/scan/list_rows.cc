#include "scan/list_rows.h"

#include "scan/list_tile.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <Metric M, class T>
void item(const ListRowsArgs& a, const Plan& plan, const ListItem& w, int64_t q0, Selection* s) {
  constexpr int64_t kGroup = kTile * W;  // rows that stay in the L1 for all queries of the item
  const auto* x = static_cast<const typename T::type*>(a.x);
  const float* queries = a.q + q0 * a.ldq;
  if (w.last - w.first == 1) {
    const int64_t query = plan.place(w.first) / a.lists.nprobe;
    const float* q = queries + query * a.ldq;
    return offer_tiles<M, T, 1, kTileAlone>(a.lists, &q, &query, x, a.d, 0, w.begin, w.end, true, s);
  }
  for (int64_t begin = w.begin; begin < w.end; begin += kGroup) {
    const int64_t end = begin + kGroup < w.end ? begin + kGroup : w.end;
    offer_group<M, T>(a.lists, plan, w, queries, a.ldq, x, a.d, 0, begin, end, true, s);
  }
}

template <Metric M, class T>
void search(const ListRowsArgs& a) {
  search_items<M>(a.lists, a.d, [&](const Plan& plan, const ListItem& w, int64_t q0, int, Selection* s) {
    item<M, T>(a, plan, w, q0, s);
  });
}

template <Metric M>
void of_type(const ListRowsArgs& a) {
  switch (a.dtype) {
    case DType::f16: return search<M, F16>(a);
    case DType::bf16: return search<M, BF16>(a);
    case DType::i8: return search<M, I8>(a);
    default: return search<M, F32>(a);
  }
}

}  // namespace

void list_rows(const ListRowsArgs& a) {
  if (a.lists.metric == Metric::l2)
    of_type<Metric::l2>(a);
  else
    of_type<Metric::ip>(a);
}

}  // namespace LUTRA_NS
}  // namespace lutra
