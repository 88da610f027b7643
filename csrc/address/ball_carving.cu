// Ball carving on CUDA; the contract is in ball_carving.h. NaN and infinity are not looked for.
//
// A block a query. Rows take their turn; the warps share out the centres so far, each summing the products with the row
// over its lanes until it finds a near one. The lowest that a warp has found wins, so their order does not matter. Sums
// are made by a block a query too, a thread a dimension, in the order of the rows. Limit: the chain of rows of a query;
// many queries hide it.
#include "address/ball_carving.h"

#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// The centres of a query are remembered in `first` (n,): the row of ball b of the query that begins at row p is
// first[p + b].
template <class T>
__global__ void __launch_bounds__(kThreads) balls_kernel(BallsArgs a, int32_t* first) {
  __shared__ int found, count;
  const auto* tokens = static_cast<const T*>(a.tokens);
  const int64_t begin = a.ptr[blockIdx.x], end = a.ptr[blockIdx.x + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) count = 0, found = 0x7fffffff;
  __syncthreads();
  if (begin >= 0 && end <= a.n) {
    for (int64_t t = begin; t < end; ++t) {
      const int balls = count;
      const T* x = tokens + t * a.d;
      for (int b = warp; b < balls; b += kWarps) {
        const T* c = tokens + (begin + first[begin + b]) * a.d;
        float sum = 0;
        for (int64_t j = lane; j < a.d; j += 32) sum = fmaf(to_float(x[j]), to_float(c[j]), sum);
        sum = warp_sum(sum);
        if (sum >= a.threshold) {
          if (lane == 0) atomicMin(&found, b);
          break;
        }
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        const bool opens = found >= balls;
        a.balls[t] = opens ? balls : found;
        if (opens) {
          first[begin + balls] = static_cast<int32_t>(t - begin);
          count = balls + 1;
        }
        found = 0x7fffffff;
      }
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) a.counts[blockIdx.x] = count;
}

template <class T>
__global__ void __launch_bounds__(kThreads) ball_sums_kernel(BallSumsArgs a) {
  const auto* tokens = static_cast<const T*>(a.tokens);
  const int64_t begin = a.ptr[blockIdx.x], end = a.ptr[blockIdx.x + 1];
  if (begin < 0 || end > a.n) return;
  float* out = a.out + a.out_ptr[blockIdx.x] * a.d;
  for (int64_t j = threadIdx.x; j < a.d; j += kThreads) {
    int count = 0;
    for (int64_t t = begin; t < end; ++t) {
      const int ball = a.balls[t];
      const float v = to_float(tokens[t * a.d + j]);
      const bool opens = ball == count;
      count += opens;
      float* to = out + static_cast<int64_t>(ball) * a.d + j;
      *to = opens ? v : *to + v;
    }
  }
}

}  // namespace

void balls(const BallsArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const auto kernel = a.dtype == DType::f16    ? balls_kernel<__half>
                      : a.dtype == DType::bf16 ? balls_kernel<__nv_bfloat16>
                                               : balls_kernel<float>;
  launch("balls", kernel, dim3(grid_x(a.queries)), kThreads, 0, l, a, static_cast<int32_t*>(l.workspace));
}

void ball_sums(const BallSumsArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  const auto kernel = a.dtype == DType::f16    ? ball_sums_kernel<__half>
                      : a.dtype == DType::bf16 ? ball_sums_kernel<__nv_bfloat16>
                                               : ball_sums_kernel<float>;
  launch("ball_sums", kernel, dim3(grid_x(a.queries)), kThreads, 0, l, a);
}

}  // namespace cuda
}  // namespace lutra
