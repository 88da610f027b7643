// Fast Walsh-Hadamard transform on CUDA; the formula is in fwht.h. Rows of up to kFwhtMost values.
//
// A thread has 8 neighbouring values in registers: three levels there, five more by shuffles, which makes 256. For
// longer rows values go through shared memory to threads that have 2, 4 or 8 of them at the right distance, three
// levels a time (2048 values: one exchange). Rows are read and written once. Limit: that.
#include "address/fwht.h"

#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kLeast = 256;  // threads of a block at least, with several short rows

// Levels 1, 2, ... 2^(L - 1) of 2^L values.
template <int L>
__device__ __forceinline__ void levels(float* v) {
#pragma unroll
  for (int h = 1; h < 1 << L; h <<= 1)
#pragma unroll
    for (int i = 0; i < 1 << L; ++i)
      if (!(i & h)) {
        const float a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
}

// L levels at the distances s = 2^log, 2 s, ... of a row in shared memory, whose thread t of n / 8 this is; the values
// are in v afterwards, value e of group q at index(e).
template <int L>
__device__ __forceinline__ int place(int e, int t, int threads, int log) {
  const int group = t + (e >> L) * threads;
  return ((((group >> log) << L) + (e & ((1 << L) - 1))) << log) + (group & ((1 << log) - 1));
}
template <int L>
__device__ __forceinline__ void far_levels(const float* row, int t, int threads, int log, float* v) {
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e] = row[place<L>(e, t, threads, log)];
#pragma unroll
  for (int q = 0; q < 8; q += 1 << L) levels<L>(v + q);
}

template <class T>
__global__ void __launch_bounds__(1024)
    fwht_kernel(const T* x, int64_t values, int n, float scale, bool whole, T* out) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  float v[8];
  if (whole && at < values) {
    constexpr int N = 16 / sizeof(T) < 8 ? 16 / sizeof(T) : 8;
#pragma unroll
    for (int i = 0; i < 8; i += N) {
      const Pack<T, N> pack = load_pack<T, N>(x + at + i);
#pragma unroll
      for (int e = 0; e < N; ++e) v[i + e] = pack[e];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = at + i < values ? to_float(x[at + i]) : 0.0f;
  }
#pragma unroll
  for (int h = 1; h < 8; h <<= 1) {
    if (h >= n) break;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (!(i & h)) {
        const float a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
  }
#pragma unroll
  for (int s = 1; s < 32; s <<= 1) {
    if (s * 8 >= n) break;
    const bool upper = threadIdx.x & s;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, v[i], s);
      v[i] = upper ? other - v[i] : v[i] + other;
    }
  }
  if (n <= 256) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= scale;
    if (whole && at < values) {
      store_pack<T, 8>(out + at, v);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (at + i < values) out[at + i] = from_float<T>(v[i]);
    }
    return;
  }
  const int threads = n / 8, t = threadIdx.x % threads;
  float* row = dynamic_shared<float>() + threadIdx.x / threads * n;
  *reinterpret_cast<float4*>(row + t * 8) = make_float4(v[0], v[1], v[2], v[3]);
  *reinterpret_cast<float4*>(row + t * 8 + 4) = make_float4(v[4], v[5], v[6], v[7]);
  __syncthreads();
  int log = 8;
  if (n >> log > 8) {  // more than three levels are left: three of them, and back
    far_levels<3>(row, t, threads, log, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) row[place<3>(e, t, threads, log)] = v[e];  // where this thread read them
    __syncthreads();
    log += 3;
  }
  const int64_t begin = at - t * 8;  // of the row
  const auto put = [&](int e, int to) {
    if (begin < values) out[begin + to] = from_float<T>(v[e] * scale);
  };
  if (n >> log == 8) {
    far_levels<3>(row, t, threads, log, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) put(e, place<3>(e, t, threads, log));
  } else if (n >> log == 4) {
    far_levels<2>(row, t, threads, log, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) put(e, place<2>(e, t, threads, log));
  } else {
    far_levels<1>(row, t, threads, log, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) put(e, place<1>(e, t, threads, log));
  }
}

template <class T>
void run(const FwhtArgs& a, const Launch& l) {
  const int64_t values = a.rows * a.n;
  const int row_threads = static_cast<int>(a.n > 256 ? a.n / 8 : 1);
  const int threads = row_threads > kLeast ? row_threads : kLeast;
  const size_t shared = a.n > 256 ? static_cast<size_t>(threads) * 8 * sizeof(float) : 0;
  const bool whole = values % 8 == 0 && aligned(a.x, 16) && aligned(a.out, 16);
  launch("fwht", fwht_kernel<T>, dim3(grid_x(div_up(values, threads * 8))), threads, shared, l,
         static_cast<const T*>(a.x), values, static_cast<int>(a.n), a.scale, whole, static_cast<T*>(a.out));
}

}  // namespace

void fwht(const FwhtArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.dtype) {
    case DType::f16: return run<__half>(a, l);
    case DType::bf16: return run<__nv_bfloat16>(a, l);
    default: return run<float>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
