// The gradient of the weights on CUDA, grad_weights[t, k] = <grad_out[t], tables[k, codes[t, k]]>; see tables.h.
//
// Many tokens: a block takes up to 1024 tokens and 4 tables and walks the columns, 64 bytes at a time: the slabs of the
// tables are copied to shared memory, two steps ahead; a group of 4 lanes keeps its tokens' gradients in registers,
// each fetched again for the next columns when it has met its four rows. Tables lie interleaved, two and two, and the
// odd groups take the tables of a pair in the other order, so that two rows never meet in a bank (see tables_slabs.cu).
// Few tokens, 8-bit tables and other shapes: a warp a token and table.
//
// A code outside [0, entries) gives NaN. Sums are fp32, in an order that depends on the sizes alone.
#include "gather/tables.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kWarpThreads = 256;

template <class T, class G, int VEC>
__global__ void __launch_bounds__(kWarpThreads) row_kernel(TablesBackwardArgs a) {
  const int64_t i =
      static_cast<int64_t>(blockIdx.x) * (kWarpThreads / 32) + threadIdx.x / 32;  // token * n_tables + table
  const int lane = threadIdx.x & 31;
  if (i >= a.tokens * a.n_tables) return;
  const int32_t code = a.codes[i];
  const bool here = code >= 0 && code < a.entries;
  float dot = 0, sum = 0;
  const int64_t at = i % a.n_tables * a.entries + code;
  if (here) {
    const T* row = static_cast<const T*>(a.tables) + at * a.dim;
    const G* g = static_cast<const G*>(a.grad_out) + (i / a.n_tables) * a.dim;
    for (int64_t j = static_cast<int64_t>(lane) * VEC; j < a.dim; j += 32 * VEC) {
      const auto r = load_pack<T, VEC>(row + j);
      const auto v = load_pack<G, VEC>(g + j);
#pragma unroll
      for (int u = 0; u < VEC; ++u) {
        dot = fmaf(r[u], v[u], dot);
        if (sizeof(T) == 1) sum += v[u];
      }
    }
  }
  dot = warp_sum(dot);
  if (sizeof(T) == 1) {
    sum = warp_sum(sum);
    if (here) dot = fmaf(a.minimum[at], sum, a.scale[at] * dot);
  }
  if (lane == 0) a.grad_weights[i] = here ? dot : quiet_nan();
}

template <class T, class G, int WIDE>
void run_rows(const TablesBackwardArgs& a, const Launch& l) {
  const bool wide = a.dim % WIDE == 0 && aligned(a.tables, WIDE * sizeof(T)) && aligned(a.grad_out, WIDE * sizeof(G));
  launch("tables_backward", wide ? row_kernel<T, G, WIDE> : row_kernel<T, G, 1>,
         grid_x(div_up(a.tokens * a.n_tables, kWarpThreads / 32)), kWarpThreads, 0, l, a);
}

// ---- many tokens
constexpr int kThreads = 512, kLanes = 4, kGroups = kThreads / kLanes, kTables = 4, kRing = 3;
constexpr int kLine = 128;  // a row of two tables

size_t slab_bytes(int64_t entries, int tokens) {
  return static_cast<size_t>(kRing) * 2 * static_cast<size_t>(entries) * kLine +
         static_cast<size_t>(tokens) * sizeof(uint2);
}

template <class T, int EACH>
__global__ void __launch_bounds__(kThreads, 1) weight_slab_kernel(TablesBackwardArgs a) {
  constexpr int VEC = 16 / sizeof(T), kTokens = kGroups * EACH;
  const int group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, odd = group & 1;
  const int entries = static_cast<int>(a.entries), slab = entries * 2 * kLine;
  unsigned char* slabs = dynamic_shared<unsigned char>();        // [kRing][2 pairs][entries][2][64]
  auto* codes = reinterpret_cast<uint2*>(slabs + kRing * slab);  // [kTokens]: where four rows lie, in 16 bytes
  const int64_t token0 = static_cast<int64_t>(blockIdx.y) * kTokens;
  const int64_t table0 = static_cast<int64_t>(blockIdx.x) * kTables;
  const int steps = static_cast<int>((a.dim + kLanes * VEC - 1) / (kLanes * VEC));

  for (int t = threadIdx.x; t < kTokens; t += kThreads) {
    uint32_t code[kTables];
#pragma unroll
    for (int j = 0; j < kTables; ++j) {
      const int64_t k = table0 + (j ^ (t & 1));  // in the order in which the token's group takes them
      int c = 0;
      if (token0 + t < a.tokens && k < a.n_tables) c = a.codes[(token0 + t) * a.n_tables + k];
      code[j] = c >= 0 && c < entries ? static_cast<uint32_t>(c) * (kLine / 16) : 0;
    }
    codes[t] = make_uint2(code[0] | code[1] << 16, code[2] | code[3] << 16);
  }
  // A thread copies 16 bytes of every 32nd row of one of the tables.
  const auto start_copies = [&](int step) {
    if (step < steps) {
      const int thread = static_cast<int>(fresh_thread()), copied = thread >> 2 & 3, first = thread >> 4;
      const int64_t k = table0 + copied, at = (static_cast<int64_t>(step) * kLanes + (thread & 3)) * VEC;
      const bool here = k < a.n_tables && at < a.dim;
      const T* from = static_cast<const T*>(a.tables);
      if (here) from += (k * entries + first) * a.dim + at;
      const int64_t stride = here ? a.dim * (kThreads / 16) : 0;
      unsigned char* to = slabs + step % kRing * slab + (copied >> 1) * entries * kLine + first * kLine +
                          (copied & 1) * 64 + (thread & 3) * 16;
#pragma unroll 1
      for (int row = first; row < entries; row += kThreads / 16, from += stride, to += kThreads / 16 * kLine)
        copy_async_16(to, from, here);
    }
    copy_commit();
  };
  Pack<T, VEC> grad[EACH];
  const T* grads = static_cast<const T*>(a.grad_out) + (token0 + group) * a.dim + lane * VEC;
  const int left = static_cast<int>(min(a.tokens - token0 - group, static_cast<int64_t>(kTokens)));
  const int64_t stride = a.dim * kGroups;
  const auto fetch = [&](Pack<T, VEC>& to, int i, const T* from, bool inside) {
    to.word = {};
    if (inside && i * kGroups < left) to = load_pack<T, VEC>(from);
  };

  float dot[EACH][kTables];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    fetch(grad[i], i, grads + i * stride, lane * VEC < a.dim);
#pragma unroll
    for (int j = 0; j < kTables; ++j) dot[i][j] = 0;
  }
  start_copies(0);
  start_copies(1);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_wait<1>();
    __syncthreads();  // the slabs are here, and nobody reads those of the step before any more
    start_copies(step + 2);
    const T* next = grads + (step + 1) * kLanes * VEC;
    const bool inside = static_cast<int64_t>(step + 1) * kLanes * VEC + lane * VEC < a.dim;
    const unsigned char* rows = slabs + step % kRing * slab + lane * 16;
    const int pair = entries * kLine;
    const unsigned char* even = rows + odd * 64;  // the table that this group takes first of a pair
    const unsigned char* other = rows + (odd ^ 1) * 64;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      float g[VEC];
#pragma unroll
      for (int v = 0; v < VEC; ++v) g[v] = grad[i][v];
      fetch(grad[i], i, next, inside);
      next += stride;
      opaque(next);  // one address at a time: there are no registers for all of them
      const uint2 code = codes[group + i * kGroups];
#pragma unroll
      for (int j = 0; j < kTables; ++j) {
        const uint32_t word = j < 2 ? code.x : code.y;
        const uint32_t c = j % 2 ? word >> 16 : word & 0xffffu;
        const auto row = load_pack<T, VEC>(reinterpret_cast<const T*>((j % 2 ? other : even) + j / 2 * pair + c * 16));
#pragma unroll
        for (int v = 0; v < VEC; ++v) dot[i][j] = fmaf(row[v], g[v], dot[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int64_t token = token0 + group + i * kGroups;
    float mine = 0;
#pragma unroll
    for (int j = 0; j < kTables; ++j) {
      float d = dot[i][j];
      d += __shfl_xor_sync(kFullWarp, d, 1);
      d += __shfl_xor_sync(kFullWarp, d, 2);
      if (j == lane) mine = d;
    }
    const int64_t k = table0 + (lane ^ odd);
    if (token >= a.tokens || k >= a.n_tables) continue;
    const int c = a.codes[token * a.n_tables + k];
    a.grad_weights[token * a.n_tables + k] = c >= 0 && c < entries ? mine : quiet_nan();
  }
}

template <class T, int EACH>
void run_slabs(const TablesBackwardArgs& a, const Launch& l) {
  const dim3 grid(grid_x(div_up(a.n_tables, kTables)), static_cast<unsigned>(div_up(a.tokens, kGroups * EACH)));
  launch("tables_backward", weight_slab_kernel<T, EACH>, grid, kThreads, slab_bytes(a.entries, kGroups * EACH), l, a);
}

// Tokens of a group: as many as fill the machine; 0 where slabs do not serve.
int tokens_of_group(const TablesBackwardArgs& a, int device) {
  const int values = a.dtype == DType::f32 ? 4 : 8;
  if (a.tokens < 2 * a.entries || a.entries == 0 || a.entries > 8191 || a.dim == 0 || a.dim % values != 0 ||
      !aligned(a.tables, 16) || !aligned(a.grad_out, 16) || a.tokens > 65535 * 256 ||
      slab_bytes(a.entries, kGroups * 8) > static_cast<size_t>(shared_limit(device)))
    return 0;
  const int sms = multiprocessors(device);
  int64_t best = 0, least = 0;
  for (int each = 8; each >= 2; each /= 2) {
    const int64_t blocks = div_up(a.tokens, kGroups * each) * div_up(a.n_tables, kTables);
    const int64_t cost = div_up(blocks, sms) * (2 * each + 4);
    if (blocks * 2 < sms) continue;
    if (!best || cost < least) best = each, least = cost;
  }
  return static_cast<int>(best);
}

template <class T, int WIDE>
void of_type(const TablesBackwardArgs& a, const Launch& l) {
  switch (tokens_of_group(a, l.device)) {
    case 8: return run_slabs<T, 8>(a, l);
    case 4: return run_slabs<T, 4>(a, l);
    case 2: return run_slabs<T, 2>(a, l);
    default: return run_rows<T, T, WIDE>(a, l);
  }
}

}  // namespace

void tables_weight_grad(const TablesBackwardArgs& a, const Launch& l) {
  if (a.dtype == DType::i8) {
    switch (a.grad_dtype) {
      case DType::f16: return run_rows<int8_t, __half, 4>(a, l);
      case DType::bf16: return run_rows<int8_t, __nv_bfloat16, 4>(a, l);
      default: return run_rows<int8_t, float, 4>(a, l);
    }
  }
  switch (a.dtype) {
    case DType::f16: return of_type<__half, 8>(a, l);
    case DType::bf16: return of_type<__nv_bfloat16, 8>(a, l);
    default: return of_type<float, 4>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
