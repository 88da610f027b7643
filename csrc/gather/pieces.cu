// Bags of rows that are put together from pieces, and the inner products that gradients of weights are made of, on
// CUDA; see pieces.h. Rows are put together in registers. Limit: a random read of a row's code, and m reads from the
// caches for code books; m random reads of a row of large tables.
#include "gather/bag_kernel.cuh"
#include "gather/pieces_source.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class T, int VEC>
struct PieceRows {
  struct Lane {
    int piece;       // concat: of these columns
    int64_t column;  // within a piece
  };
  struct Raw {
    int64_t row, address;  // address: concat only; then the code is read while other rows' are
    bool odd;
    Lane at;
  };
  DevicePieces source;
  int64_t rows, dim, width;
  Combine combine;
  const T* table;
  const T* piece_weights;
  T* out;

  __device__ __forceinline__ int context(float*) const { return 0; }
  __device__ __forceinline__ Lane lane(int64_t column) const {
    if (combine != Combine::concat) return Lane{0, column};
    const int piece = static_cast<int>(column / width);
    return Lane{piece, column - piece * width};
  }
  __device__ __forceinline__ Raw load(uint32_t row, const Lane& at) const {
    Raw raw{row, 0, false, at};
    if (combine == Combine::concat) raw.address = source.address(row, at.piece, &raw.odd);
    return raw;
  }
  // The columns at `column` of the piece at an address, times a sign; NaN where there is no such piece.
  __device__ __forceinline__ void piece(int64_t address, bool odd, int64_t column, float (&v)[VEC]) const {
    if (address < 0) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] = quiet_nan();
    } else if (source.kind == PieceKind::robe) {  // goes round the end
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        int64_t at = address + column + i;
        if (at >= source.table_rows) at -= source.table_rows;
        v[i] = to_float(table[at]);
        if (odd) v[i] = -v[i];
      }
    } else {
      const auto pack = load_pack<T, VEC>(table + address * width + column);
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] = pack[i];
    }
  }
  __device__ __forceinline__ void values(const Raw& raw, int, float (&v)[VEC]) const {
    if (combine == Combine::concat) return piece(raw.address, raw.odd, raw.at.column, v);
    bool odd;
    if (combine == Combine::product) {
      float other[VEC];
      piece(source.address(raw.row, 0, &odd), false, raw.at.column, v);
      piece(source.address(raw.row, 1, &odd), false, raw.at.column, other);
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] *= other[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] = 0;
#pragma unroll 4
    for (int j = 0; j < source.m; ++j) {
      float part[VEC];
      piece(source.address(raw.row, j, &odd), false, raw.at.column, part);
      const float w = piece_weights ? to_float(piece_weights[raw.row * source.m + j]) : 1.0f;
#pragma unroll
      for (int i = 0; i < VEC; ++i) v[i] = fmaf(w, part[i], v[i]);
    }
  }
  static constexpr float kUnit = 1;
  static constexpr int kBlocks = 2;
  __device__ __forceinline__ void add(const Raw& raw, int context, float w, float (&sum)[VEC], float*) const {
    float v[VEC];
    values(raw, context, v);
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[j] = fmaf(w, v[j], sum[j]);
  }
  __device__ __forceinline__ void store(int64_t bag, int64_t column, float (&v)[VEC]) const {
    store_pack<T, VEC>(out + bag * dim + column, v);
  }
};

template <class T, int VEC>
void run(const PiecesArgs& a, int64_t numbers, const Launch& l) {
  const int64_t dim = a.combine == Combine::concat ? a.source.m * a.width : a.width;
  const PieceRows<T, VEC> rows{device_pieces(a.source, numbers),
                               a.source.rows,
                               dim,
                               a.width,
                               a.combine,
                               static_cast<const T*>(a.table),
                               static_cast<const T*>(a.piece_weights),
                               static_cast<T*>(a.out)};
  run_bag<VEC, false, 2>("pieces", a.bag, rows, a.weights, nullptr, l);
}

template <class T, int WIDE>
void by_width(const PiecesArgs& a, int64_t numbers, const Launch& l) {
  const bool rows = a.source.kind != PieceKind::robe && aligned(a.table, 16) && aligned(a.out, 16);
  if (rows && a.width % WIDE == 0) return run<T, WIDE>(a, numbers, l);
  if (rows && a.width % 2 == 0) return run<T, 2>(a, numbers, l);
  run<T, 1>(a, numbers, l);
}

// A warp takes every stride-th entry of a bag.
template <class T>
__global__ void __launch_bounds__(kThreads) dots_kernel(BagView b, DevicePieces s, Combine combine, const T* table,
                                                        int64_t width, const T* grad_out, float* dots) {
  const int64_t bag = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (bag >= b.bags) return;
  int64_t begin, end;
  if (!b.range(bag, &begin, &end)) return;
  const bool concat = combine == Combine::concat, product = combine == Combine::product;
  const T* g = grad_out + bag * (concat ? s.m * width : width);
  for (int64_t i = begin + blockIdx.y; i < end; i += gridDim.y) {
    const int64_t id = b.ids[i];
    if (b.padding_idx >= 0 && id == b.padding_idx) continue;  // stays 0
    const bool here = id >= 0 && id < s.rows;
    bool odd = false, other = false;
    if (product) {
      float sum = 0;
      const int64_t p = here ? s.address(id, 0, &odd) : -1, q = here ? s.address(id, 1, &other) : -1;
      for (int64_t c = lane; p >= 0 && q >= 0 && c < width; c += 32)
        sum = fmaf(to_float(g[c]) * to_float(table[p * width + c]), to_float(table[q * width + c]), sum);
      sum = warp_sum(sum);
      if (lane == 0) dots[i] = p >= 0 && q >= 0 ? sum : quiet_nan();
      continue;
    }
    for (int j = 0; j < s.m; ++j) {
      const int64_t p = here ? s.address(id, j, &odd) : -1;
      float sum = 0;
      for (int64_t c = lane; p >= 0 && c < width; c += 32) {
        int64_t at = p * width + c;
        if (s.kind == PieceKind::robe) {
          at = p + c;
          if (at >= s.table_rows) at -= s.table_rows;
        }
        sum = fmaf(to_float(g[concat ? j * width + c : c]), to_float(table[at]), sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) dots[i * s.m + j] = p < 0 ? quiet_nan() : odd ? -sum : sum;
    }
  }
}

template <class T>
void run_dots(const PieceDotsArgs& a, int64_t numbers, const Launch& l) {
  int64_t split = a.bag.bags > 0 ? 8192 / a.bag.bags : 1;  // enough warps where bags are few and long
  split = split < 1 ? 1 : split > 1024 ? 1024 : split;
  const dim3 grid(grid_x(div_up(a.bag.bags, kWarps)), static_cast<unsigned>(split));
  launch("piece_dots", dots_kernel<T>, grid, kThreads, 0, l, view_of(a.bag), device_pieces(a.source, numbers),
         a.combine, static_cast<const T*>(a.table), a.width, static_cast<const T*>(a.grad_out), a.dots);
}

}  // namespace

void pieces(const PiecesArgs& a, int64_t numbers, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.dtype) {
    case DType::f16: return by_width<__half, 8>(a, numbers, l);
    case DType::bf16: return by_width<__nv_bfloat16, 8>(a, numbers, l);
    default: return by_width<float, 4>(a, numbers, l);
  }
}

void piece_dots(const PieceDotsArgs& a, int64_t numbers, const Launch& l) {
  const DeviceGuard guard(l.device);
  const int64_t each = a.combine == Combine::product ? 1 : a.source.m;
  fill_zero("piece_dots", a.dots, static_cast<size_t>(a.bag.n_ids * each) * sizeof(float), l);
  switch (a.dtype) {
    case DType::f16: return run_dots<__half>(a, numbers, l);
    case DType::bf16: return run_dots<__nv_bfloat16>(a, numbers, l);
    default: return run_dots<float>(a, numbers, l);
  }
}

}  // namespace cuda
}  // namespace lutra
