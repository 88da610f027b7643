// The table's gradient from a sorted plan: each touched row is the sum of the gradients of its bags.
#include "gather/bag.h"

#include "common/team.h"
#include "gather/segment_sums.h"
#include "gather/touched.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

template <class T>
void backward(const BagBackwardArgs& a) {
  const int64_t count = *a.count, size = static_cast<int64_t>(sizeof(typename T::type));
  const int64_t row_bytes = a.dim * size;
  auto* out = static_cast<typename T::type*>(a.grad_table);
  const bool past = a.dim % W == 0 && reinterpret_cast<uintptr_t>(out) % (W * sizeof(*out)) == 0 &&
                    (a.dense ? a.rows : count) * row_bytes > (4 << 20) && !(a.dense && row_bytes < 256);
  const SegmentSums plan{a.order,    a.starts, a.touched,  a.bag_of, a.bag_scale, a.weights, a.argmax,
                         a.grad_out, a.dim,    a.bag.mode, a.dense,  0,           past};
  const double sums = static_cast<double>(a.starts[count]) * (4 + static_cast<double>(row_bytes) / 16);
  if (!a.dense) {
    const int64_t grain = sums <= 40e3 ? count : static_cast<int64_t>(count / (sums / 40e3)) + 1;
    team_ranges(count, grain, sums, [&](int64_t k0, int64_t k1) { sum_segments<T, T>(plan, out, k0, k1); });
    return;
  }
  auto* bytes = static_cast<char*>(a.grad_table);
  const double cost = sums + static_cast<double>(a.rows) * static_cast<double>(row_bytes) / 10;
  const int64_t grain = cost <= 100e3 ? a.rows : static_cast<int64_t>(a.rows / (cost / 100e3)) + 1;
  team_ranges(a.rows, grain, cost, [&](int64_t r0, int64_t r1) {
    const int64_t k0 = lower_bound(a.touched, count, r0), k1 = lower_bound(a.touched, count, r1);
    int64_t row = r0;
    if (row_bytes < 256) {  // a call for each gap costs more than writing thin rows twice
      memset(bytes + r0 * row_bytes, 0, static_cast<size_t>((r1 - r0) * row_bytes));
      return sum_segments<T, T>(plan, out, k0, k1);
    }
    for (int64_t k = k0; k < k1; row = a.touched[k++] + 1)  // zeros up to the next touched row
      memset(bytes + row * row_bytes, 0, static_cast<size_t>((a.touched[k] - row) * row_bytes));
    memset(bytes + row * row_bytes, 0, static_cast<size_t>((r1 - row) * row_bytes));
    sum_segments<T, T>(plan, out, k0, k1);
  });
}

}  // namespace

void bag_backward(const BagBackwardArgs& a) {
  switch (a.grad_dtype) {
    case DType::f16: return backward<F16>(a);
    case DType::bf16: return backward<BF16>(a);
    default: return backward<F32>(a);
  }
}

}  // namespace LUTRA_NS
}  // namespace lutra
