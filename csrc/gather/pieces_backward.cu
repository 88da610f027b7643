// The gradient of the table of pieces on CUDA: every piece of every entry is an entry of its own, whose key is its
// address; these are sorted and summed as the rows of a bag are (row_plan.cuh, row_sums.cuh). Of robe, whose pieces
// begin anywhere, every element is an entry. See pieces.h.
#include "common/device.cuh"
#include "gather/bag_ids.cuh"
#include "gather/pieces.h"
#include "gather/pieces_source.cuh"
#include "gather/row_sums.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Entry e and piece (or element) j at position e * per + j.
template <class T>
__global__ void __launch_bounds__(kThreads)
    piece_keys_kernel(BagView b, DevicePieces s, int per, int64_t width, const float* weights, const T* piece_weights,
                      const float* bag_factor, float factor, uint32_t* keys, int32_t* values, int32_t* bag_at,
                      float* factors) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= b.n_ids * per) return;
  const int64_t e = p / per;
  const int j = static_cast<int>(p - e * per);
  const int64_t id = b.ids[e], bag = b.bag_of(e);
  const bool here = bag >= 0 && id >= 0 && id < s.rows && !(b.padding_idx >= 0 && id == b.padding_idx);
  bool odd = false;
  int64_t at = -1;
  if (here && s.kind == PieceKind::robe) {
    const int piece = static_cast<int>(j / width);
    at = s.address(id, piece, &odd) + (j - piece * width);
    if (at >= s.table_rows) at -= s.table_rows;
  } else if (here) {
    at = s.address(id, j, &odd);
  }
  keys[p] = at >= 0 ? static_cast<uint32_t>(at) : kNoRow;
  values[p] = static_cast<int32_t>(p);
  bag_at[p] = bag >= 0 ? static_cast<int32_t>(bag) : 0;
  if (factors) {
    float f = odd ? -factor : factor;
    if (weights) f *= weights[e];
    if (piece_weights && here) f *= to_float(piece_weights[id * s.m + j]);
    if (bag_factor && bag >= 0) f *= bag_factor[bag];
    factors[p] = f;
  }
}

// Where the gradient of an entry lies; of a product times the other piece.
template <class G>
struct PieceGrads {
  static constexpr int kBlocks = 3;
  template <int VEC>
  struct Raw {
    Pack<G, VEC> g, other;
    bool product;
  };
  const G* source;
  int per;             // pieces of an entry
  int64_t ld, step;    // of a bag; of a piece (0: all take the same columns)
  const uint32_t* at;  // products: addresses by position
  const G* table;      // products: (table_rows, ld)

  template <int VEC>
  __device__ __forceinline__ Raw<VEC> load(int32_t bag, int32_t value, int64_t column) const {
    Raw<VEC> raw;
    raw.g = load_pack<G, VEC>(source + bag * ld + (value % per) * step + column);
    raw.product = at != nullptr;
    if (at) raw.other = load_pack<G, VEC>(table + static_cast<int64_t>(at[value ^ 1]) * ld + column);
    return raw;
  }
  template <int VEC>
  static __device__ __forceinline__ float value(const Raw<VEC>& raw, int j) {
    return raw.product ? raw.g[j] * raw.other[j] : raw.g[j];
  }
};

struct PieceArrays {
  RowPlan plan;
  float* bag_factor;
  float* factors;
  float* partial;
  int tile, per;
  int64_t width, bytes;
};
PieceArrays piece_arrays(const PieceGradArgs& a, void* workspace) {
  Carve c(workspace);
  PieceArrays s;
  const bool robe = a.source.kind == PieceKind::robe, mean = a.bag.mode == Mode::mean;
  s.width = robe ? 1 : a.width;
  s.per = static_cast<int>(robe ? a.source.m * a.width : a.source.m);
  const int64_t n = a.bag.n_ids * s.per;
  s.plan = take_keys(&c, n, false);
  s.bag_factor = mean ? c.take<float>(a.bag.bags) : nullptr;
  s.factors = robe || mean || a.weights || a.piece_weights ? c.take<float>(n) : nullptr;
  s.tile = tile_for(n, div_up(s.width, 4));
  s.partial = c.take<float>(partial_floats(n, s.tile, s.width));
  s.bytes = c.used();
  return s;
}

template <class T, int VEC>
void sum(const PieceGradArgs& a, const PieceArrays& s, const Launch& l) {
  const bool concat = a.combine == Combine::concat, product = a.combine == Combine::product;
  const PieceGrads<T> source{static_cast<const T*>(a.grad_out),  s.per,
                             concat ? s.per * s.width : s.width, concat ? s.width : 0,
                             product ? s.plan.keys_in : nullptr, static_cast<const T*>(a.table)};
  const RowSums sums{entries_of(s.plan), s.width, s.factors, nullptr, 1.0f, nullptr, nullptr, s.tile, s.partial};
  sum_rows<VEC, 1, false>(sums, source, StoreRows<T>{static_cast<T*>(a.grad_table), s.width, true},
                          power_of_two(div_up(s.width, VEC), 32), "pieces_backward", l);
}

template <class T>
void run(const PieceGradArgs& a, const Launch& l) {
  const PieceArrays s = piece_arrays(a, l.workspace);
  fill_zero("pieces_backward", a.grad_table, static_cast<size_t>(a.source.table_rows * s.width) * sizeof(T), l);
  if (s.plan.n == 0) return;
  if (s.bag_factor) bag_factors(a.bag, s.bag_factor, l);
  launch("pieces_backward", piece_keys_kernel<T>, grid_x(div_up(s.plan.n, kThreads)), kThreads, 0, l, view_of(a.bag),
         device_pieces(a.source, a.numbers), s.per, a.width, a.weights, static_cast<const T*>(a.piece_weights),
         s.bag_factor, 1.0f, s.plan.keys_in, s.plan.values_in, s.plan.bag_at, s.factors);
  sort_keys(s.plan, a.source.table_rows, l);
  if (s.width % 4 == 0 && aligned(a.grad_out, 16) && aligned(a.grad_table, 16) && aligned(a.table, 16))
    return sum<T, 4>(a, s, l);
  sum<T, 1>(a, s, l);
}

}  // namespace

int64_t piece_grad_workspace(const PieceGradArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  return piece_arrays(a, nullptr).bytes;
}

void piece_grad(const PieceGradArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.dtype) {
    case DType::f16: return run<__half>(a, l);
    case DType::bf16: return run<__nv_bfloat16>(a, l);
    default: return run<float>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
