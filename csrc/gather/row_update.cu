// Optimizer steps on CUDA: ids are sorted by row, each row's gradient is summed, and the group of threads that has the
// sum updates the row and its state. No gradient is written. Rules and rounding are those of row_update.h.
//
// Limit: reading and writing the touched rows and their state, and reading the gradients of the bags.
// Overflow: as in row_plan.cuh; row and state offsets are 64-bit.
#include "gather/row_update.h"

#include "common/device.cuh"
#include "gather/row_step.cuh"
#include "gather/row_sums.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kSlabs = 4;  // vectors of a thread where a group must see whole rows

// Approximations of 1 to 2 units in the last place: exact division and root are subroutines.
__device__ __forceinline__ float root(float x) { return sqrt_approx(x); }

struct Step {
  Rule rule;
  float lr, shrink, a, b, eps, scale;
  bool stochastic;
  uint64_t seed;
};

template <class W>
struct Update {
  W* table;
  float* s0;
  float* s1;
  int64_t dim;
  Step step;
  bool ahead;  // fetch rows into the L2 cache before they are taken; with two states that costs more than it gives

  static constexpr bool kPrefetch = true;
  static constexpr int kBlocks = 3;
  __device__ __forceinline__ void prefetch(uint32_t row, int64_t column) const {
    if (column >= dim || !ahead) return;
    const int64_t at = static_cast<int64_t>(row) * dim + column;
    prefetch_l2(table + at);
    if (step.rule == Rule::rowwise_adagrad) {
      if (column == 0) prefetch_l2(s0 + row);
      return;
    }
    if (s0) prefetch_l2(s0 + at);
    if (s1) prefetch_l2(s1 + at);
  }

  template <int VEC, int CH>
  __device__ __forceinline__ void take(uint32_t row, int, int64_t column, int64_t by, const float (&sum)[CH][VEC],
                                       const Group& group) const {
    const int64_t base = static_cast<int64_t>(row) * dim;
    const Rule rule = CH > 1 ? Rule::rowwise_adagrad : step.rule;  // see run(): no other needs a row's whole sum
    float rate = step.lr;
    if (rule == Rule::rowwise_adagrad) {
      float squares = 0;
#pragma unroll
      for (int c = 0; c < CH; ++c) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) squares = fmaf(sum[c][j], sum[c][j], squares);
      }
      const float total = s0[row] + group.sum(squares) / static_cast<float>(dim);  // all have read it before one writes
      __syncwarp(group.mask);
      if (group.lane == 0) s0[row] = total;
      rate = __fdividef(step.lr, root(total) + step.eps);
    }
    const uint32_t key = step.stochastic ? row_key(step.seed, row) : 0;
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const int64_t at = column + c * by;
      if (at >= dim) continue;
      float x[VEC];
      load_values<VEC>(table + base + at, x);
#pragma unroll
      for (int j = 0; j < VEC; ++j) x[j] *= step.shrink;
      switch (rule) {
        case Rule::momentum: {
          float m[VEC];
          load_values<VEC>(s0 + base + at, m);
#pragma unroll
          for (int j = 0; j < VEC; ++j) {
            m[j] = fmaf(m[j], step.a, sum[c][j]);
            x[j] = fmaf(-rate, m[j], x[j]);
          }
          store_stream<float, VEC>(s0 + base + at, m);
          break;
        }
        case Rule::adagrad: {
          float s[VEC];
          load_values<VEC>(s0 + base + at, s);
#pragma unroll
          for (int j = 0; j < VEC; ++j) {
            s[j] = fmaf(sum[c][j], sum[c][j], s[j]);
            x[j] -= __fdividef(sum[c][j] * rate, root(s[j]) + step.eps);
          }
          store_stream<float, VEC>(s0 + base + at, s);
          break;
        }
        case Rule::adam: {
          float m[VEC], v[VEC];
          load_values<VEC>(s0 + base + at, m);
          load_values<VEC>(s1 + base + at, v);
#pragma unroll
          for (int j = 0; j < VEC; ++j) {
            m[j] = fmaf(sum[c][j] - m[j], step.a, m[j]);
            v[j] = fmaf(sum[c][j] * sum[c][j] - v[j], step.b, v[j]);
            x[j] -= __fdividef(m[j] * rate, root(v[j]) * step.scale + step.eps);
          }
          store_stream<float, VEC>(s0 + base + at, m);
          store_stream<float, VEC>(s1 + base + at, v);
          break;
        }
        default:
#pragma unroll
          for (int j = 0; j < VEC; ++j) x[j] = fmaf(-rate, sum[c][j], x[j]);
      }
      if (step.stochastic) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) x[j] = round_randomly(x[j], key, at + j);
      }
      store_stream<W, VEC>(table + base + at, x);
    }
  }
};

struct UpdateArrays {
  RowPlan plan;
  float* factors;
  float* partial;
  int tile;
  int64_t bytes;
};
UpdateArrays update_arrays(const BagUpdateArgs& a, void* workspace) {
  Carve c(workspace);
  UpdateArrays s;
  s.plan = take_plan(&c, a.bag, a.step.weights != nullptr, false);
  const bool counted = a.bag.mode == Mode::mean && (a.bag.offsets || a.bag.padding_idx >= 0);
  s.factors = counted ? c.take<float>(a.bag.bags) : nullptr;
  s.tile = tile_for(a.bag.n_ids, div_up(a.step.dim, a.step.dtype == DType::f32 ? 4 : 8));
  s.partial = c.take<float>(partial_floats(a.bag.n_ids, s.tile, a.step.dim));
  s.bytes = c.used();
  return s;
}

int lanes_for(int64_t dim, int vec) { return power_of_two(div_up(dim, vec), 32); }

template <class W, class G, int VEC>
void run(const RowSums& sums, const BagUpdateArgs& a, const Launch& l) {
  const RowUpdateArgs& r = a.step;
  const Update<W> sink{
      static_cast<W*>(r.table),
      r.s0,
      r.s1,
      r.dim,
      {r.rule, r.lr, r.shrink, r.a, r.b, r.eps, r.scale, r.stochastic && r.dtype == DType::bf16, r.seed},
      r.s1 == nullptr};
  const BagRows<G> source{static_cast<const G*>(r.grad), r.dim};
  const int lanes = lanes_for(r.dim, VEC);
  if (r.rule == Rule::rowwise_adagrad && r.dim > lanes * VEC)
    sum_rows<VEC, kSlabs, false>(sums, source, sink, lanes, "row_update", l);
  else
    sum_rows<VEC, 1, false>(sums, source, sink, lanes, "row_update", l);
}

constexpr int vector_of(DType dtype, DType grad) { return dtype == DType::f32 || grad == DType::f32 ? 4 : 8; }
bool wide(const RowUpdateArgs& r, int vec) {
  return r.dim % vec == 0 && aligned(r.table, 16) && aligned(r.grad, 16) && aligned(r.s0, 16) && aligned(r.s1, 16);
}

template <class W, class G, int WIDE>
void by_width(const RowSums& sums, const BagUpdateArgs& a, const Launch& l) {
  if (wide(a.step, WIDE)) return run<W, G, WIDE>(sums, a, l);
  run<W, G, 1>(sums, a, l);
}

}  // namespace

int64_t bag_update_columns(DType dtype, DType grad, int64_t dim) {
  const int vec = vector_of(dtype, grad);
  return static_cast<int64_t>(32) * kSlabs * (dim % vec == 0 ? vec : 1);
}

int64_t bag_update_workspace(const BagUpdateArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  return update_arrays(a, nullptr).bytes;
}

void bag_update(const BagUpdateArgs& a, const Launch& l) {
  const RowUpdateArgs& r = a.step;
  const bool whole = r.rule == Rule::rowwise_adagrad;
  if (whole && r.dim > 32 * kSlabs * (wide(r, vector_of(r.dtype, r.grad_dtype)) ? vector_of(r.dtype, r.grad_dtype) : 1))
    throw std::length_error("lutra: rowwise_adagrad on CUDA: rows too long");
  const DeviceGuard guard(l.device);
  const UpdateArrays s = update_arrays(a, l.workspace);
  sort_rows(s.plan, a.bag, r.rows, l);
  RowSums sums{entries_of(s.plan), r.dim, r.weights, nullptr, 1.0f, nullptr, nullptr, s.tile, s.partial};
  if (a.bag.mode == Mode::mean) {
    if (s.factors)
      bag_factors(a.bag, s.factors, l);
    else if (a.bag.length > 0)
      sums.factor = 1.0f / static_cast<float>(a.bag.length);
    sums.bag_factor = s.factors;
  }
  const bool single = r.grad_dtype == DType::f32;
  switch (r.dtype) {
    case DType::f16: return single ? by_width<__half, float, 4>(sums, a, l) : by_width<__half, __half, 8>(sums, a, l);
    case DType::bf16:
      return single ? by_width<__nv_bfloat16, float, 4>(sums, a, l)
                    : by_width<__nv_bfloat16, __nv_bfloat16, 8>(sums, a, l);
    default: return by_width<float, float, 4>(sums, a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
