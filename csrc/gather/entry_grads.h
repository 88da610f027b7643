// What is worked out for single entries (gradients of weights, dots and addresses of pieces): entries of no bag get a
// constant, the others go by ranges of bags to the threads.
#pragma once
#include "common/simd.h"
#include "common/team.h"
#include "gather/bag_ids.h"

namespace lutra {
namespace LUTRA_NS {

// fn(ids, b0, b1) for ranges of bags, ids of their own type; `each` values of `out` belong to an entry, which costs
// about `nanoseconds`; those of entries of no bag become `unused`.
template <class Out, class Fn>
static inline void each_entry(const BagIds& bag, const BagBounds& bounds, Out* out, int64_t each, double nanoseconds,
                              const Fn& fn, Out unused = 0) {
  const int64_t first = bounds.begin(0), last = bounds.begin(bag.bags);
  for (int64_t i = 0; i < first * each && i < bag.n_ids * each; ++i) out[i] = unused;
  for (int64_t i = last * each; i < bag.n_ids * each; ++i) out[i] = unused;
  const double cost = static_cast<double>(last - first) * nanoseconds;
  const int64_t grain = cost <= 30e3 ? bag.bags : static_cast<int64_t>(bag.bags / (cost / 30e3)) + 1;
  team_ranges(bag.bags, grain, cost, [&](int64_t b0, int64_t b1) {
    if (bag.id_type == DType::i32)
      fn(static_cast<const int32_t*>(bag.ids), b0, b1);
    else
      fn(static_cast<const int64_t*>(bag.ids), b0, b1);
  });
}

// work.run<G>() for the type of the gradients.
template <class Work>
static inline void of_grads(DType grad, const Work& work) {
  switch (grad) {
    case DType::f16: return work.template run<F16>();
    case DType::bf16: return work.template run<BF16>();
    default: return work.template run<F32>();
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
