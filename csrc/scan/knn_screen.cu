// The screen with mma.sync, for every device from sm_80 on.
//
// A block has 8 warps and 128 queries, 16 of each warp, and walks a part of the collection in tiles of 128 rows (64
// where rows have two terms), a slab of 64 columns at a time. Two slabs lie in shared memory: while the warps multiply
// one, all threads hold the next one's values in registers, which they then write as bf16 terms. The queries' panels
// stay in shared memory where they fit, else their slab is copied beside the rows'. Two blocks share a multiprocessor
// where shared memory allows: one selects while the other multiplies.
#include "scan/knn_screen.cuh"
#include "scan/knn_screen_nearest.cuh"
#include "scan/knn_screen_rows.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256, kQueries = 128;

struct Plan80 {
  bool resident;
};

template <class T, int QT, int RT, int BN, bool NEAREST>
__global__ void __launch_bounds__(kThreads, 1) screen_kernel(const ScreenArgs a, const Plan80 plan) {
  constexpr int kRowSlab = BN * 128 * RT, kQuerySlab = kQueries * 128 * QT;
  unsigned char* const screen_shared = dynamic_shared_1024();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, slabs = a.slabs;
  const int stage_bytes = kRowSlab + (plan.resident ? 0 : kQuerySlab);
  unsigned char* stages = screen_shared + (plan.resident ? slabs * kQuerySlab : 0);
  float* rings = reinterpret_cast<float*>(stages + 2 * stage_bytes);  // r0 and r1 of two tiles
  const unsigned char* panels = a.panels + static_cast<int64_t>(blockIdx.x) * slabs * kQuerySlab;
  if (plan.resident) {
    for (int at = threadIdx.x * 16; at < slabs * kQuerySlab; at += kThreads * 16)
      *reinterpret_cast<uint4*>(screen_shared + at) = *reinterpret_cast<const uint4*>(panels + at);
  }
  const int64_t tile_begin = static_cast<int64_t>(blockIdx.y) * a.tiles_per_part;
  const int64_t tile_end = tile_begin + a.tiles_per_part < a.tiles ? tile_begin + a.tiles_per_part : a.tiles;
  const int64_t step = static_cast<int64_t>(BN) * a.tile_step;

  // Loading: a thread has the same columns of rows 32 apart.
  constexpr int kPieces = BN / 32;
  const int row = threadIdx.x >> 3, piece = threadIdx.x & 7;
  Piece<T> fresh[kPieces];
  float squares[kPieces];
  const auto load = [&](int64_t row0, int slab) {
    const int column = slab * kSlab + piece * 8;
    const int left = static_cast<int>(a.n - row0 < BN ? a.n - row0 : BN) - row;
    const T* from = static_cast<const T*>(a.x) + (row0 + row) * a.ldx + column;
    if (a.vectors && column + 8 <= a.d) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) fresh[i] = load_vector<T>(from + 32 * i * a.ldx, 32 * i < left);
    } else {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        fresh[i] = load_values<T>(from + 32 * i * a.ldx, 32 * i < left ? a.d - column : 0);
    }
  };
  // Writes what was loaded to a stage; with the last slab of a tile also its r0 and r1.
  const auto store = [&](int stage, int64_t row0, int slab, int ring) {
    unsigned char* to = stages + stage * stage_bytes;
    if (!plan.resident) {
      for (int at = threadIdx.x * 16; at < kQuerySlab; at += kThreads * 16)
        *reinterpret_cast<uint4*>(to + kRowSlab + at) = *reinterpret_cast<const uint4*>(
            panels + (static_cast<int64_t>(at / kPanelBytes) * slabs + slab) * kPanelBytes + at % kPanelBytes);
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (slab == 0) squares[i] = 0;
      const int at = swizzled(row + 32 * i, piece);
      store_piece<T, RT>(fresh[i], to + at, to + BN * 128 + at, &squares[i]);
    }
    if (slab < slabs - 1) return;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      float s = squares[i];
      s += __shfl_xor_sync(kFullWarp, s, 1);
      s += __shfl_xor_sync(kFullWarp, s, 2);
      s += __shfl_xor_sync(kFullWarp, s, 4);
      if (piece == i) sum = s;
    }
    if (piece < kPieces) {
      const int r = row + 32 * piece;
      const float2 terms = row_terms<T, NEAREST>(a, row0 + r, sum);
      rings[ring * 2 * BN + r] = terms.x;
      rings[ring * 2 * BN + BN + r] = terms.y;
    }
  };

  const int64_t query = static_cast<int64_t>(blockIdx.x) * kQueries + warp * 16 + (lane >> 2);
  Lane<1> own;
  own.list = a.lists.keys + query * a.lists.pitch + static_cast<int64_t>(blockIdx.y) * 4 * a.lists.per_lane;
#pragma unroll
  for (int i = 0; i < 2; ++i) own.count[i] = 0, own.bar[i] = 0, own.reach[i] = a.reach[query + query_offset<1>(i)];

  Best<1> best;
  if (NEAREST) best.init();
  float acc[1][BN / 2];
  const uint32_t queries_at = shared_address(screen_shared), stages_at = shared_address(stages);
  // ldmatrix: this lane's row and 16-byte piece of a step of 16 columns, of the queries and of 16 rows
  const int q_row = (warp & 3) * 16 + (lane & 15), q_piece = lane >> 4;
  const int x_row = (lane & 7) + (lane >> 4) * 8, x_piece = lane >> 3 & 1;
  if (tile_begin < tile_end) {
    load(tile_begin * step, 0);
    store(0, tile_begin * step, 0, 0);
  }
  __syncthreads();
  int stage = 0, ring = 0;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    unsigned heard[2];
#pragma unroll
    for (int i = 0; i < 2 && !NEAREST; ++i) heard[i] = load_relaxed(a.lists.bars + query + query_offset<1>(i));
#pragma unroll
    for (int j = 0; j < BN / 2; ++j) acc[0][j] = 0;
    for (int slab = 0; slab < slabs; ++slab) {
      const bool last = slab == slabs - 1, more = !last || tile + 1 < tile_end;
      const int64_t next_row = (last ? tile + 1 : tile) * step;
      const int next_slab = last ? 0 : slab + 1;
      if (more) load(next_row, next_slab);
      const uint32_t rows = stages_at + stage * stage_bytes;
      const uint32_t panel = plan.resident ? queries_at + ((warp >> 2) * QT * slabs + slab) * kPanelBytes
                                           : rows + kRowSlab + (warp >> 2) * QT * kPanelBytes;
      const int term = (plan.resident ? slabs : 1) * kPanelBytes;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t q[QT][4];
#pragma unroll
        for (int e = 0; e < QT; ++e) load_matrix_4(q[e], panel + e * term + swizzled(q_row, 2 * k + q_piece));
#pragma unroll
        for (int j = 0; j < BN / 16; ++j) {
          uint32_t x[4];
          const int at = swizzled(x_row + 16 * j, 2 * k + x_piece);
          load_matrix_4(x, rows + at);
#pragma unroll
          for (int e = 0; e < QT; ++e) {
            mma_bf16(acc[0] + 8 * j, q[e], x[0], x[1]);
            mma_bf16(acc[0] + 8 * j + 4, q[e], x[2], x[3]);
          }
          if (RT == 2) {
            load_matrix_4(x, rows + BN * 128 + at);
            mma_bf16(acc[0] + 8 * j, q[0], x[0], x[1]);
            mma_bf16(acc[0] + 8 * j + 4, q[0], x[2], x[3]);
          }
        }
      }
      // The other stage was multiplied before the last barrier, and its ring's tile selected.
      if (more) store(stage ^ 1, next_row, next_slab, last ? ring ^ 1 : ring);
      if (last) {
#pragma unroll
        for (int i = 0; i < 2 && !NEAREST; ++i) own.bar[i] = bar_of(heard[i]);
        const float* r0 = rings + ring * 2 * BN;
        if (NEAREST)
          best_of_tile<1, BN>(acc, r0, r0 + BN, static_cast<int>(tile * BN), own, best);
        else
          select_tile<1, BN>(acc, r0, r0 + BN, tile, a, own, query);
      }
      __syncthreads();
      stage ^= 1;
    }
    ring ^= 1;
  }
  if (NEAREST) return write_best<1>(a, best, query);
  if (a.sample || a.lists.counts) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Key* to = own.list + query_offset<1>(i) * a.lists.pitch + (lane & 3);
    for (int c = own.count[i]; c < a.lists.per_lane; ++c) to[4 * c] = 0;
  }
}

template <class T, int QT, int RT, bool NEAREST = false>
void run(const ScreenArgs& a, const Launch& l) {
  constexpr int BN = RT == 2 ? 64 : 128;
  constexpr int64_t kRowSlab = BN * 128 * RT, kQuerySlab = kQueries * 128 * QT, kRings = 4 * BN * 4;
  const int64_t room = shared_limit(l.device);
  Plan80 plan;
  int64_t bytes = a.slabs * kQuerySlab + 2 * kRowSlab + kRings;
  plan.resident = bytes <= room;
  if (!plan.resident) bytes = 2 * (kRowSlab + kQuerySlab) + kRings;
  const dim3 grid(grid_x(div_up(a.padded, kQueries)), static_cast<unsigned>(div_up(a.tiles, a.tiles_per_part)));
  launch("knn", screen_kernel<T, QT, RT, BN, NEAREST>, grid, kThreads, static_cast<size_t>(bytes), l, a, plan);
}

}  // namespace

ScreenShape screen_shape(DType storage) { return {kQueries, row_terms_of(storage) == 2 ? 64 : 128}; }

void screen(const ScreenArgs& a, const Launch& l) {
  switch (a.storage) {
    case DType::f32: return run<float, 2, 2>(a, l);
    case DType::f16: return run<__half, 2, 2>(a, l);
    case DType::i8: return run<int8_t, 2, 1>(a, l);
    case DType::u8: return run<uint8_t, 2, 1>(a, l);
    default:
      if (a.query_terms == 1) return run<__nv_bfloat16, 1, 1>(a, l);
      return run<__nv_bfloat16, 2, 1>(a, l);
  }
}

void nearest_rows(const ScreenArgs& a, const Launch& l) { run<float, 2, 2, true>(a, l); }

}  // namespace cuda
}  // namespace lutra
