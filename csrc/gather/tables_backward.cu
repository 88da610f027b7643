// Gradients of tables on CUDA; the formulas are in tables.h.
//
// Many tokens: tables_grad.cu. Few: (token, table) is a position with key table * entries + code, and the tables'
// gradient is the segment sum of gather/segments.cuh. The weights' gradient is in tables_weight_grad.cu.
//
// Nothing can be raised here: a code outside [0, entries) makes its weight's gradient NaN, and is left out of the
// tables' gradient.
//
// Overflow: row offsets are 64-bit; fewer than 2^31 codes and 2^32 - 1 rows (checked).
#include "common/device.cuh"
#include "gather/segments.cuh"
#include "gather/tables.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    table_keys_kernel(const int32_t* codes, int64_t n, int64_t n_tables, int64_t entries, uint32_t* keys) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const int32_t code = codes[i];
  keys[i] = code >= 0 && code < entries ? static_cast<uint32_t>((i % n_tables) * entries + code) : kNoKey;
}

struct BackwardArrays {
  SortArrays sort;
  Segments segments;
  float* partial;
};
BackwardArrays backward_arrays(void* workspace, int64_t n, int64_t dim, int64_t* bytes) {
  BackwardArrays s;
  int64_t used = 0;
  s.sort = sort_arrays(workspace, n, &used);
  Carve c(workspace ? static_cast<char*>(workspace) + used : nullptr);
  s.segments.order = c.take<int64_t>(n);
  s.segments.starts = c.take<int64_t>(n + 1);
  s.segments.touched = c.take<int64_t>(n);
  s.segments.bag = c.take<int32_t>(n);
  s.segments.count = c.take<int64_t>(1);
  s.partial = c.take<float>(partial_floats(n, dim));
  *bytes = used + c.used();
  return s;
}

void segment_grad(const TablesBackwardArgs& a, const Launch& l) {
  const int64_t n = a.tokens * a.n_tables, rows = a.n_tables * a.entries;
  if (rows >= 0xffffffff) throw std::length_error("lutra: CUDA gradients take fewer than 2^32 - 1 rows of tables");
  int64_t bytes = 0;
  const BackwardArrays s = backward_arrays(l.workspace, n, a.dim, &bytes);
  const size_t size = a.dtype == DType::f32 ? 4 : 2;
  fill_zero("tables_backward", a.grad_tables, static_cast<size_t>(rows * a.dim) * size, l);
  if (n == 0) return;
  launch("tables_backward", table_keys_kernel, grid_x(div_up(n, kThreads)), kThreads, 0, l, a.codes, n, a.n_tables,
         a.entries, s.sort.keys_in);
  const Segments& g = s.segments;
  sort_positions(s.sort, g, n, rows, a.n_tables, l);
  add_segments(SegmentSum{g.order, g.starts, g.touched, g.bag, g.count, n, a.dim, a.grad_out, a.dtype, a.weights,
                          nullptr, nullptr, true, a.grad_tables, s.partial},
               "tables_backward", l);
}

}  // namespace

int64_t tables_backward_workspace(const TablesBackwardArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const int64_t own = tables_grad_workspace(a, l.device);
  if (own) return own;
  int64_t bytes = 0;
  backward_arrays(nullptr, a.tokens * a.n_tables, a.dim, &bytes);
  return bytes;
}

void tables_backward(const TablesBackwardArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  if (a.grad_tables && l.workspace && tables_grad_workspace(a, l.device)) {
    tables_grad(a, l);
  } else if (a.grad_tables) {
    segment_grad(a, l);
  }
  if (a.grad_weights && a.tokens * a.n_tables > 0) tables_weight_grad(a, l);
}

}  // namespace cuda
}  // namespace lutra
