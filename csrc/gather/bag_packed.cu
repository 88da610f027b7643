// Bags of packed rows, their decoding, and the gradient of the weights, on CUDA; see packed.h and packed_rows.cuh.
#include "gather/bag_kernel.cuh"
#include "gather/packed_rows.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kVec = kPackedColumns;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Where 8 columns of a result go, as f32, f16 or bf16.
struct PackedOut {
  void* p;
  DType dtype;
  int64_t dim;
  bool whole;  // 8 columns are there, and aligned

  template <class T>
  __device__ __forceinline__ void put(int64_t row, int64_t column, const float* v) const {
    T* to = static_cast<T*>(p) + row * dim + column;
    if (whole) return store_pack<T, kVec>(to, v);
#pragma unroll
    for (int j = 0; j < kVec; ++j)
      if (column + j < dim) to[j] = from_float<T>(v[j]);
  }
  __device__ __forceinline__ void store(int64_t row, int64_t column, const float* v) const {
    if (dtype == DType::f32)
      put<float>(row, column, v);
    else if (dtype == DType::f16)
      put<__half>(row, column, v);
    else
      put<__nv_bfloat16>(row, column, v);
  }
};

PackedOut packed_out(void* p, DType dtype, int64_t dim) {
  return PackedOut{p, dtype, dim, dim % kVec == 0 && aligned(p, 16)};
}

template <Packed K, bool FAST>
struct PackedRows : PackedSource<K, FAST> {
  using Base = PackedSource<K, FAST>;
  using Raw = PackedRaw;
  static constexpr int kBlocks = 4;
  PackedOut out;
  PackedRows(const Base& base, const PackedOut& o) : Base(base), out(o) {}

  __device__ __forceinline__ const float* context(float* shared16) const { return packed_levels<K>(shared16); }
  __device__ __forceinline__ void store(int64_t bag, int64_t column, float (&v)[kVec]) const {
    out.store(bag, column, v);
  }
};

// fn(Source) for the kind, and for how its rows lie.
template <Packed K, class Fn>
void by_layout(const PackedTable& t, const Fn& fn) {
  if (packed_fast(t))
    fn(packed_source<K, true>(t));
  else
    fn(packed_source<K, false>(t));
}
template <class Fn>
void by_kind(const PackedTable& t, const Fn& fn) {
  switch (t.kind) {
    case Packed::int8: return by_layout<Packed::int8>(t, fn);
    case Packed::int4: return by_layout<Packed::int4>(t, fn);
    case Packed::int2: return by_layout<Packed::int2>(t, fn);
    case Packed::nf4: return by_layout<Packed::nf4>(t, fn);
    case Packed::e4m3: return by_layout<Packed::e4m3>(t, fn);
    default: return by_layout<Packed::e5m2>(t, fn);
  }
}

struct RunBag {
  const BagPackedArgs& a;
  const Launch& l;
  template <Packed K, bool FAST>
  void operator()(const PackedSource<K, FAST>& source) const {
    const PackedRows<K, FAST> rows(source, packed_out(a.out, a.out_dtype, a.table.dim));
    if (a.bag.mode == Mode::max) return run_bag<kVec, true, 4>("bag_packed", a.bag, rows, a.weights, nullptr, l);
    run_bag<kVec, false, 4>("bag_packed", a.bag, rows, a.weights, nullptr, l);
  }
};

// Row i of the result is row ids[i], or first + i; a thread decodes 8 columns.
template <Packed K, bool FAST>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(PackedSource<K, FAST> t, Ids ids, int64_t n, int64_t first, PackedOut out, int64_t vectors) {
  __shared__ float shared16[16];
  const float* levels = packed_levels<K>(shared16);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= n * vectors) return;
  const int64_t i = at / vectors, column = (at - i * vectors) * kVec;
  const int64_t row = ids.p ? ids[i] : first + i;
  float v[kVec];
  if (row >= 0 && row < t.rows) {
    t.values(t.load(row, t.lane(column)), levels, v);
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] = quiet_nan();
  }
  out.store(i, column, v);
}

struct RunUnpack {
  const UnpackRowsArgs& a;
  const Launch& l;
  template <Packed K, bool FAST>
  void operator()(const PackedSource<K, FAST>& source) const {
    const int64_t vectors = div_up(a.table.dim, kVec);
    launch("unpack_rows", unpack_kernel<K, FAST>, grid_x(div_up(a.n * vectors, kThreads)), kThreads, 0, l, source,
           Ids{a.ids, a.id_type == DType::i64}, a.n, a.first, packed_out(a.out, a.out_dtype, a.table.dim), vectors);
  }
};

// A warp takes every stride-th id of a bag and multiplies its row with the bag's gradient.
// 6 blocks: given no number, ptxas would spill for sm_80 so that more of them fit.
template <Packed K, bool FAST>
__global__ void __launch_bounds__(kThreads, 6)
    dot_kernel(BagView b, PackedSource<K, FAST> t, const void* grad_out, DType dtype, float* grad_weights) {
  __shared__ float shared16[16];
  const float* levels = packed_levels<K>(shared16);
  const int64_t bag = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (bag >= b.bags) return;
  int64_t begin, end;
  if (!b.range(bag, &begin, &end)) return;
  for (int64_t i = begin + blockIdx.y; i < end; i += gridDim.y) {
    const int64_t id = b.ids[i];
    if (b.padding_idx >= 0 && id == b.padding_idx) continue;  // stays 0
    float dot = 0;
    const bool here = id >= 0 && id < t.rows;
    for (int64_t column = static_cast<int64_t>(lane) * kVec; here && column < t.dim; column += 32 * kVec) {
      float v[kVec];
      t.values(t.load(id, t.lane(column)), levels, v);
#pragma unroll
      for (int j = 0; j < kVec; ++j)
        if (column + j < t.dim) dot = fmaf(v[j], load_as(grad_out, dtype, bag * t.dim + column + j), dot);
    }
    dot = warp_sum(dot);
    if (lane == 0) grad_weights[i] = here ? dot : quiet_nan();
  }
}

struct RunDots {
  const BagPackedWeightGradArgs& a;
  const Launch& l;
  template <Packed K, bool FAST>
  void operator()(const PackedSource<K, FAST>& source) const {
    int64_t split = a.bag.bags > 0 ? 8192 / a.bag.bags : 1;  // enough warps where bags are few and long
    split = split < 1 ? 1 : split > 1024 ? 1024 : split;
    const dim3 grid(grid_x(div_up(a.bag.bags, kWarps)), static_cast<unsigned>(split));
    launch("bag_packed_weight_grad", dot_kernel<K, FAST>, grid, kThreads, 0, l, view_of(a.bag), source, a.grad_out,
           a.grad_dtype, a.grad_weights);
  }
};

}  // namespace

void bag_packed(const BagPackedArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  by_kind(a.table, RunBag{a, l});
}

void unpack_rows(const UnpackRowsArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  if (a.n == 0 || a.table.dim == 0) return;
  by_kind(a.table, RunUnpack{a, l});
}

void bag_packed_weight_grad(const BagPackedWeightGradArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  fill_zero("bag_packed_weight_grad", a.grad_weights, static_cast<size_t>(a.bag.n_ids) * sizeof(float), l);
  by_kind(a.table, RunDots{a, l});
}

}  // namespace cuda
}  // namespace lutra
