// The sums of the gradients that belong to each row of tables, many tokens, and what is done with them: tables_grad.cu
// writes them, tables_update.cu takes an optimizer's step. The formulas are in tables.h and tables_update.h.
//
// grad_tables[k, c] is a sum over the tokens with code c. First the tokens of each table are sorted by code, stably (a
// block a table and chunk of 4096 tokens, in shared memory). Then a block takes 32 bytes of the columns: the gradients
// of all tokens of a chunk lie in shared memory, and for one table after the other its 256 groups of two lanes walk
// equal stretches of the sorted tokens, so that no code is too popular. A segment that begins in a stretch is summed
// into the place of its code, what a stretch continues is its head; then the heads are added in order, and the table's
// columns are done. No atomic operation, and sums in the order of the tokens: the same bits every time.
//
// More tokens than a chunk: the sums of as many tables as fit stay in shared memory while the chunks pass.
//
// Limit: shared memory, tokens * n_tables * dim values; rows of 32 bytes that lie anywhere meet in its banks, which
// halves its rate.
#pragma once
#include "gather/tables.cuh"

namespace lutra {
namespace cuda {

constexpr int kGradThreads = 512;
constexpr int kTokenBits = 12, kChunk = 1 << kTokenBits;  // of a token's place in its chunk
constexpr uint32_t kFirst = 0x80000000u;                  // marks the first token of a segment

// What is summed: grad (tokens, dim) of type dtype, with the shapes of the tables.
struct GradSource {
  const void* grad;
  DType dtype;
  int64_t n_tables, entries, dim, tokens;
  const int32_t* codes;
  const float* weights;                                                               // or nullptr: 1
  int64_t columns(int lanes) const { return lanes * (dtype == DType::f32 ? 4 : 8); }  // of a tile
  int64_t tiles(int lanes) const { return div_up(dim, columns(lanes)); }
};

struct GradPlan {
  int lanes, groups;          // threads that share a stretch; stretches: kGradThreads / lanes
  int chunks, chunk, length;  // chunk = length * groups tokens
  int pitch;                  // of starts: entries + 1 and what aligns it
  int together;               // tables whose sums lie in shared memory
  int buffers;                // 2: a table's sums can be handed over while the next table is walked
  float per_length;           // 1 / length
  int splits;
  int code_bits;
};

struct GradLists {
  int2* pairs;   // [n_tables][chunks * chunk]: code (entries: left out), weight
  int2* sorted;  // [chunks][n_tables][length][groups]: place in the chunk, code << 12, kFirst; weight
  int* starts;   // [chunks][n_tables][pitch]: where each code's segment begins; of `entries`: the end of the last
};

template <int VEC>
__device__ __forceinline__ void store_floats(float* to, const float (&v)[VEC]) {
#pragma unroll
  for (int j = 0; j < VEC; j += 4) *reinterpret_cast<float4*>(to + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
}
template <int VEC>
__device__ __forceinline__ void add_floats(float (&v)[VEC], const float* from) {
#pragma unroll
  for (int j = 0; j < VEC; j += 4) {
    const float4 f = *reinterpret_cast<const float4*>(from + j);
    v[j] += f.x, v[j + 1] += f.y, v[j + 2] += f.z, v[j + 3] += f.w;
  }
}

// Sink: what becomes of a row's sum, `take(row, tile, column, touched, sum)` by each of its
// threads.
template <class T, int LANES, class Sink>
__global__ void __launch_bounds__(kGradThreads, 1) grad_kernel(GradSource a, GradPlan p, GradLists s, Sink sink) {
  constexpr int VEC = 16 / sizeof(T), kColumns = LANES * VEC, kAhead = 4, kGroups = kGradThreads / LANES;
  constexpr int kRow = LANES * 16;  // bytes of a token
  const int group = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int entries = static_cast<int>(a.entries), n_tables = static_cast<int>(a.n_tables);
  unsigned char* grads = dynamic_shared<unsigned char>();          // [chunk][kRow]
  auto* heads = reinterpret_cast<float*>(grads + p.chunk * kRow);  // [buffers][kGroups][kColumns]
  float* sums = heads + p.buffers * kGroups * kColumns;            // [together][entries][kColumns]
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kColumns, column = column0 + lane * VEC;
  const int table0 = static_cast<int>(a.n_tables * blockIdx.y / gridDim.y);
  const int table1 = static_cast<int>(a.n_tables * (blockIdx.y + 1) / gridDim.y);
  if (table0 == table1) return;
  const auto group_of = [&](int place) {  // place / length: exact for places of a chunk
    return static_cast<int>((static_cast<float>(place) + 0.5f) * p.per_length);
  };
  const int entry0 = threadIdx.x / LANES;  // the first that this thread hands over
  int begin = 0, end = 0;                  // its segment in the next table
  const auto fetch_bounds = [&](int table, int chunk) {
    const int* starts = s.starts + (static_cast<int64_t>(chunk) * n_tables + table) * p.pitch;
    if (entry0 < entries) begin = __ldg(starts + entry0), end = __ldg(starts + entry0 + 1);
  };

  const auto list_of = [&](int table, int chunk) {
    return s.sorted + (static_cast<int64_t>(chunk) * n_tables + table) * p.chunk + group;
  };
  int2 ahead[kAhead];
  const auto fetch = [&](const int2* list, int from) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (from + u < p.length) ahead[u] = __ldg(list + (from + u) * kGroups);
    }
  };

  for (int first_table = table0; first_table < table1; first_table += p.chunks == 1 ? table1 - table0 : p.together) {
    const int last_table = p.chunks == 1 ? table1 : min(first_table + p.together, table1);
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      fetch(list_of(first_table, chunk), 0);
      fetch_bounds(first_table, chunk);
      __syncthreads();  // nobody reads the chunk before any more
      const int64_t t0 = static_cast<int64_t>(chunk) * p.chunk;
      for (int t = group; t < p.chunk; t += kGroups) {
        const bool here = t0 + t < a.tokens && column < a.dim;
        const T* from = static_cast<const T*>(a.grad);
        if (here) from += (t0 + t) * a.dim + column;
        copy_async_16(grads + t * kRow + lane * 16, from, here);
      }
      copy_commit();
      copy_wait<0>();
      __syncthreads();
      const unsigned char* mine = grads + lane * 16;
      for (int table = first_table; table < last_table; ++table) {
        const int slot = (table - first_table) & (p.buffers - 1);
        float* of_table = sums + (p.chunks == 1 ? slot : table - first_table) * entries * kColumns;
        float* table_heads = heads + slot * kGroups * kColumns;
        const int2* list = list_of(table, chunk);
        float sum[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[j] = 0;
        float* to = table_heads + group * kColumns + lane * VEC;  // until a segment begins
        bool more = false;                                        // to be added to what lies there
        int code = 0;
        const auto flush = [&]() {
          if (more) add_floats<VEC>(sum, to);
          store_floats<VEC>(to, sum);
        };
        for (int i = 0; i < p.length; i += kAhead) {
          int2 now[kAhead];
          Pack<T, VEC> row[kAhead];
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            now[u] = ahead[u];
            if (i + u < p.length)
              row[u] = load_pack<T, VEC>(reinterpret_cast<const T*>(mine + (now[u].x & (kChunk - 1)) * kRow));
          }
          fetch(list, i + kAhead);
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            if (i + u >= p.length) continue;
            if (now[u].x < 0) {
              if (i + u > 0 && code < entries) flush();
              code = (now[u].x & 0x7fffffff) >> kTokenBits;
              to = of_table + code * kColumns + lane * VEC;
              more = chunk > 0;
#pragma unroll
              for (int j = 0; j < VEC; ++j) sum[j] = 0;
            }
            const float weight = __int_as_float(now[u].y);
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum[j] = fmaf(weight, row[u][j], sum[j]);
          }
        }
        if (code < entries) flush();
        const int* starts = s.starts + (static_cast<int64_t>(chunk) * n_tables + table) * p.pitch;
        int from = begin, to_place = end;
        if (table + 1 < last_table) {
          fetch(list_of(table + 1, chunk), 0);
          fetch_bounds(table + 1, chunk);
        }
        __syncthreads();
        for (int entry = entry0; entry < entries; entry += kGradThreads / LANES) {
          if (entry != entry0) from = __ldg(starts + entry), to_place = __ldg(starts + entry + 1);
          float total[VEC];
#pragma unroll
          for (int j = 0; j < VEC; ++j) total[j] = 0;
          float* place = of_table + entry * kColumns + lane * VEC;
          if (chunk > 0 || from < to_place) add_floats<VEC>(total, place);
          if (from < to_place) {
            for (int g = group_of(from) + 1; g <= group_of(to_place - 1); ++g)
              add_floats<VEC>(total, table_heads + g * kColumns + lane * VEC);
          }
          if (chunk + 1 < p.chunks) {
            store_floats<VEC>(place, total);
          } else {
            bool touched = from < to_place;
            for (int c = 0; c < chunk && !touched; ++c) {
              const int* of = s.starts + (static_cast<int64_t>(c) * n_tables + table) * p.pitch + entry;
              touched = of[0] < of[1];
            }
            sink.template take<LANES, VEC>(static_cast<int64_t>(table) * entries + entry, blockIdx.x, column, touched,
                                           total);
          }
        }
        // With two buffers the table after the next is walked behind the next barrier, when all have handed this over.
        if (p.buffers == 1) __syncthreads();
      }
    }
  }
}

GradPlan grad_plan(const GradSource& a, int device);  // together = 0: it does not serve
GradLists grad_lists(Carve* c, const GradSource& a, const GradPlan& p);
void sort_tokens(const GradSource& a, const GradPlan& p, const GradLists& s, const Launch& l);  // fills the lists

size_t grad_shared(const GradSource& a, const GradPlan& p);

template <class T, class Sink>
void walk_tables(const GradSource& a, const GradPlan& p, const GradLists& s, const Sink& sink, const Launch& l) {
  const dim3 grid(grid_x(a.tiles(p.lanes)), static_cast<unsigned>(p.splits));
  launch("tables_backward", p.lanes == 4 ? grad_kernel<T, 4, Sink> : grad_kernel<T, 2, Sink>, grid, kGradThreads,
         grad_shared(a, p), l, a, p, s, sink);
}

}  // namespace cuda
}  // namespace lutra
