// The screen with wgmma: 2 or 3 warpgroups multiply, one loads.
//
// A block has the panels of its queries in shared memory (where they fit; else they come slab by slab as the rows do)
// and walks a part of the collection in tiles of BN rows, a slab of 64 columns a stage. The loading warpgroup reads
// rows, turns them into bf16 terms, adds up their squares and writes swizzled tiles; each multiplying warpgroup has 64
// MT queries. They take turns on the tensor cores: while one multiplies, the others select from the sums in their
// registers.
//
// r0 and r1 of a tile's rows are written before its last slab is handed over, into one of `rings` places: with
// (rings - 1) slabs + slabs - 1 >= stages a place is written again only after all have begun the next tile.
#include "common/wgmma.cuh"
#include "scan/knn_screen.cuh"
#include "scan/knn_screen_nearest.cuh"
#include "scan/knn_screen_rows.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kMaxStages = 8;

struct Plan90 {
  int stages, rings;
  bool resident, turns;
};

template <int NWG, int MT, int BN, int QT, int RT>
struct Tile90 {
  static constexpr int kQueries = NWG * MT * 64;
  static constexpr int kQuerySlab = kQueries * 128 * QT;  // bytes of all terms
  static constexpr int kRowSlab = BN * 128 * RT;
  static constexpr int kThreads = 128 * (NWG + 1);
};

template <class T, int QT, int RT, int NWG, int MT, int BN, bool NEAREST>
__global__ void __launch_bounds__(128 * (NWG + 1), 1) screen90_kernel(const ScreenArgs a, const Plan90 plan) {
  using Tile = Tile90<NWG, MT, BN, QT, RT>;
  unsigned char* const screen_shared = dynamic_shared_1024();
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  const int warpgroup = threadIdx.x >> 7, lane = threadIdx.x & 31;
  const int stage_bytes = Tile::kRowSlab + (plan.resident ? 0 : Tile::kQuerySlab);
  unsigned char* stages = screen_shared + (plan.resident ? a.slabs * Tile::kQuerySlab : 0);
  float* rings = reinterpret_cast<float*>(stages + plan.stages * stage_bytes);
  const unsigned char* panels = a.panels + static_cast<int64_t>(blockIdx.x) * a.slabs * Tile::kQuerySlab;

  if (threadIdx.x == 0) {
    for (int s = 0; s < plan.stages; ++s) barrier_init(full + s, 4), barrier_init(empty + s, 4 * NWG);
    fence_barrier_init();
  }
  if (plan.resident) {
    for (int at = threadIdx.x * 16; at < a.slabs * Tile::kQuerySlab; at += Tile::kThreads * 16)
      *reinterpret_cast<uint4*>(screen_shared + at) = *reinterpret_cast<const uint4*>(panels + at);
    fence_async();
  }
  __syncthreads();

  const int64_t tile_begin = static_cast<int64_t>(blockIdx.y) * a.tiles_per_part;
  const int64_t tile_end = tile_begin + a.tiles_per_part < a.tiles ? tile_begin + a.tiles_per_part : a.tiles;
  const int64_t step = static_cast<int64_t>(BN) * a.tile_step;  // rows from tile to tile
  const int slabs = a.slabs;

  if (warpgroup == 0) {
    fewer_registers<120>();
    // 16-byte piece c of the bf16 tile: row c / 8. A thread's pieces: the same columns of rows 16 apart.
    constexpr int kPieces = BN / 16;
    const int row = threadIdx.x >> 3, piece = threadIdx.x & 7;
    const T* x = static_cast<const T*>(a.x);
    Piece<T> even[kPieces], odd[kPieces];  // one is on its way while the other is written; no copies, which would wait
    float squares[kPieces];
    const auto load = [&](Piece<T>(&to)[kPieces], int64_t row0, int slab) {
      const int column = slab * kSlab + piece * 8;
      const int left = static_cast<int>(a.n - row0 < BN ? a.n - row0 : BN) - row;  // rows from this thread's on
      const T* from = x + (row0 + row) * a.ldx + column;
      if (a.vectors && column + 8 <= a.d) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) to[i] = load_vector<T>(from + 16 * i * a.ldx, 16 * i < left);
      } else {
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
          to[i] = load_values<T>(from + 16 * i * a.ldx, 16 * i < left ? a.d - column : 0);
      }
    };
#pragma unroll
    for (int i = 0; i < kPieces; ++i) squares[i] = 0;
    int64_t tile = tile_begin;
    int slab = 0;
    if (tile < tile_end) load(even, tile * step, 0);
    int stage = 0, phase = 1, ring = 0;  // waiting for phase 1 of a new barrier returns at once
    const auto one_slab = [&](const Piece<T>(&now)[kPieces], Piece<T>(&next)[kPieces]) {
      const bool last = slab == slabs - 1;
      const int64_t row0 = tile * step, next_tile = last ? tile + 1 : tile;
      const int next_slab = last ? 0 : slab + 1;
      if (next_tile < tile_end) load(next, next_tile * step, next_slab);
      barrier_wait(empty + stage, phase);
      unsigned char* to = stages + stage * stage_bytes;
      if (!plan.resident && threadIdx.x == 0) {  // the panels of this slab: [64 queries][term]
        barrier_expect(full + stage, Tile::kQuerySlab);
        for (int p = 0; p < NWG * MT * QT; ++p)
          copy_bulk(to + Tile::kRowSlab + p * kPanelBytes,
                    panels + (static_cast<int64_t>(p) * slabs + slab) * kPanelBytes, kPanelBytes, full + stage);
      }
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int at = swizzled(row + 16 * i, piece);
        store_piece<T, RT>(now[i], to + at, to + BN * 128 + at, &squares[i]);
      }
      if (last) {
        // after three steps all 8 lanes of a row have its sum; lane i of them finishes the i-th of their rows
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          float s = squares[i];
          s += __shfl_xor_sync(kFullWarp, s, 1);
          s += __shfl_xor_sync(kFullWarp, s, 2);
          s += __shfl_xor_sync(kFullWarp, s, 4);
          if (piece == i) sum = s;
          squares[i] = 0;
        }
        if (piece < kPieces) {
          const int r = row + 16 * piece;
          const float2 terms = row_terms<T, NEAREST>(a, row0 + r, sum);
          rings[ring * 2 * BN + r] = terms.x;
          rings[ring * 2 * BN + BN + r] = terms.y;
        }
        ring = ring == plan.rings - 1 ? 0 : ring + 1;
      }
      fence_async();
      __syncwarp();
      if (lane == 0) barrier_arrive(full + stage);
      if (++stage == plan.stages) stage = 0, phase ^= 1;
      tile = next_tile, slab = next_slab;
    };
#pragma unroll 1
    while (tile < tile_end) {
      one_slab(even, odd);
      if (tile >= tile_end) break;
      one_slab(odd, even);
    }
  } else {
    constexpr int kRegisters = NWG == 3 ? 128 : 192;
    more_registers<kRegisters>();
    const int group = warpgroup - 1;
    const int first = group * MT * 64 + (threadIdx.x >> 5 & 3) * 16 + (lane >> 2);
    const int64_t query = static_cast<int64_t>(blockIdx.x) * Tile::kQueries + first;
    unsigned* bars = a.lists.bars + query;
    Lane<MT> own;
    own.list = a.lists.keys + query * a.lists.pitch + static_cast<int64_t>(blockIdx.y) * 4 * a.lists.per_lane;
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i)
      own.count[i] = 0, own.bar[i] = 0, own.reach[i] = a.reach[query + query_offset<MT>(i)];

    Best<MT> best;
    if (NEAREST) best.init();
    float acc[MT][BN / 2];
    const uint32_t queries_at = shared_address(screen_shared), stages_at = shared_address(stages);
    int stage = 0, phase = 0, ring = 0;
    if (plan.turns && group == NWG - 1) named_arrive(1, 256);  // the first warpgroup's turn
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      unsigned heard[2 * MT];
#pragma unroll
      for (int i = 0; i < 2 * MT && !NEAREST; ++i) heard[i] = load_relaxed(bars + query_offset<MT>(i));
      if (plan.turns) named_sync(1 + group, 256);
      int before = 0;
      for (int slab = 0; slab < slabs; ++slab) {
        barrier_wait(full + stage, phase);
        const uint32_t rows = stages_at + stage * stage_bytes;
        // panels of one 64 queries: [term][slab] where they stay, [term] in a stage
        const uint32_t panel = plan.resident ? queries_at + (group * MT * QT * slabs + slab) * kPanelBytes
                                             : rows + Tile::kRowSlab + group * MT * QT * kPanelBytes;
        const int term = (plan.resident ? slabs : 1) * kPanelBytes;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            const uint64_t q = wgmma_tile(panel + m * QT * term + k * 32);
            wgmma_bf16(acc[m], q, wgmma_tile(rows + k * 32), slab > 0 || k > 0);
            if (QT == 2)
              wgmma_bf16(acc[m], wgmma_tile(panel + (m * QT + 1) * term + k * 32), wgmma_tile(rows + k * 32), 1);
            if (RT == 2) wgmma_bf16(acc[m], q, wgmma_tile(rows + BN * 128 + k * 32), 1);
          }
        }
        wgmma_commit();
        if (slab > 0) {  // the slab before is multiplied: its stage may be filled again
          wgmma_wait<1>();
          if (lane == 0) barrier_arrive(empty + before);
        }
        before = stage;
        if (++stage == plan.stages) stage = 0, phase ^= 1;
      }
      if (plan.turns) named_arrive(1 + (group + 1) % NWG, 256);
      wgmma_wait<0>();
#pragma unroll
      for (int m = 0; m < MT; ++m) wgmma_hold(acc[m]);
      if (lane == 0) barrier_arrive(empty + before);
#pragma unroll
      for (int i = 0; i < 2 * MT && !NEAREST; ++i) own.bar[i] = bar_of(heard[i]);
      const float* r0 = rings + ring * 2 * BN;
#ifdef LUTRA_SCREEN_DUMP
#pragma unroll
      for (int i = 0; i < 2 * MT; ++i)
#pragma unroll
        for (int j = 0; j < BN / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int64_t r = tile * step + 8 * j + 2 * (lane & 3) + e;
            if (r < a.n)
              LUTRA_SCREEN_DUMP[(query + query_offset<MT>(i)) * a.n + r] = acc[i >> 1][4 * j + 2 * (i & 1) + e];
          }
#endif
      if (NEAREST)
        best_of_tile<MT, BN>(acc, r0, r0 + BN, static_cast<int>(tile * BN), own, best);
      else
        select_tile<MT, BN>(acc, r0, r0 + BN, tile, a, own, query);
      ring = ring == plan.rings - 1 ? 0 : ring + 1;
    }
    if (plan.turns && group == 0) named_sync(1, 256);  // the last warpgroup's last arrival, or the first one's
    if (NEAREST) return write_best<MT>(a, best, query);
    if (a.sample || a.lists.counts) return;
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      Key* to = own.list + query_offset<MT>(i) * a.lists.pitch + (lane & 3);
      for (int c = own.count[i]; c < a.lists.per_lane; ++c) to[4 * c] = 0;
    }
  }
}

template <class T, int QT, int RT, int NWG, int MT, int BN, bool NEAREST = false>
void run(const ScreenArgs& a, const Launch& l) {
  using Tile = Tile90<NWG, MT, BN, QT, RT>;
  const int64_t room = shared_limit(l.device) - 1024;  // the barriers are static
  Plan90 plan;
  for (const bool resident : {true, false}) {
    plan.resident = resident;
    const int64_t fixed = resident ? static_cast<int64_t>(a.slabs) * Tile::kQuerySlab : 0;
    const int64_t stage = Tile::kRowSlab + (resident ? 0 : Tile::kQuerySlab);
    for (plan.stages = kMaxStages; plan.stages > 1; --plan.stages) {
      plan.rings = static_cast<int>(div_up(plan.stages + 1, a.slabs)) + 1;
      const int64_t bytes = fixed + plan.stages * stage + plan.rings * 2 * BN * 4;
      if (bytes > room) continue;
      if (plan.stages < (resident ? 3 : 2)) break;
      plan.turns = a.slabs <= plan.stages;  // a turn is a whole tile: its stages are free when all have had theirs
      const dim3 grid(grid_x(div_up(a.padded, Tile::kQueries)),
                      static_cast<unsigned>(div_up(a.tiles, a.tiles_per_part)));
      return launch("knn", screen90_kernel<T, QT, RT, NWG, MT, BN, NEAREST>, grid, Tile::kThreads,
                    static_cast<size_t>(bytes), l, a, plan);
    }
  }
  throw std::runtime_error("lutra: knn: a multiprocessor has too little shared memory");
}

template <class T, int QT, int RT>
void run_shape(const ScreenArgs& a, const ScreenShape& shape, const Launch& l) {
  constexpr int BN = RT == 2 ? 64 : 128;
  if constexpr (sizeof(T) > 1) {  // converting 8-bit values takes the registers of the larger shape
    if (shape.queries == 256) return run<T, QT, RT, 2, 2, BN>(a, l);
  }
  run<T, QT, RT, 2, 1, BN>(a, l);
}

}  // namespace

ScreenShape screen_shape_sm90(int64_t nq, int64_t d, DType storage, int query_terms) {
  const int64_t slabs = div_up(d, kSlab) * query_terms;
  // 256 queries where their panels take 128 KB at most; twice as many slabs still fit with 128; else they are streamed
  const bool large = nq > 128 && (slabs <= 4 || slabs > 8);
  const bool bytes = storage == DType::i8 || storage == DType::u8;
  return {large && !bytes ? 256 : 128, row_terms_of(storage) == 2 ? 64 : 128};
}

void screen_sm90(const ScreenArgs& a, const ScreenShape& shape, const Launch& l) {
  switch (a.storage) {
    case DType::f32: return run_shape<float, 2, 2>(a, shape, l);
    case DType::f16: return run_shape<__half, 2, 2>(a, shape, l);
    case DType::i8: return run_shape<int8_t, 2, 1>(a, shape, l);
    case DType::u8: return run_shape<uint8_t, 2, 1>(a, shape, l);
    default:
      if (a.query_terms == 1) return run_shape<__nv_bfloat16, 1, 1>(a, shape, l);
      return run_shape<__nv_bfloat16, 2, 1>(a, shape, l);
  }
}

void nearest_sm90(const ScreenArgs& a, const ScreenShape& shape, const Launch& l) {
  if (shape.queries == 256) return run<float, 2, 2, 2, 2, 64, true>(a, l);
  run<float, 2, 2, 2, 1, 64, true>(a, l);
}

}  // namespace cuda
}  // namespace lutra
