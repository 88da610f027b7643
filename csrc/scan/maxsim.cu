// MaxSim on CUDA: which kernel serves a call, the plain kernel, the selection of the k best, and the gradients.
//
// Tensor cores compute what they can (maxsim_mma.cu, maxsim_terms.cu). The plain kernel, for any d and any types, takes
// a query with a document (or candidate) in a block, 32 query tokens and 64 document rows at a time: 4 x 4 products a
// thread from shared memory, 32 dimensions a step, then maxima in registers. Rows of any type are converted as they are
// loaded. The similarities never leave the registers. Sums and ties are in the order of the CPU's.
//
// What the CPU reports through bad shows as NaN: NaN products win their maximum, a candidate, an offset or a centroid
// out of range makes its score NaN. k > 0: the scores become keys (common/select.cuh) in the workspace, four bytes more
// than a score where a document is some kilobytes, from which the k best are merged. Limit of the plain kernel: fp32
// multiply-adds, of which shared memory feeds about half; many documents of few rows leave lanes idle.
#include "common/device.cuh"
#include "scan/maxsim_stream.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 128, kTokens = 32, kRows = 64, kStep = 32;

// One value of a matrix of any type.
__device__ __forceinline__ float value_at(const void* p, DType t, int64_t at) {
  switch (t) {
    case DType::f16: return to_float(static_cast<const __half*>(p)[at]);
    case DType::bf16: return to_float(static_cast<const __nv_bfloat16*>(p)[at]);
    case DType::i8: return to_float(static_cast<const int8_t*>(p)[at]);
    default: return static_cast<const float*>(p)[at];
  }
}

// Column j of row r of the documents, before its factor.
__device__ __forceinline__ float document_value(const MaxsimArgs& a, int64_t r, int64_t centroid, int64_t j) {
  if (a.x_type != DType::u8) return value_at(a.x, a.x_type, r * a.ldx + j);
  if (centroid < 0 || centroid >= a.centroid_count) return quiet_nan();
  const uint8_t byte = static_cast<const uint8_t*>(a.x)[r * a.ldx + j * a.bits / 8];
  const int code = byte >> (j * a.bits % 8) & ((1 << a.bits) - 1);
  return a.centroids[centroid * a.d + j] + a.values[code];
}

// Query i with the document of a column, by a block.
__device__ void plain_pair(const MaxsimArgs& a, const MaxsimPlan& p, int64_t i, int64_t column) {
  __shared__ float q[kStep][kTokens + 4];
  __shared__ float x[kStep][kRows + 4];
  __shared__ float factor[kRows];
  __shared__ bool live[kRows];
  __shared__ float most[kTokens];

  const int64_t document = document_of(a, i, column);
  if (document == -1) {
    if (threadIdx.x == 0) put_score(a, p, i, column, document, minus_infinity());
    return;
  }
  const int64_t t0 = a.q_ptr[i], t1 = a.q_ptr[i + 1];
  int64_t begin = 0, end = -1;
  if (document >= 0 && document < a.documents) {
    begin = a.x_ptr[document];
    end = a.x_ptr[document + 1];
  }
  if (t0 < 0 || t1 < t0 || t1 > a.q_rows || begin < 0 || end < begin || end > a.x_rows) {
    if (threadIdx.x == 0) put_score(a, p, i, column, document, quiet_nan());
    return;
  }
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;  // rows 4 tx .., tokens 4 ty ..
  float sum = 0;                                           // of thread 0
  for (int64_t t = t0; t < t1; t += kTokens) {
    Best best[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) best[u] = Best{minus_infinity(), -1};
    for (int64_t r = begin; r < end; r += kRows) {
      float acc[4][4] = {};
      const int row = threadIdx.x / 2;  // whose values this thread loads, half of them
      const bool here = r + row < end && (!a.x_mask || a.x_mask[r + row]);
      const int64_t centroid = a.x_type == DType::u8 && here ? a.centroid_ids[r + row] : 0;
      float square = 0;
      for (int64_t j0 = 0; j0 < a.d; j0 += kStep) {
        __syncthreads();
#pragma unroll
        for (int c = 0; c < kStep / 2; ++c) {
          const int64_t j = j0 + threadIdx.x % 2 * (kStep / 2) + c;
          const float v = here && j < a.d ? document_value(a, r + row, centroid, j) : 0.0f;
          x[threadIdx.x % 2 * (kStep / 2) + c][row] = v;
          square += v * v;
        }
#pragma unroll
        for (int c = 0; c < kStep * kTokens / kThreads; ++c) {
          const int at = c * kThreads + threadIdx.x, j = at % kStep, token = at / kStep;
          const bool mine = t + token < t1 && j0 + j < a.d;
          q[j][token] = mine ? value_at(a.q, a.q_type, (t + token) * a.ldq + j0 + j) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kStep; ++j) {
          float qv[4], xv[4];
#pragma unroll
          for (int u = 0; u < 4; ++u) qv[u] = q[j][4 * ty + u];
#pragma unroll
          for (int v = 0; v < 4; ++v) xv[v] = x[j][4 * tx + v];
#pragma unroll
          for (int u = 0; u < 4; ++u)
#pragma unroll
            for (int v = 0; v < 4; ++v) acc[u][v] = fmaf(qv[u], xv[v], acc[u][v]);
        }
      }
      square += __shfl_xor_sync(kFullWarp, square, 1);
      if (threadIdx.x % 2 == 0) {
        live[row] = here;
        factor[row] = 1;
        if (here && a.x_scale) factor[row] = a.x_scale[r + row];
        if (a.x_type == DType::u8 && a.unit) factor[row] = square == 0 ? 0.0f : 1.0f / sqrtf(square);
      }
      __syncthreads();
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        if (!live[4 * tx + v]) continue;
        const int32_t at = static_cast<int32_t>(r + 4 * tx + v);
#pragma unroll
        for (int u = 0; u < 4; ++u) best[u] = better(best[u], Best{acc[u][v] * factor[4 * tx + v], at});
      }
    }
    __syncthreads();
#pragma unroll
    for (int u = 0; u < 4; ++u) {
#pragma unroll
      for (int s = 8; s > 0; s >>= 1) {  // over the 16 threads of the same tokens
        const Best other{__shfl_xor_sync(kFullWarp, best[u].value, s), __shfl_xor_sync(kFullWarp, best[u].row, s)};
        best[u] = better(best[u], other);
      }
      const int64_t token = t + 4 * ty + u;
      if (tx == 0) {
        const bool counts = token < t1 && (!a.q_mask || a.q_mask[token]);
        most[4 * ty + u] = counts ? best[u].value : 0.0f;
        if (a.argmax && token < t1) a.argmax[column * a.q_rows + token] = counts ? best[u].row : -1;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0)
      for (int u = 0; u < kTokens && t + u < t1; ++u) sum += most[u];
  }
  if (threadIdx.x == 0) put_score(a, p, i, column, document, sum);
}

// 6 blocks: given no number, ptxas would spill for sm_80 so that more of them fit.
__global__ void __launch_bounds__(kThreads, 6) maxsim_kernel(const MaxsimArgs a, const MaxsimPlan p) {
  plain_pair(a, p, p.first + blockIdx.x / p.columns, blockIdx.x % p.columns);
}

// Pairs whose score is NaN: terms of what is infinite or too large are. Blocks look through the scores in turn.
__global__ void __launch_bounds__(kThreads) maxsim_again_kernel(const MaxsimArgs a, const MaxsimPlan p) {
  __shared__ bool odd[kThreads];
  const int64_t pairs = p.count * p.columns, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads; begin < pairs; begin += step) {
    const int64_t at = begin + threadIdx.x;
    float score = 0;
    if (at < pairs) score = p.keys ? p.keys[at] ? key_score(p.keys[at]) : 0.0f : a.scores[p.first * p.columns + at];
    odd[threadIdx.x] = score != score;
    if (!__syncthreads_or(score != score)) continue;
    for (int j = 0; j < kThreads; ++j)
      if (odd[j]) {
        plain_pair(a, p, p.first + (begin + j) / p.columns, (begin + j) % p.columns);
        __syncthreads();
      }
    __syncthreads();  // all have looked at odd
  }
}

// A block a query token: its columns in order, dimensions across threads.
__global__ void to_queries_kernel(const MaxsimBackwardArgs a) {
  __shared__ int64_t query;
  const int64_t t = blockIdx.x;
  if (threadIdx.x == 0) {
    int64_t low = 0, high = a.nq;  // the last query that begins at or before t
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (a.q_ptr[middle] <= t)
        low = middle;
      else
        high = middle;
    }
    query = low;
  }
  __syncthreads();
  for (int64_t j = threadIdx.x; j < a.d; j += blockDim.x) {
    float sum = 0;
    for (int64_t c = 0; c < a.columns; ++c) {
      const float g = a.grad[query * a.columns + c];
      const int64_t row = a.argmax[c * a.q_rows + t];
      if (g != 0 && row >= 0 && row < a.x_rows) sum += g * value_at(a.x, a.x_type, row * a.ldx + j);
    }
    a.to_q[t * a.d + j] = sum;
  }
}

// A block a document: its queries in order, dimensions across threads, so that no two threads meet in an address.
__global__ void to_documents_kernel(const MaxsimBackwardArgs a) {
  const int64_t document = blockIdx.x, begin = a.x_ptr[document], end = a.x_ptr[document + 1];
  if (begin < 0 || end > a.x_rows) return;
  const int64_t first = a.order ? a.first[document] : 0, last = a.order ? a.first[document + 1] : a.nq;
  for (int64_t j = threadIdx.x; j < a.d; j += blockDim.x) {
    for (int64_t r = begin; r < end; ++r) a.to_x[r * a.d + j] = 0;
    for (int64_t p = first; p < last; ++p) {
      const int64_t i = a.order ? a.order[p] / a.columns : p, c = a.order ? a.order[p] % a.columns : document;
      const float g = a.grad[i * a.columns + c];
      if (g == 0) continue;
      for (int64_t t = a.q_ptr[i]; t < a.q_ptr[i + 1]; ++t) {
        const int64_t row = a.argmax[c * a.q_rows + t];
        if (row >= begin && row < end) a.to_x[row * a.d + j] += g * value_at(a.q, a.q_type, t * a.ldq + j);
      }
    }
  }
}

int threads_for(int64_t d) { return d >= 256 ? 256 : d > 64 ? 128 : d > 32 ? 64 : 32; }

// Queries of which keys are held at once.
int64_t queries_at_once(int64_t nq, int64_t columns) {
  const int64_t most = (int64_t{1} << 26) / (columns > 0 ? columns : 1);
  return most < 1 ? 1 : most < nq ? most : nq;
}

struct Arrays {
  Key* keys;
  void* scratch;
  int64_t bytes;
};
Arrays arrays(int64_t nq, int64_t columns, int64_t k, void* workspace) {
  Carve carve(workspace);
  Arrays w{};
  if (k < 1) return w;
  const int64_t queries = queries_at_once(nq, columns);
  w.keys = carve.take<Key>(queries * columns);
  if (is_long(k, columns)) w.scratch = carve.take<unsigned char>(long_lists_bytes(queries, columns));
  w.bytes = carve.used();
  return w;
}

}  // namespace

MaxsimPlan maxsim_plan(const MaxsimArgs& a, int warps, int64_t first, int64_t count, Key* keys, int device) {
  MaxsimPlan p{};
  p.first = first, p.count = count, p.keys = keys, p.warps = warps;
  p.columns = a.cand ? a.c : a.documents;
  const int64_t tokens = div_up(a.q_rows, a.nq);  // of a query, if they are alike
  p.per_query = power_of_two(div_up(tokens, kChunk), warps);
  p.team = a.cand ? p.per_query : power_of_two(p.per_query * count, warps);
  p.groups = div_up(count, p.team / p.per_query);
  p.rows = p.team > 2 ? 64 : p.team == 2 || a.x_type == DType::i8 ? 32 : 16;
  // Four rounds of blocks, so that the last one leaves little of the machine idle.
  const int64_t wanted = div_up(int64_t{4} * multiprocessors(device) * (warps / p.team), p.groups);
  p.per_stretch = div_up(p.columns, wanted < p.columns ? wanted : p.columns);
  p.stretches = div_up(p.columns, p.per_stretch);
  return p;
}

void maxsim_again(const MaxsimArgs& a, const MaxsimPlan& p, const Launch& l) {
  const int64_t blocks = div_up(p.count * p.columns, kThreads), most = 8 * multiprocessors(l.device);
  launch("maxsim", maxsim_again_kernel, dim3(grid_x(blocks < most ? blocks : most)), kThreads, 0, l, a, p);
}

int64_t maxsim_workspace(int64_t nq, int64_t columns, int64_t k, const Launch& l) {
  const DeviceGuard guard(l.device);
  return arrays(nq, columns, k, nullptr).bytes;
}

void maxsim(const MaxsimArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const int64_t columns = a.cand ? a.c : a.documents;
  if (a.argmax)  // -1, for pairs that have no maxima
    check(cudaMemsetAsync(a.argmax, 0xff, static_cast<size_t>(columns * a.q_rows) * 4, stream_of(l)), "maxsim");
  if (a.nq == 0 || columns == 0) return;
  const Arrays w = arrays(a.nq, columns, a.k, l.workspace);
  Key* keys = w.keys;
  const int64_t step = keys ? queries_at_once(a.nq, columns) : a.nq;
  for (int64_t first = 0; first < a.nq; first += step) {
    const int64_t count = first + step < a.nq ? step : a.nq - first;
    if (!maxsim_mma(a, first, count, keys, l) && !maxsim_terms(a, first, count, keys, l)) {
      const MaxsimPlan p = maxsim_plan(a, 1, first, count, keys, l.device);
      launch("maxsim", maxsim_kernel, dim3(grid_x(count * columns)), kThreads, 0, l, a, p);
    }
    if (!keys) continue;
    Merge m{};
    m.lists = keys;
    m.queries = count;
    m.parts = 1;
    m.per_part = static_cast<int>(columns);
    m.stride = columns;
    m.drop_duplicates = a.cand != nullptr;
    m.best = static_cast<int>(a.k < columns ? a.k : columns);
    m.k = static_cast<int>(a.k);
    m.scores = a.scores + first * a.k;
    m.ids = a.ids + first * a.k;
    m.scratch = w.scratch;
    merge_lists(m, "maxsim", l);
  }
}

void maxsim_backward(const MaxsimBackwardArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const int threads = threads_for(a.d);
  if (a.to_q) launch("maxsim_backward", to_queries_kernel, dim3(grid_x(a.q_rows)), threads, 0, l, a);
  if (a.to_x) launch("maxsim_backward", to_documents_kernel, dim3(grid_x(a.documents)), threads, 0, l, a);
}

}  // namespace cuda
}  // namespace lutra
