// Bags of rows of a pruned table in compressed sparse rows, and their gradients, on CUDA; see bag_csr.h.
//
// Forward, a warp takes a bag and adds its rows, one after the other in the order of the ids, to sums in shared memory:
// the columns of a row differ, so no two threads meet. Limit: three random reads a row.
// An indptr that decreases or leaves [0, nnz] counts as an empty row, an id outside the table makes its bag NaN.
#include "gather/bag_csr.h"

#include "common/device.cuh"
#include "gather/row_sums.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct Csr {
  Ids indptr;
  const void* columns;
  int column_bytes;
  int64_t rows, dim, nnz;

  __device__ __forceinline__ void range(int64_t row, int64_t* begin, int64_t* end) const {
    *begin = indptr[row];
    *end = indptr[row + 1];
    if (*begin < 0 || *end > nnz || *begin > *end) *begin = *end = 0;
  }
  __device__ __forceinline__ int64_t column(int64_t k) const {
    if (column_bytes == 1) return static_cast<const uint8_t*>(columns)[k];
    if (column_bytes == 2) return static_cast<const uint16_t*>(columns)[k];
    return static_cast<const uint32_t*>(columns)[k];
  }
};

Csr csr_of(const CsrTable& t) { return Csr{{t.indptr, t.wide}, t.columns, t.column_bytes, t.rows, t.dim, t.nnz}; }

// 6 blocks: given no number, ptxas would spill for sm_80 so that more of them fit.
template <class T>
__global__ void __launch_bounds__(kThreads, 6)
    csr_kernel(BagView b, Csr t, const T* values, const float* weights, bool mean, T* out) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int64_t bag = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (bag >= b.bags) return;
  float* sums = dynamic_shared<float>() + warp * t.dim;
  for (int64_t c = lane; c < t.dim; c += 32) sums[c] = 0;
  __syncwarp();
  int64_t begin, end, count = 0;
  bool good = b.range(bag, &begin, &end);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = b.ids[i];
    if (b.padding_idx >= 0 && id == b.padding_idx) continue;
    ++count;
    if (id < 0 || id >= t.rows) {
      good = false;
      continue;
    }
    const float w = weights ? weights[i] : 1.0f;
    int64_t first, last;
    t.range(id, &first, &last);
    for (int64_t k = first + lane; k < last; k += 32) {
      const int64_t c = t.column(k);
      if (c < t.dim) sums[c] = fmaf(w, to_float(values[k]), sums[c]);
    }
    __syncwarp();  // the next row may have the same columns in other threads
  }
  const float factor = mean && count > 1 ? 1.0f / static_cast<float>(count) : 1.0f;
  for (int64_t c = lane; c < t.dim; c += 32)
    out[bag * t.dim + c] = from_float<T>(good ? sums[c] * factor : quiet_nan());
}

// A warp takes a touched row and adds up the gradient of each of its values, in the order of the entries.
template <class T>
__global__ void __launch_bounds__(kThreads)
    csr_grad_kernel(Csr t, Entries e, const int64_t* touched, const int32_t* starts, const int64_t* count,
                    const T* grad_out, const float* weights, const float* bag_factor, T* grad_values) {
  const int64_t k = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x & 31;
  if (k >= *count) return;
  int64_t first, last;
  t.range(touched[k], &first, &last);
  const int begin = starts[k], end = starts[k + 1];
  for (int64_t v = first + lane; v < last; v += 32) {
    const int64_t c = t.column(v);
    float sum = 0;
    if (c < t.dim) {
#pragma unroll 4
      for (int p = begin; p < end; ++p) {
        const int32_t value = e.values[p];
        const int64_t bag = e.bag_of(value);
        float f = weights ? weights[value] : 1.0f;
        if (bag_factor) f *= bag_factor[bag];
        sum = fmaf(f, to_float(grad_out[bag * t.dim + c]), sum);
      }
    }
    grad_values[v] = from_float<T>(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    csr_dot_kernel(BagView b, Csr t, const T* values, const T* grad_out, float* grad_weights) {
  const int64_t bag = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x & 31;
  if (bag >= b.bags) return;
  int64_t begin, end;
  if (!b.range(bag, &begin, &end)) return;
  for (int64_t i = begin + blockIdx.y; i < end; i += gridDim.y) {
    const int64_t id = b.ids[i];
    if (b.padding_idx >= 0 && id == b.padding_idx) continue;  // stays 0
    const bool here = id >= 0 && id < t.rows;
    int64_t first = 0, last = 0;
    if (here) t.range(id, &first, &last);
    float sum = 0;
    for (int64_t k = first + lane; k < last; k += 32) {
      const int64_t c = t.column(k);
      if (c < t.dim) sum = fmaf(to_float(values[k]), to_float(grad_out[bag * t.dim + c]), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) grad_weights[i] = here ? sum : quiet_nan();
  }
}

template <class T>
void forward(const BagCsrArgs& a, const Launch& l) {
  const int64_t bytes = a.table.dim * static_cast<int64_t>(sizeof(float)), limit = shared_limit(l.device);
  if (bytes > limit) throw std::length_error("lutra: bag_csr on CUDA: the sums of a row exceed shared memory");
  int warps = kThreads / 32;  // as many as fit, and leave room for other blocks
  while (warps > 1 && warps * bytes > 32 * 1024) warps /= 2;
  launch("bag_csr", csr_kernel<T>, grid_x(div_up(a.bag.bags, warps)), warps * 32, static_cast<size_t>(warps * bytes), l,
         view_of(a.bag), csr_of(a.table), static_cast<const T*>(a.table.values), a.weights, a.bag.mode == Mode::mean,
         static_cast<T*>(a.out));
}

struct GradArrays {
  RowPlan plan;
  int64_t* touched;
  int32_t* starts;
  int64_t* count;
  float* factors;
  int64_t bytes;
};
GradArrays grad_arrays(const BagIds& b, bool weighted, void* workspace) {
  Carve c(workspace);
  GradArrays s;
  s.plan = take_plan(&c, b, weighted, true);
  s.touched = c.take<int64_t>(b.n_ids);
  s.starts = c.take<int32_t>(b.n_ids + 1);
  s.count = c.take<int64_t>(1);
  s.factors = b.mode == Mode::mean ? c.take<float>(b.bags) : nullptr;
  s.bytes = c.used();
  return s;
}

template <class T>
void backward(const CsrGradArgs& a, const Launch& l) {
  const GradArrays s = grad_arrays(a.bag, a.weights != nullptr, l.workspace);
  fill_zero("bag_csr_backward", a.grad_values, static_cast<size_t>(a.table.nnz) * sizeof(T), l);
  if (a.bag.n_ids == 0) return;
  sort_rows(s.plan, a.bag, a.table.rows, l);
  number_rows(s.plan, 32, s.touched, s.starts, s.count, l);
  if (s.factors) bag_factors(a.bag, s.factors, l);
  launch("bag_csr_backward", csr_grad_kernel<T>, grid_x(div_up(a.bag.n_ids, kThreads / 32)), kThreads, 0, l,
         csr_of(a.table), entries_of(s.plan), s.touched, s.starts, s.count, static_cast<const T*>(a.grad_out),
         a.weights, s.factors, static_cast<T*>(a.grad_values));
}

template <class T>
void weight_grad(const BagCsrWeightGradArgs& a, const Launch& l) {
  fill_zero("bag_csr_weight_grad", a.grad_weights, static_cast<size_t>(a.bag.n_ids) * sizeof(float), l);
  int64_t split = a.bag.bags > 0 ? 8192 / a.bag.bags : 1;  // enough warps where bags are few and long
  split = split < 1 ? 1 : split > 1024 ? 1024 : split;
  launch("bag_csr_weight_grad", csr_dot_kernel<T>,
         dim3(grid_x(div_up(a.bag.bags, kThreads / 32)), static_cast<unsigned>(split)), kThreads, 0, l, view_of(a.bag),
         csr_of(a.table), static_cast<const T*>(a.table.values), static_cast<const T*>(a.grad_out), a.grad_weights);
}

}  // namespace

void bag_csr(const BagCsrArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.table.dtype) {
    case DType::f16: return forward<__half>(a, l);
    case DType::bf16: return forward<__nv_bfloat16>(a, l);
    default: return forward<float>(a, l);
  }
}

int64_t csr_grad_workspace(const CsrGradArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  return grad_arrays(a.bag, a.weights != nullptr, nullptr).bytes;
}

void csr_grad(const CsrGradArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.table.dtype) {
    case DType::f16: return backward<__half>(a, l);
    case DType::bf16: return backward<__nv_bfloat16>(a, l);
    default: return backward<float>(a, l);
  }
}

void bag_csr_weight_grad(const BagCsrWeightGradArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.table.dtype) {
    case DType::f16: return weight_grad<__half>(a, l);
    case DType::bf16: return weight_grad<__nv_bfloat16>(a, l);
    default: return weight_grad<float>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
