// Gradients of bag on CUDA: the table's (sort, then sum by row; see row_plan.cuh and row_sums.cuh) and the weights'.
//
// Which rows are touched, and how many, stays on the device: the dense gradient never needs the number, and a caller
// who wants the touched rows alone reads it when all work has been launched.
// Ids outside the table and positions that no bag holds are left out of the table's gradient; a weight whose id
// lies outside the table gets a NaN.
//
// Overflow: fewer than 2^31 ids and bags and 2^32 - 1 rows in a call (checked); offsets into rows are 64-bit.
#include "common/device.cuh"
#include "gather/bag.h"
#include "gather/bag_ids.cuh"
#include "gather/row_sums.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A warp takes every stride-th id of a bag and multiplies its row with the bag's gradient.
template <class T, class G, int VEC>
__global__ void __launch_bounds__(kThreads)
    weight_kernel(BagView b, const T* table, int64_t rows, int64_t dim, int64_t ld, const float* scale,
                  const float* minimum, const G* grad_out, float* grad_weights) {
  const int64_t bag = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (bag >= b.bags) return;
  int64_t begin, end;
  if (!b.range(bag, &begin, &end)) return;
  const G* g = grad_out + bag * dim;
  for (int64_t i = begin + blockIdx.y; i < end; i += gridDim.y) {
    const int64_t id = b.ids[i];
    if (b.padding_idx >= 0 && id == b.padding_idx) continue;  // stays 0
    float dot = 0, total = 0;
    const bool here = id >= 0 && id < rows;
    if (here) {
      const T* row = table + id * ld;
      for (int64_t j = static_cast<int64_t>(lane) * VEC; j < dim; j += 32 * VEC) {
        const auto r = load_pack<T, VEC>(row + j);
        const auto v = load_pack<G, VEC>(g + j);
#pragma unroll
        for (int u = 0; u < VEC; ++u) {
          dot = fmaf(r[u], v[u], dot);
          if (sizeof(T) == 1) total += v[u];
        }
      }
    }
    dot = warp_sum(dot);
    if (sizeof(T) == 1) {
      total = warp_sum(total);
      if (here) dot = fmaf(scale[id], dot, minimum[id] * total);
    }
    if (lane == 0) grad_weights[i] = here ? dot : quiet_nan();
  }
}

template <class T, int VEC>
void store_rows(const RowSums& sums, const BagGradArgs& a, const Launch& l) {
  const BagRows<T> source{static_cast<const T*>(a.grad_out), a.dim};
  const StoreRows<T> sink{static_cast<T*>(a.grad), a.dim, a.dense};
  const int lanes = power_of_two(div_up(a.dim, VEC), 32);
  if (sums.argmax)
    sum_rows<VEC, 1, true>(sums, source, sink, lanes, "bag_grad", l);
  else
    sum_rows<VEC, 1, false>(sums, source, sink, lanes, "bag_grad", l);
}

template <class T, int WIDE>
void store_by_width(const RowSums& sums, const BagGradArgs& a, const Launch& l) {
  if (a.dim % WIDE == 0 && aligned(a.grad_out, 16) && aligned(a.grad, 16)) return store_rows<T, WIDE>(sums, a, l);
  store_rows<T, 1>(sums, a, l);
}

struct GradArrays {
  RowPlan plan;
  float* factors;  // of bags, for means of unknown size
  float* partial;
  int tile;
  int64_t bytes;
};
GradArrays grad_arrays(const BagGradArgs& a, void* workspace) {
  Carve c(workspace);
  GradArrays s;
  s.plan = take_plan(&c, a.bag, a.weights != nullptr, !a.dense);
  const bool counted = a.bag.mode == Mode::mean && (a.bag.offsets || a.bag.padding_idx >= 0);
  s.factors = counted ? c.take<float>(a.bag.bags) : nullptr;
  s.tile = tile_for(a.bag.n_ids, div_up(a.dim, a.grad_dtype == DType::f32 ? 4 : 8));
  s.partial = c.take<float>(partial_floats(a.bag.n_ids, s.tile, a.dim));
  s.bytes = c.used();
  return s;
}

template <class T, class G>
void weight_grad(const BagWeightGradArgs& a, const Launch& l) {
  const BagView b = view_of(a.bag);
  const auto* table = static_cast<const T*>(a.table);
  const auto* g = static_cast<const G*>(a.grad_out);
  const bool wide = a.dim % 4 == 0 && a.ld % 4 == 0 && aligned(table, 4 * sizeof(T)) && aligned(g, 4 * sizeof(G));
  int64_t split = a.bag.bags > 0 ? 8192 / a.bag.bags : 1;  // enough warps where bags are few and long
  split = split < 1 ? 1 : split > 1024 ? 1024 : split;
  const dim3 grid(grid_x(div_up(b.bags, kWarps)), static_cast<unsigned>(split));
  launch("bag_weight_grad", wide ? weight_kernel<T, G, 4> : weight_kernel<T, G, 1>, grid, kThreads, 0, l, b, table,
         a.rows, a.dim, a.ld, a.scale, a.minimum, g, a.grad_weights);
}

// The gradient (row_dots: the vectors) has the table's type or fp32; fp32 where the table holds 8-bit codes.
template <class T>
void weight_grad_for(const BagWeightGradArgs& a, const Launch& l) {
  if (a.grad_dtype == DType::f32) return weight_grad<T, float>(a, l);
  if (a.grad_dtype != a.dtype)
    throw std::invalid_argument("lutra: bag_weight_grad: the gradient must have the table's dtype or be float32");
  weight_grad<T, T>(a, l);
}

}  // namespace

int64_t bag_grad_workspace(const BagGradArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  return grad_arrays(a, nullptr).bytes;
}

void bag_grad(const BagGradArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const GradArrays s = grad_arrays(a, l.workspace);
  const size_t size = a.grad_dtype == DType::f32 ? 4 : 2;
  sort_rows(s.plan, a.bag, a.rows, l);
  if (!a.dense) number_rows(s.plan, s.tile, a.touched, nullptr, a.count, l);
  if (a.dense) fill_zero("bag_grad", a.grad, static_cast<size_t>(a.rows * a.dim) * size, l);
  RowSums sums{entries_of(s.plan), a.dim, a.weights, nullptr, 1.0f, nullptr, s.plan.tile_number, s.tile, s.partial};
  if (a.bag.mode == Mode::max) sums.argmax = a.argmax;
  if (a.bag.mode == Mode::mean) {
    if (s.factors)
      bag_factors(a.bag, s.factors, l);
    else if (a.bag.length > 0)
      sums.factor = 1.0f / static_cast<float>(a.bag.length);
    sums.bag_factor = s.factors;
  }
  switch (a.grad_dtype) {
    case DType::f16: return store_by_width<__half, 8>(sums, a, l);
    case DType::bf16: return store_by_width<__nv_bfloat16, 8>(sums, a, l);
    default: return store_by_width<float, 4>(sums, a, l);
  }
}

void bag_weight_grad(const BagWeightGradArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  fill_zero("bag_weight_grad", a.grad_weights, static_cast<size_t>(a.bag.n_ids) * sizeof(float), l);
  switch (a.dtype) {
    case DType::f16: return weight_grad_for<__half>(a, l);
    case DType::bf16: return weight_grad_for<__nv_bfloat16>(a, l);
    case DType::u8: return weight_grad<uint8_t, float>(a, l);
    case DType::i8: return weight_grad<int8_t, float>(a, l);
    default: return weight_grad_for<float>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
