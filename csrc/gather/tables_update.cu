// An optimizer's step on the touched rows of tables on CUDA, many tokens; the formula is in tables_update.h.
//
// The walk of tables_grad.cuh sums each row's gradient in shared memory; where the dense gradient would be written the
// row and its state are updated. Rules that need the whole row (rowwise_adagrad, and the sum of squares) walk twice, or
// only the first time: each tile of columns writes the sum of its squares of each row, and these are added in order.
//
// Limit: as the gradient's, and reading and writing touched rows and their state.
#include "gather/tables_update.h"

#include "gather/row_step.cuh"
#include "gather/tables_grad.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct StepRows {
  T* table;
  float* s0;  // nullptr where a row has none, or one number
  float* s1;
  const float* rates;  // of each row, or nullptr
  int64_t dim;
  RowStep step;
  template <int LANES, int VEC>
  __device__ __forceinline__ void take(int64_t row, int, int64_t column, bool touched, const float (&sum)[VEC]) const {
    if (!touched || column >= dim) return;
    const int64_t at = row * dim + column;
    step_columns<T, VEC>(step, table + at, s0 + at, s1 + at, rates ? rates[row] : step.lr, row, column, sum);
  }
};

struct SquareRows {
  float* partial;  // [tiles][rows]
  int64_t rows;
  template <int LANES, int VEC>
  __device__ __forceinline__ void take(int64_t row, int tile, int64_t, bool, const float (&sum)[VEC]) const {
    float squares = 0;
#pragma unroll
    for (int j = 0; j < VEC; ++j) squares = fmaf(sum[j], sum[j], squares);
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int s = LANES / 2; s > 0; s >>= 1)
      squares += __shfl_xor_sync(((1u << LANES) - 1) << (lane & ~(LANES - 1)), squares, s);
    if (lane % LANES == 0) partial[tile * rows + row] = squares;
  }
};

// The state of rowwise_adagrad, and the rate of each row.
__global__ void __launch_bounds__(kThreads) rate_kernel(const float* partial, int64_t tiles, int64_t rows, int64_t dim,
                                                        float lr, float eps, float* s0, float* rates) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  float sum = 0;
  for (int64_t t = 0; t < tiles; ++t) sum += partial[t * rows + row];
  const float total = s0[row] + sum / static_cast<float>(dim);
  s0[row] = total;
  rates[row] = lr / (sqrtf(total) + eps);
}

// squares[k], a block a table.
__global__ void __launch_bounds__(kThreads)
    square_kernel(const float* partial, int64_t tiles, int64_t rows, int64_t entries, double* squares) {
  __shared__ double sums[kThreads];
  double mine = 0;
  for (int64_t e = threadIdx.x; e < entries; e += kThreads) {
    const int64_t row = blockIdx.x * entries + e;
    for (int64_t t = 0; t < tiles; ++t) mine += static_cast<double>(partial[t * rows + row]);
  }
  sums[threadIdx.x] = mine;
  for (int s = kThreads / 2; s > 0; s >>= 1) {
    __syncthreads();
    if (threadIdx.x < s) sums[threadIdx.x] += sums[threadIdx.x + s];
  }
  if (threadIdx.x == 0) squares[blockIdx.x] = sums[0];
}

struct Update {
  GradSource source;
  GradPlan plan;
  GradLists lists;
  float* partial;  // where squares are wanted
  float* rates;
  int64_t bytes;
};

Update plan_update(const TablesUpdateArgs& a, void* workspace, int device) {
  Update u{};
  const RowUpdateArgs& r = a.step;
  u.source = GradSource{r.grad, r.grad_dtype, a.n_tables, a.entries, r.dim, a.tokens, a.codes, a.weights};
  if (r.grad_dtype != r.dtype && !a.squares) return u;
  u.plan = grad_plan(u.source, device);
  if (u.plan.together <= 0 || !aligned(r.table, 16) || !aligned(r.s0, 16) || !aligned(r.s1, 16)) return u;
  Carve c(workspace);
  u.lists = grad_lists(&c, u.source, u.plan);
  if (a.squares || r.rule == Rule::rowwise_adagrad) {
    u.partial = c.take<float>(u.source.tiles(u.plan.lanes) * a.n_tables * a.entries);
    u.rates = c.take<float>(a.n_tables * a.entries);
  }
  u.bytes = c.used();
  return u;
}

template <class T>
void run(const TablesUpdateArgs& a, const Update& u, const Launch& l) {
  const RowUpdateArgs& r = a.step;
  const int64_t rows = a.n_tables * a.entries, tiles = u.source.tiles(u.plan.lanes);
  const bool rowwise = r.rule == Rule::rowwise_adagrad;
  if (a.squares || rowwise) walk_tables<T>(u.source, u.plan, u.lists, SquareRows{u.partial, rows}, l);
  if (a.squares) {
    launch("tables_update", square_kernel, grid_x(a.n_tables), kThreads, 0, l, u.partial, tiles, rows, a.entries,
           a.squares);
    return;
  }
  if (rowwise)
    launch("tables_update", rate_kernel, grid_x(div_up(rows, kThreads)), kThreads, 0, l, u.partial, tiles, rows, r.dim,
           r.lr, r.eps, r.s0, u.rates);
  const StepRows<T> step{
      static_cast<T*>(r.table), rowwise ? nullptr : r.s0, r.s1, rowwise ? u.rates : nullptr, r.dim, RowStep(r)};
  walk_tables<T>(u.source, u.plan, u.lists, step, l);
}

}  // namespace

int64_t tables_update_workspace(const TablesUpdateArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  return plan_update(a, nullptr, l.device).bytes;
}

void tables_update(const TablesUpdateArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const Update u = plan_update(a, l.workspace, l.device);
  if (!u.bytes) throw std::invalid_argument("lutra: tables_update on CUDA does not serve this call");
  sort_tokens(u.source, u.plan, u.lists, l);
  switch (a.step.grad_dtype) {
    case DType::f16: return run<__half>(a, u, l);
    case DType::bf16: return run<__nv_bfloat16>(a, u, l);
    default: return run<float>(a, u, l);
  }
}

}  // namespace cuda
}  // namespace lutra
