// Exact scores of given candidates, normalized queries, and the types of the pass over a collection.
//
// Candidates: a thread per candidate, which sums in the order of exact_score.cuh; a row is read 64 bytes at a time, so
// that every sector that is read is used. The limit is the latency of random reads: where there are few candidates, the
// whole row is asked for before its sum begins.
#include "scan/exact_pass.h"
#include "scan/exact_score.cuh"

namespace lutra {
namespace cuda {

void exact_pass_f32(const PassArgs&, const Launch&);
void exact_pass_f16(const PassArgs&, const Launch&);
void exact_pass_bf16(const PassArgs&, const Launch&);
void exact_pass_i8(const PassArgs&, const Launch&);
void exact_pass_u8(const PassArgs&, const Launch&);

namespace {

constexpr int kThreads = 256;
constexpr int64_t kLine = 128;  // bytes

template <class T, int SUM>
__device__ __forceinline__ void sum_row(const float* q, const T* x, int d, bool vectors, float* sum,
                                        SquaresOf<SUM>* squares) {
  constexpr int V = 16 / sizeof(T), kAhead = 4;
  int k = 0;
  if (vectors) {
    for (; k + kAhead * V <= d; k += kAhead * V) {
      uint4 piece[kAhead];
#pragma unroll
      for (int p = 0; p < kAhead; ++p) piece[p] = *reinterpret_cast<const uint4*>(x + k + p * V);
#pragma unroll
      for (int p = 0; p < kAhead; ++p) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const float v = unpacked<T>(piece[p], e);
          add_column<SUM>(q[k + p * V + e], v, sum);
          add_square<SUM>(v, squares);
        }
      }
    }
  }
  for (; k < d; ++k) {
    const float v = to_float(x[k]);
    add_column<SUM>(q[k], v, sum);
    add_square<SUM>(v, squares);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) candidates_kernel(CandidateArgs a, bool vectors, bool ahead) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.nq * a.c) return;
  const int64_t id = a.counts && i % a.c >= a.counts[i / a.c] ? -1 : a.cand[i];
  Key key = 0;
  if (id >= 0 && id < a.n) {
    const float* q = a.q + i / a.c * a.ldq;
    const T* x = static_cast<const T*>(a.x) + id * a.ldx;
    if (ahead)
      for (int64_t at = 0; at < a.d * static_cast<int64_t>(sizeof(T)); at += kLine)
        prefetch_l2(reinterpret_cast<const unsigned char*>(x) + at);
    float sum = 0, squares = 0, score;
    if (a.metric == Metric::poincare) {
      double wide = 0;
      sum_row<T, kSumPoincare>(q, x, a.d, vectors, &sum, &wide);
      score = ranked_score<T>(a.metric, sum, wide, x, a.d, nullptr, id, a.rooms[i / a.c]);
      a.keys[i] = make_key(score, static_cast<uint32_t>(id));
      return;
    }
    switch (a.metric) {
      case Metric::l2: sum_row<T, kSumSquares>(q, x, a.d, vectors, &sum, &squares); break;
      case Metric::l1: sum_row<T, kSumAbsolute>(q, x, a.d, vectors, &sum, &squares); break;
      case Metric::linf: sum_row<T, kSumLargest>(q, x, a.d, vectors, &sum, &squares); break;
      default: sum_row<T, kSumProduct>(q, x, a.d, vectors, &sum, &squares);
    }
    score = ranked_score<T>(a.metric, sum, squares, x, a.d, a.bias, id, 0.0);
    key = make_key(score, static_cast<uint32_t>(id));
  } else if (id != -1) {
    key = make_key(quiet_nan(), 0xffffffffu);
  }
  a.keys[i] = key;
}

template <class T>
void run_candidates(const CandidateArgs& a, const Launch& l) {
  const bool vectors = aligned(a.x, 16) && a.ldx * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  const bool few = a.nq * a.c <= multiprocessors(l.device) * int64_t{kThreads};
  const int threads = few ? 32 : kThreads;  // few: over all multiprocessors
  launch("rescore", candidates_kernel<T>, grid_x(div_up(a.nq * a.c, threads)), threads, 0, l, a, vectors, few);
}

// Cosine: the queries are divided by their norms beforehand, so that no product of large values overflows.
__global__ void __launch_bounds__(kThreads)
    normalize_kernel(const float* q, int64_t nq, int64_t ldq, int64_t d, float* to) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> 5;
  const int lane = threadIdx.x & 31;
  if (i >= nq) return;
  const float* v = q + i * ldq;
  float squares = 0;
  for (int64_t k = lane; k < d; k += 32) squares = fmaf(v[k], v[k], squares);
  const float factor = inverse_norm(warp_sum(squares), v, d);
  for (int64_t k = lane; k < d; k += 32) to[i * d + k] = v[k] * factor;
}

__global__ void __launch_bounds__(kThreads)
    rooms_kernel(const float* q, int64_t nq, int64_t ldq, int64_t d, double* to) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> 5;
  const int lane = threadIdx.x & 31;
  if (i >= nq) return;
  double squares = 0;
  for (int64_t k = lane; k < d; k += 32) squares += static_cast<double>(q[i * ldq + k]) * q[i * ldq + k];
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) squares += __shfl_xor_sync(kFullWarp, squares, s);
  if (lane == 0) to[i] = ball_factor(squares);
}

}  // namespace

int pass_blocks(int device) { return multiprocessors(device); }

int64_t pass_scratch(int64_t nq, int best, int device) {
  return static_cast<int64_t>(pass_blocks(device)) * pass_group(nq) * kPassWarps * pass_capacity(best);
}

void exact_pass(const PassArgs& a, const Launch& l) {
  switch (a.storage) {
    case DType::f16: return exact_pass_f16(a, l);
    case DType::bf16: return exact_pass_bf16(a, l);
    case DType::i8: return exact_pass_i8(a, l);
    case DType::u8: return exact_pass_u8(a, l);
    default: return exact_pass_f32(a, l);
  }
}

void score_candidates(const CandidateArgs& a, const Launch& l) {
  switch (a.storage) {
    case DType::f16: return run_candidates<__half>(a, l);
    case DType::bf16: return run_candidates<__nv_bfloat16>(a, l);
    case DType::i8: return run_candidates<int8_t>(a, l);
    case DType::u8: return run_candidates<uint8_t>(a, l);
    default: return run_candidates<float>(a, l);
  }
}

void normalize_queries(const float* q, int64_t nq, int64_t ldq, int64_t d, float* to, const Launch& l) {
  launch("knn", normalize_kernel, grid_x(div_up(nq * 32, kThreads)), kThreads, 0, l, q, nq, ldq, d, to);
}

void query_rooms(const float* q, int64_t nq, int64_t ldq, int64_t d, double* to, const Launch& l) {
  launch("knn", rooms_kernel, grid_x(div_up(nq * 32, kThreads)), kThreads, 0, l, q, nq, ldq, d, to);
}

}  // namespace cuda
}  // namespace lutra
