// The pass over a collection for 1 or 8 queries: reading it is the limit.
//
// Each warp works for itself. A tile is 32 rows, a row a lane; 256 bytes of each row at a time come to shared memory
// (cp.async, in lines as they lie in memory), up to 8 such steps deep, so that some 100 KB of a multiprocessor's reads
// are on their way. Rows in shared memory are an odd number of 16-byte pieces long: lanes' 16-byte reads meet no bank
// conflict. The queries' values are read by all lanes at once.
//
// Selection: what exceeds the query's bar goes to the warp's list in memory; a full list is cut to its k best, and its
// k-th best becomes the bar of all blocks (a larger bar only leaves out what is not among the k best of all). At the
// end the block's 8 lists of a query become one.
//
// Blocks take pieces of work (8 queries, a part of the collection) in turn: where `count` says that there is nothing to
// do, they return at once.
#pragma once
#include "scan/exact_pass.h"
#include "scan/exact_score.cuh"

namespace lutra {
namespace cuda {

constexpr int kChunkPieces = 16;

struct PassPlan {
  int pieces, log_lanes;  // 16-byte pieces of a row in a step, lanes that copy a row
  int chunks, stages;
  int copy;          // bytes that can be copied at once: 16, 4, or 0 (value by value)
  int64_t q_floats;  // of a query in shared memory; 0: its chunk is fetched with each step
};

template <class T, int NQ, int SUM>
__global__ void __launch_bounds__(kPassThreads, 1) pass_kernel(const PassArgs a, const PassPlan plan) {
  constexpr int V = 16 / sizeof(T);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int pitch = (plan.pieces | 1) * 16, stage_bytes = 32 * pitch, chunk_columns = plan.pieces * V;
  unsigned char* shared = dynamic_shared<unsigned char>();
  unsigned char* stages = shared + warp * plan.stages * stage_bytes;
  Key* least = reinterpret_cast<Key*>(shared + kPassWarps * plan.stages * stage_bytes) + warp * NQ;
  int* bins = reinterpret_cast<int*>(least - warp * NQ + kPassWarps * NQ) + warp * 256;
  int* counts = bins - warp * 256 + kPassWarps * 256;  // [warps][NQ]
  float* qs = reinterpret_cast<float*>(counts + kPassWarps * NQ);
  const bool resident = plan.q_floats > 0;
  float* own_q = qs + (resident ? 0 : warp * NQ * chunk_columns);
  const int q_pitch = resident ? static_cast<int>(plan.q_floats) : chunk_columns;

  const int64_t wanted = a.count ? *a.count : a.nq;
  const int64_t groups = (wanted + NQ - 1) / NQ;
  const T* x = static_cast<const T*>(a.x);
  const int64_t row_bytes = static_cast<int64_t>(a.d) * sizeof(T);

  for (int64_t item = blockIdx.x; item < groups * a.parts; item += gridDim.x) {
    const int64_t first = item / a.parts * NQ;
    const int part = static_cast<int>(item % a.parts);
    const int live = static_cast<int>(wanted - first < NQ ? wanted - first : NQ);
    __syncthreads();  // the item before is over
    if (resident) {
      for (int64_t i = threadIdx.x; i < NQ * plan.q_floats; i += kPassThreads) {
        const int j = static_cast<int>(i / plan.q_floats);
        const int64_t k = i - j * plan.q_floats;
        const int64_t query = j < live ? (a.which ? a.which[first + j] : first + j) : 0;
        qs[i] = j < live && k < a.d ? a.q[query * a.ldq + k] : 0.0f;
      }
    }
    if (lane < NQ) least[lane] = 0, counts[warp * NQ + lane] = 0;
    __syncthreads();
    Key* lists = a.scratch + (static_cast<int64_t>(blockIdx.x) * NQ * kPassWarps + warp) * a.capacity;
    const int64_t list_pitch = static_cast<int64_t>(kPassWarps) * a.capacity;  // from query to query

    const int64_t tiles = (a.n + 31) / 32;
    const int64_t tile_begin = part * a.tiles_per_part + warp;
    const int64_t tile_stop = (part + 1) * a.tiles_per_part;
    const int64_t tile_end = tile_stop < tiles ? tile_stop : tiles;

    int64_t load_tile = tile_begin;
    int load_chunk = 0, load_stage = 0;
    const auto start = [&] {
      if (load_tile < tile_end) {
        unsigned char* to = stages + load_stage * stage_bytes;
        const int row = lane >> plan.log_lanes, piece = lane & ((1 << plan.log_lanes) - 1), step = 32 >> plan.log_lanes;
        const int64_t offset = (static_cast<int64_t>(load_chunk) * plan.pieces + piece) * 16;  // bytes into a row
        const int64_t left = row_bytes - offset;
        const int bytes = left < 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
        if (piece < plan.pieces) {
          for (int r = row; r < 32; r += step) {
            const int64_t id = load_tile * 32 + r;
            const bool here = id < a.n && bytes > 0;
            const unsigned char* from = reinterpret_cast<const unsigned char*>(x) +
                                        (here ? id * a.ldx * static_cast<int64_t>(sizeof(T)) + offset : 0);
            unsigned char* dst = to + r * pitch + piece * 16;
            if (plan.copy == 16) {
              copy_part_16(dst, from, here ? bytes : 0);
            } else if (plan.copy == 4) {
#pragma unroll
              for (int w = 0; w < 4; ++w) {
                const int rest = bytes - 4 * w, size = !here || rest <= 0 ? 0 : rest < 4 ? rest : 4;
                copy_part_4(dst + 4 * w, size ? from + 4 * w : from, size);
              }
            } else {
#pragma unroll
              for (int e = 0; e < V; ++e) {
                T v = static_cast<T>(0.0f);
                if (here && e * static_cast<int>(sizeof(T)) < bytes) v = reinterpret_cast<const T*>(from)[e];
                reinterpret_cast<T*>(dst)[e] = v;
              }
            }
          }
        }
        if (++load_chunk == plan.chunks) load_chunk = 0, load_tile += kPassWarps;
        load_stage = load_stage == plan.stages - 1 ? 0 : load_stage + 1;
      }
      copy_commit();
    };
    for (int s = 0; s < plan.stages - 1; ++s) start();

    int stage = 0;
    for (int64_t tile = tile_begin; tile < tile_end; tile += kPassWarps) {
      Key heard = 0;  // lane j: the bar of query j, some time ago
      if (lane < live && a.bars) heard = load_relaxed(a.bars + first + lane);
      float sum[NQ];
      SquaresOf<SUM> squares = 0;
#pragma unroll
      for (int j = 0; j < NQ; ++j) sum[j] = 0;
      for (int chunk = 0; chunk < plan.chunks; ++chunk) {
        // groups are counted from the newest: with at most stages - 2 under way this step's has arrived
        switch (plan.stages) {
          case 2: copy_wait<0>(); break;
          case 3: copy_wait<1>(); break;
          case 4: copy_wait<2>(); break;
          case 6: copy_wait<4>(); break;
          default: copy_wait<6>();
        }
        __syncwarp();
        start();
        const float* q = own_q + (resident ? chunk * chunk_columns : 0);
        if (!resident) {
          for (int i = lane; i < NQ * chunk_columns; i += 32) {
            const int j = i / chunk_columns, k = chunk * chunk_columns + i - j * chunk_columns;
            const int64_t query = j < live ? (a.which ? a.which[first + j] : first + j) : 0;
            own_q[i] = j < live && k < a.d ? a.q[query * a.ldq + k] : 0.0f;
          }
          __syncwarp();
        }
        const unsigned char* xs = stages + stage * stage_bytes + lane * pitch;
#pragma unroll 2
        for (int p = 0; p < plan.pieces; ++p) {
          const uint4 piece = *reinterpret_cast<const uint4*>(xs + p * 16);
#pragma unroll
          for (int j = 0; j < NQ; ++j) {
            const float* values = q + j * q_pitch + p * V;
#pragma unroll
            for (int e = 0; e < V; e += 4) {
              const float4 u = *reinterpret_cast<const float4*>(values + e);
              add_column<SUM>(u.x, unpacked<T>(piece, e), &sum[j]);
              add_column<SUM>(u.y, unpacked<T>(piece, e + 1), &sum[j]);
              add_column<SUM>(u.z, unpacked<T>(piece, e + 2), &sum[j]);
              add_column<SUM>(u.w, unpacked<T>(piece, e + 3), &sum[j]);
            }
          }
          if constexpr (SUM == kSumProduct || SUM == kSumPoincare) {
#pragma unroll
            for (int e = 0; e < V; ++e) add_square<SUM>(unpacked<T>(piece, e), &squares);
          }
        }
        __syncwarp();  // before the stage is filled again
        stage = stage == plan.stages - 1 ? 0 : stage + 1;
      }

      const int64_t id = tile * 32 + lane;
      const bool valid = id < a.n && (!a.keep || (a.keep[id >> 3] >> (id & 7) & 1));
#pragma unroll
      for (int j = 0; j < NQ; ++j) {
        if (j >= live) break;
        Key key = 0;
        if (valid) {
          const T* row = x + id * a.ldx;
          const double room = SUM == kSumPoincare ? a.rooms[a.which ? a.which[first + j] : first + j] : 0.0;
          const float score = ranked_score<T>(a.metric, sum[j], squares, row, a.d, a.bias, id, room);
          key = make_key(score, static_cast<uint32_t>(id));
        }
        if (a.all) {
          if (id < a.n) a.all[(first + j) * a.n + id] = static_cast<uint32_t>(key >> 32);
          continue;
        }
        if (a.found) {
          const bool hit = key && !(key_score(key) < a.radius);
          const unsigned votes = __ballot_sync(kFullWarp, hit);
          if (!votes) continue;
          unsigned long long place = 0;
          if (lane == 0) place = atomicAdd(a.found + first + j, static_cast<unsigned long long>(__popc(votes)));
          place = __shfl_sync(kFullWarp, place, 0);
          if (a.hits && hit) a.hits[a.offsets[first + j] + place + __popc(votes & ((1u << lane) - 1))] = key;
          continue;
        }
        Key bar = __shfl_sync(kFullWarp, heard, j);
        if (least[j] > bar) bar = least[j];
        bool pass = key > bar;
        unsigned votes = __ballot_sync(kFullWarp, pass);
        if (!votes) continue;
        Key* list = lists + j * list_pitch;
        int count = counts[warp * NQ + j];
        if (count + __popc(votes) > a.capacity) {
          const Key smallest = warp_keep_best(list, count, a.best, bins);
          count = a.best;
          if (lane == 0) {
            least[j] = smallest;
            atomicMax(a.bars + first + j, smallest);
          }
          pass = pass && key > smallest;
          votes = __ballot_sync(kFullWarp, pass);
        }
        if (pass) list[count + __popc(votes & ((1u << lane) - 1))] = key;
        __syncwarp();
        if (lane == 0) counts[warp * NQ + j] = count + __popc(votes);
        __syncwarp();
      }
    }

    // Short lists: one of the block for each query; warp j moves the 8 lists together and cuts them. Long ones: each
    // warp's own.
    const bool together = a.best <= kTogether;
    __syncthreads();
    for (int j = together ? warp : 0; j < live && a.best > 0; j += together ? kPassWarps : 1) {
      Key* all =
          together ? a.scratch + (static_cast<int64_t>(blockIdx.x) * NQ + j) * list_pitch : lists + j * list_pitch;
      int total = counts[(together ? 0 : warp * NQ) + j];
      for (int w = 1; together && w < kPassWarps; ++w) {
        const int more = counts[w * NQ + j];
        const Key* from = all + static_cast<int64_t>(w) * a.capacity;
        for (int i0 = 0; i0 < more; i0 += 32) {
          const Key key = i0 + lane < more ? from[i0 + lane] : 0;
          __syncwarp();
          if (i0 + lane < more) all[total + i0 + lane] = key;
          __syncwarp();
        }
        total += more;
      }
      int left = total;
      if (total > a.best) warp_keep_best(all, total, a.best, bins), left = a.best;
      __syncwarp();
      const int lists_of_query = a.parts * pass_lists(a.best), mine = together ? part : part * kPassWarps + warp;
      Key* out = a.lists + ((first + j) * lists_of_query + mine) * a.best;
      for (int i = lane; i < a.best; i += 32) out[i] = i < left ? all[i] : 0;
    }
  }
}

template <class T, int NQ, int SUM>
void run_pass(const PassArgs& a, const Launch& l) {
  constexpr int V = 16 / static_cast<int>(sizeof(T));
  PassPlan p;
  const int64_t row_pieces = div_up(a.d > 0 ? a.d : 1, V);
  p.pieces = static_cast<int>(row_pieces < kChunkPieces ? row_pieces : kChunkPieces);
  p.log_lanes = log2_of(power_of_two(p.pieces, 32));
  p.chunks = static_cast<int>(div_up(row_pieces, p.pieces));
  const int64_t stride = a.ldx * static_cast<int64_t>(sizeof(T));
  p.copy = aligned(a.x, 16) && stride % 16 == 0 ? 16 : aligned(a.x, 4) && stride % 4 == 0 ? 4 : 0;
  p.q_floats = static_cast<int64_t>(p.chunks) * p.pieces * V;
  const int64_t room = shared_limit(l.device), rest = kPassWarps * (NQ * (sizeof(Key) + sizeof(int)) + 1024);
  const int64_t stage = static_cast<int64_t>(kPassWarps) * 32 * (p.pieces | 1) * 16;
  for (;;) {
    const int64_t q = p.q_floats ? NQ * p.q_floats * 4 : static_cast<int64_t>(kPassWarps) * NQ * p.pieces * V * 4;
    for (const int stages : {8, 6, 4, 3, 2}) {
      p.stages = stages;
      const int64_t bytes = stages * stage + rest + q;
      if (bytes > room) continue;
      return launch("knn", pass_kernel<T, NQ, SUM>, static_cast<unsigned>(pass_blocks(l.device)), kPassThreads,
                    static_cast<size_t>(bytes), l, a, p);
    }
    if (p.q_floats == 0) throw std::runtime_error("lutra: knn: a multiprocessor has too little shared memory");
    p.q_floats = 0;
  }
}

template <class T, int NQ>
void run_sum(const PassArgs& a, const Launch& l) {
  switch (a.metric) {
    case Metric::l2: return run_pass<T, NQ, kSumSquares>(a, l);
    case Metric::l1: return run_pass<T, NQ, kSumAbsolute>(a, l);
    case Metric::linf: return run_pass<T, NQ, kSumLargest>(a, l);
    case Metric::poincare: return run_pass<T, NQ, kSumPoincare>(a, l);
    default: return run_pass<T, NQ, kSumProduct>(a, l);
  }
}

template <class T>
void run_type(const PassArgs& a, const Launch& l) {
  if (pass_group(a.nq) == 8) return run_sum<T, 8>(a, l);
  run_sum<T, 1>(a, l);
}

}  // namespace cuda
}  // namespace lutra
