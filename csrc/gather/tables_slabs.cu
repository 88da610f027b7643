// Tables on CUDA, many tokens; the formula is in tables.h.
//
// Each row is read by several tokens, and reading it from L2 every time would be the limit. So a block takes 64 bytes
// of the columns (16 to 64 of them) and up to 2048 tokens, keeps their sums in registers, and walks the tables: the
// slab of a table (256 entries are 16 KB) is copied to shared memory once, some tables ahead of its use, with the
// offsets and weights of the tokens beside it.
//
// Shared memory gives 128 bytes a cycle if the 8 lanes that it serves at a time (two groups of 4, a token each) read
// different banks. Rows lie anywhere, so that two of 64 bytes would meet in half of the cases. Therefore tables 2 p and
// 2 p + 1 are interleaved, row by row, in lines of 128 bytes, and the odd groups lag behind the even ones by one
// table: at every moment one half of the groups reads even tables, the other odd ones, and each token still adds its
// tables in order.
//
// Before, a small kernel turns codes and weights around: pairs[k][t] is the byte offset of the row in its slab and the
// weight (times the row's scale); a bad code gives a weight of NaN, a token that is not there one of 0.
//
// Limit: shared memory, tokens * n_tables * dim values at 128 bytes a cycle and multiprocessor.
#include "gather/tables.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 512, kLanes = 4, kGroups = kThreads / kLanes;
constexpr int kLine = 128;  // a row of two tables

template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

// int8: low[t] = the sum of weight * minimum over the tables. A warp a token.
__global__ void __launch_bounds__(256) lows_kernel(TablesArgs a, float* low) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (t >= a.tokens) return;
  float sum = 0;
  for (int64_t k = lane; k < a.n_tables; k += 32) {
    const int code = a.codes[t * a.n_tables + k];
    const bool here = code >= 0 && code < a.entries;
    const float weight = a.weights ? a.weights[t * a.n_tables + k] : 1.0f;
    sum = here ? fmaf(weight, a.minimum[k * a.entries + code], sum) : quiet_nan();
  }
  sum = warp_sum(sum);
  if (lane == 0) low[t] = sum;
}

struct SlabPlan {
  const int2* pairs;
  const float* low;
  int64_t padded;
};

// EACH: tokens of a group. RING: lines of two tables in shared memory; RING - 2 are under way while two are in use.
template <class T, int EACH, int RING>
__global__ void __launch_bounds__(kThreads, 1) slab_kernel(TablesArgs a, SlabPlan s) {
  constexpr int VEC = kVec<T>, kTokens = kGroups * EACH, kAhead = RING - 2;
  const int group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, odd = group & 1;
  const int entries = static_cast<int>(a.entries);
  const int lines_bytes = entries * kLine;
  unsigned char* lines = dynamic_shared<unsigned char>();             // [RING][entries][2][64]
  auto* pairs = reinterpret_cast<int2*>(lines + RING * lines_bytes);  // [RING][2][kTokens]
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * kLanes * VEC, column = column0 + lane * VEC;
  const int n_tables = static_cast<int>(a.n_tables);

  // A thread copies 16 bytes of every 64th row, always of the same half of a line.
  const auto start_copies = [&](int line) {
    if (line * 2 < n_tables) {
      const int thread = static_cast<int>(fresh_thread());
      const int k = line * 2 + (thread >> 2 & 1), first = thread >> 3;
      const int64_t at = column0 + (thread & 3) * VEC;
      const bool here = k < n_tables && at < a.dim;
      const T* from = static_cast<const T*>(a.tables);
      if (here) from += (static_cast<int64_t>(k) * entries + first) * a.dim + at;
      const int64_t stride = here ? a.dim * (kThreads / 8) : 0;
      unsigned char* to = lines + line % RING * lines_bytes + thread * 16;
#pragma unroll 1
      for (int row = first; row < entries; row += kThreads / 8, from += stride, to += kThreads * 16)
        copy_async_16(to, from, here);
      int2* beside = pairs + line % RING * 2 * kTokens;
      const int2* of = s.pairs + line * 2 * s.padded + token0;
#pragma unroll 1
      for (int second = 0; second < 2 && line * 2 + second < n_tables; ++second, of += s.padded, beside += kTokens) {
#pragma unroll 1
        for (int c = thread * 2; c < kTokens; c += kThreads * 2)  // 16 bytes are two tokens
          copy_async_16(beside + c, of + c, true);
      }
    }
    copy_commit();
  };

  float sum[EACH][VEC];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[i][j] = 0;
  }
#pragma unroll
  for (int i = 0; i < kAhead; ++i) start_copies(i);
  for (int line = 0; line * 2 <= n_tables; ++line) {  // one table more: the odd groups' last
    copy_wait<kAhead - 1>();
    __syncthreads();  // the line is here, and nobody reads the line before the last any more
    start_copies(line + kAhead);
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      const int k = line * 2 + step - odd;
      if (k < 0 || k >= n_tables) continue;
      const int place = (k >> 1) % RING;
      const unsigned char* rows = lines + place * lines_bytes + (k & 1) * 64 + lane * 16;
      const int2* mine = pairs + (place * 2 + (k & 1)) * kTokens + group;
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int2 pair = mine[i * kGroups];
        const auto row = load_pack<T, VEC>(reinterpret_cast<const T*>(rows + pair.x));
        const float weight = __int_as_float(pair.y);
        float v[VEC];
        row_values<T, VEC>(row, v);
#pragma unroll
        for (int j = 0; j < VEC; ++j) sum[i][j] = fmaf(weight, v[j], sum[i][j]);
        // The compiler would fetch more rows ahead than it has registers for.
        if (EACH == 16 && i % 4 == 3) __syncwarp(__activemask());
      }
    }
  }
  if (column >= a.dim) return;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int64_t token = token0 + group + i * kGroups;
    if (token >= a.tokens) continue;
    const float low = sizeof(T) == 1 ? s.low[token] : 0.0f;
#pragma unroll
    for (int j = 0; j < VEC; ++j) sum[i][j] += low + (a.bias ? load_as(a.bias, a.out_dtype, column + j) : 0.0f);
    if constexpr (sizeof(T) == 1) {
#pragma unroll
      for (int j = 0; j < VEC; ++j) store_as(a.out, a.out_dtype, token * a.dim + column + j, sum[i][j]);
    } else {
      store_pack<T, VEC>(static_cast<T*>(a.out) + token * a.dim + column, sum[i]);
    }
  }
}

size_t slab_bytes(int64_t entries, int tokens, int ring) {
  return static_cast<size_t>(ring) * static_cast<size_t>(entries * kLine + 2 * tokens * static_cast<int>(sizeof(int2)));
}

template <class T, int EACH, int RING>
void run(const TablesArgs& a, const SlabPlan& s, const Launch& l) {
  const int64_t blocks = div_up(a.tokens, kGroups * EACH), tiles = div_up(a.dim, kLanes * kVec<T>);
  launch("tables", slab_kernel<T, EACH, RING>, dim3(grid_x(blocks), static_cast<unsigned>(tiles)), kThreads,
         slab_bytes(a.entries, kGroups * EACH, RING), l, a, s);
}

// Four lines in shared memory where they fit, else three: deeper copying hides more of L2.
template <class T, int EACH>
void by_ring(const TablesArgs& a, const SlabPlan& s, const Launch& l) {
  const size_t limit = static_cast<size_t>(shared_limit(l.device));
  if constexpr (EACH < 16) {
    if (slab_bytes(a.entries, kGroups * EACH, 4) <= limit) return run<T, EACH, 4>(a, s, l);
  }
  run<T, EACH, 3>(a, s, l);
}

template <class T>
void by_tokens(const TablesArgs& a, int per_block, const SlabPlan& s, const Launch& l) {
  constexpr int kMost = 64 / kVec<T>;  // 64 sums a thread
  const int each = per_block / kGroups;
  if constexpr (kMost > 8) {
    if (each == 8) return by_ring<T, 8>(a, s, l);
  }
  if constexpr (kMost > 4) {
    if (each == 4) return by_ring<T, 4>(a, s, l);
  }
  by_ring<T, kMost>(a, s, l);
}

}  // namespace

int slab_tokens(const TablesArgs& a, int device) {
  const int size = a.dtype == DType::f32 ? 4 : a.dtype == DType::i8 ? 1 : 2, columns = 64 / size;
  const int64_t tiles = div_up(a.dim, columns);
  if (a.dim % (16 / size) != 0 || !aligned(a.tables, 16) || !aligned(a.out, 16)) return 0;
  if (a.tokens < 2 * a.entries || a.n_tables == 0 || a.entries == 0 || a.n_tables > 0x3fffffff || tiles > 65535)
    return 0;
  const int sms = multiprocessors(device);
  const size_t limit = static_cast<size_t>(shared_limit(device));
  int64_t best = 0, least = 0;
  for (int each = 4 * size; each >= 4; each /= 2) {  // of less than 512 tokens copying the slabs would bind
    const int tokens = kGroups * each;
    const int64_t blocks = div_up(a.tokens, tokens) * tiles;
    if (slab_bytes(a.entries, tokens, 3) > limit || blocks * 4 < 3 * sms) continue;
    const int64_t cost = div_up(blocks, sms) * (2 * each + 3);  // the tokens, and copying the slab
    if (!best || cost < least) best = tokens, least = cost;
  }
  return static_cast<int>(best);
}

int64_t slab_workspace(int64_t tokens, int64_t n_tables, int per_block) {
  const int64_t padded = round_up(tokens, per_block);
  return round_up(n_tables * padded * static_cast<int64_t>(sizeof(int2)), 256) + padded * 4;
}

void tables_slabs(const TablesArgs& a, int per_block, const Launch& l) {
  const int64_t padded = round_up(a.tokens, per_block);
  Carve c(l.workspace);
  auto* pairs = c.take<int2>(a.n_tables * padded);
  auto* low = c.take<float>(padded);
  table_pairs(TablePairs{a.codes, a.weights, a.scale, a.tokens, a.n_tables, a.entries, kLine, 0, true}, pairs, padded,
              l);
  if (a.dtype == DType::i8) launch("tables", lows_kernel, grid_x(div_up(a.tokens, 8)), 256, 0, l, a, low);
  const SlabPlan s{pairs, low, padded};
  switch (a.dtype) {
    case DType::f16: return by_tokens<__half>(a, per_block, s, l);
    case DType::bf16: return by_tokens<__nv_bfloat16>(a, per_block, s, l);
    case DType::i8: return by_tokens<int8_t>(a, per_block, s, l);
    default: return by_tokens<float>(a, per_block, s, l);
  }
}

}  // namespace cuda
}  // namespace lutra
