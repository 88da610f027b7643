// Gradients of bag on CUDA: the table's (sort, then sum by segment; see segments.cuh) and the weights'.
//
// Which rows are touched, and how many, stays on the device: the dense gradient never needs the number on the
// host, and a caller who wants the touched rows alone reads it (and waits).
// Ids outside the table and positions that no bag holds are left out of the table's gradient; a weight whose id
// lies outside the table gets a NaN.
//
// Overflow: fewer than 2^31 ids and bags and 2^32 - 1 rows in a call (checked); offsets into rows are 64-bit.
#include "common/device.cuh"
#include "gather/bag.h"
#include "gather/bag_ids.cuh"
#include "gather/segments.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads) keys_kernel(BagView b, int64_t rows, uint32_t* keys, int32_t* bag_of) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= b.n_ids) return;
  const int64_t bag = b.bag_of(i), id = b.ids[i];
  const bool here = bag >= 0 && id >= 0 && id < rows && !(b.padding_idx >= 0 && id == b.padding_idx);
  keys[i] = here ? static_cast<uint32_t>(id) : kNoKey;
  bag_of[i] = bag >= 0 ? static_cast<int32_t>(bag) : 0;
}

// 1 / number of entries of each bag, padding left out; a warp per bag.
__global__ void __launch_bounds__(kThreads) mean_kernel(BagView b, float* factor) {
  const int64_t bag = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (bag >= b.bags) return;
  int64_t begin, end;
  b.range(bag, &begin, &end);
  int64_t count = end - begin;
  if (b.padding_idx >= 0) {
    int mine = 0;
    for (int64_t i = begin + lane; i < end; i += 32) mine += b.ids[i] != b.padding_idx;
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) mine += __shfl_xor_sync(kFullWarp, mine, s);
    count = mine;
  }
  if (lane == 0) factor[bag] = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
}

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

// The gradient has the table's type, or fp32 where the table holds 8-bit codes.
template <class T>
void weight_grad_for(const BagWeightGradArgs& a, const Launch& l) {
  if (a.grad_dtype != a.dtype)
    throw std::invalid_argument("lutra: bag_weight_grad: the gradient must have the table's dtype");
  weight_grad<T, T>(a, l);
}

}  // namespace

int64_t bag_sort_workspace(int64_t n_ids) {
  int64_t bytes = 0;
  sort_arrays(nullptr, n_ids, &bytes);
  return bytes;
}

int64_t bag_backward_workspace(int64_t n_ids, int64_t dim) {
  return partial_floats(n_ids, dim) * static_cast<int64_t>(sizeof(float));
}

void bag_sort(const BagSortArgs& a, const Launch& l) {
  if (a.bag.bags > 0x7fffffff || a.rows >= 0xffffffff)
    throw std::length_error("lutra: CUDA gradients take fewer than 2^31 bags and 2^32 - 1 rows");
  const DeviceGuard guard(l.device);
  const int64_t n = a.bag.n_ids;
  int64_t bytes = 0;
  const SortArrays s = sort_arrays(a.workspace, n, &bytes);
  if (bytes > a.workspace_bytes) throw std::length_error("lutra: the workspace of bag_sort is too small");
  const BagView view = view_of(a.bag);
  launch("bag_sort", keys_kernel, grid_x(div_up(n, kThreads)), kThreads, 0, l, view, a.rows, s.keys_in, s.bag_in);
  sort_positions(s, Segments{a.order, a.starts, a.touched, a.bag_of, a.count}, n, a.rows, 0, l);
  if (a.bag_scale)
    launch("bag_sort", mean_kernel, grid_x(div_up(a.bag.bags, kWarps)), kThreads, 0, l, view, a.bag_scale);
}

void bag_backward(const BagBackwardArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const size_t size = a.grad_dtype == DType::f32 ? 4 : 2;
  if (a.dense) fill_zero("bag_backward", a.grad_table, static_cast<size_t>(a.rows * a.dim) * size, l);
  const bool mean = a.bag.mode == Mode::mean, max = a.bag.mode == Mode::max;
  add_segments(SegmentSum{a.order, a.starts, a.touched, a.bag_of, a.count, a.bag.n_ids, a.dim, a.grad_out, a.grad_dtype,
                          a.weights, mean ? a.bag_scale : nullptr, max ? a.argmax : nullptr, a.dense, a.grad_table,
                          static_cast<float*>(l.workspace)},
               "bag_backward", l);
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
