// The gradient of tables on CUDA, many tokens: sorting them, and the dense gradient. See tables_grad.cuh.
#include "gather/tables_grad.cuh"

#include <cub/block/block_radix_sort.cuh>

namespace lutra {
namespace cuda {
namespace {

constexpr int kSortThreads = 256, kItems = kChunk / kSortThreads;

// A table and chunk a block.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(GradPlan p, GradLists s, int n_tables, int entries) {
  using Sort = cub::BlockRadixSort<uint32_t, kSortThreads, kItems, cub::NullType, 5>;
  __shared__ union {
    typename Sort::TempStorage sort;
    uint32_t keys[kChunk];
  } shared;
  const int table = blockIdx.x, chunk = blockIdx.y;
  const int2* pairs = s.pairs + (static_cast<int64_t>(table) * p.chunks + chunk) * p.chunk;
  const int64_t at = static_cast<int64_t>(chunk) * n_tables + table;
  uint32_t keys[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int t = threadIdx.x * kItems + i;
    const int code = t < p.chunk ? pairs[t].x : entries;
    keys[i] = static_cast<uint32_t>(code) << kTokenBits | static_cast<uint32_t>(t);
  }
  Sort(shared.sort).Sort(keys, kTokenBits, kTokenBits + p.code_bits);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kItems; ++i) shared.keys[threadIdx.x * kItems + i] = keys[i];
  __syncthreads();
  int* starts = s.starts + at * p.pitch;
  int2* sorted = s.sorted + at * p.chunk;
  for (int r = threadIdx.x; r <= p.chunk; r += kSortThreads) {
    // Places past the chunk were sorted behind all others.
    const int code = r < p.chunk ? static_cast<int>(shared.keys[r] >> kTokenBits) : entries + 1;
    const int before = r > 0 ? static_cast<int>(shared.keys[r - 1] >> kTokenBits) : -1;
    for (int e = before + 1; e <= code && e <= entries; ++e) starts[e] = r;
    if (r == p.chunk) break;
    const uint32_t place = shared.keys[r] & (kChunk - 1);
    const uint32_t word = shared.keys[r] | (code != before ? kFirst : 0);
    sorted[r % p.length * p.groups + r / p.length] = make_int2(static_cast<int>(word), pairs[place].y);
  }
}

template <class T>
struct WriteGrad {
  T* grad;
  int64_t dim;
  template <int LANES, int VEC>
  __device__ __forceinline__ void take(int64_t row, int, int64_t column, bool, const float (&sum)[VEC]) const {
    if (column < dim) store_pack<T, VEC>(grad + row * dim + column, sum);
  }
};

GradSource source_of(const TablesBackwardArgs& a) {
  return GradSource{a.grad_out, a.grad_dtype, a.n_tables, a.entries, a.dim, a.tokens, a.codes, a.weights};
}

}  // namespace

size_t grad_shared(const GradSource& a, const GradPlan& p) {
  const size_t rows = static_cast<size_t>(p.buffers) * p.groups + static_cast<size_t>(p.together) * a.entries;
  return static_cast<size_t>(p.chunk) * p.lanes * 16 + rows * static_cast<size_t>(a.columns(p.lanes)) * sizeof(float);
}

namespace {

// together = 0: it does not fit.
GradPlan plan_with(const GradSource& a, int lanes, int device, double* cost) {
  GradPlan p{};
  const int64_t columns = a.columns(lanes), tiles = a.tiles(lanes);
  const int64_t chunks = div_up(a.tokens, kChunk);
  p.lanes = lanes;
  p.groups = kGradThreads / lanes;
  p.chunks = static_cast<int>(chunks);
  p.length = static_cast<int>(div_up(a.tokens, chunks * p.groups));
  p.chunk = p.length * p.groups;
  p.per_length = 1.0f / static_cast<float>(p.length);
  p.pitch = static_cast<int>(round_up(a.entries + 1, 4));
  p.code_bits = log2_of(power_of_two(a.entries + 1, 1 << 17));
  const int64_t heads = p.groups * columns * 4, sums = a.entries * columns * 4;
  const int64_t room = shared_limit(device) - static_cast<int64_t>(p.chunk) * lanes * 16;
  p.buffers = room >= 2 * (heads + sums) ? 2 : 1;
  const int64_t together = room > p.buffers * heads ? (room - p.buffers * heads) / sums : 0;
  const int64_t most = chunks == 1 ? p.buffers : a.n_tables;
  p.together = static_cast<int>(together > most ? most : together);
  // A wave of blocks is as long as its tables, and two more for the copy of the gradients. In cycles, a table costs its
  // barriers and the rows of its tokens, of which two of 64 bytes meet in a bank less often than four of 32.
  const int sms = multiprocessors(device);
  const double rows = static_cast<double>(a.tokens) * lanes / 8 * (lanes == 4 ? 1.5 : 2.1);
  for (int splits = 1; splits <= 16 && splits <= a.n_tables; ++splits) {
    const double here =
        static_cast<double>(div_up(tiles * splits, sms) * (div_up(a.n_tables, splits) + 2)) * (1500 + rows);
    if (!p.splits || here < *cost) p.splits = splits, *cost = here;
  }
  return p;
}

}  // namespace

GradPlan grad_plan(const GradSource& a, int device) {
  const int64_t values = a.dtype == DType::f32 ? 4 : 8;
  if (a.tokens < 64 || a.n_tables == 0 || a.entries == 0 || a.entries > 65535 || a.dim == 0 || a.dim % values != 0 ||
      !aligned(a.grad, 16) || a.tokens > static_cast<int64_t>(kChunk) * 65535 || a.n_tables > 0x7fffffff / a.entries)
    return GradPlan{};
  double two = 0, four = 0;
  const GradPlan narrow = plan_with(a, 2, device, &two);
  if (a.tokens > kChunk) return narrow;
  const GradPlan wide = plan_with(a, 4, device, &four);
  return wide.together > 0 && (narrow.together == 0 || four < two) ? wide : narrow;
}

GradLists grad_lists(Carve* c, const GradSource& a, const GradPlan& p) {
  GradLists s;
  const int64_t places = static_cast<int64_t>(p.chunks) * p.chunk * a.n_tables;
  s.pairs = c->take<int2>(places);
  s.sorted = c->take<int2>(places);
  s.starts = c->take<int>(static_cast<int64_t>(p.chunks) * a.n_tables * p.pitch);
  return s;
}

void sort_tokens(const GradSource& a, const GradPlan& p, const GradLists& s, const Launch& l) {
  const int entries = static_cast<int>(a.entries), n_tables = static_cast<int>(a.n_tables);
  table_pairs(TablePairs{a.codes, a.weights, nullptr, a.tokens, a.n_tables, a.entries, 1, entries, false}, s.pairs,
              static_cast<int64_t>(p.chunks) * p.chunk, l);
  launch("tables_backward", sort_kernel, dim3(grid_x(n_tables), static_cast<unsigned>(p.chunks)), kSortThreads, 0, l, p,
         s, n_tables, entries);
}

int64_t tables_grad_workspace(const TablesBackwardArgs& a, int device) {
  const GradSource source = source_of(a);
  const GradPlan p = grad_plan(source, device);
  if (p.together <= 0 || !aligned(a.grad_tables, 16)) return 0;
  Carve c(nullptr);
  grad_lists(&c, source, p);
  return c.used();
}

void tables_grad(const TablesBackwardArgs& a, const Launch& l) {
  const GradSource source = source_of(a);
  const GradPlan p = grad_plan(source, l.device);
  Carve c(l.workspace);
  const GradLists s = grad_lists(&c, source, p);
  sort_tokens(source, p, s, l);
  switch (a.grad_dtype) {
    case DType::f16:
      return walk_tables<__half>(source, p, s, WriteGrad<__half>{static_cast<__half*>(a.grad_tables), a.dim}, l);
    case DType::bf16:
      return walk_tables<__nv_bfloat16>(source, p, s,
                                        WriteGrad<__nv_bfloat16>{static_cast<__nv_bfloat16*>(a.grad_tables), a.dim}, l);
    default: return walk_tables<float>(source, p, s, WriteGrad<float>{static_cast<float*>(a.grad_tables), a.dim}, l);
  }
}

}  // namespace cuda
}  // namespace lutra
