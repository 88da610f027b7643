// Packed bits of vectors on CUDA; the contract is in binarize.h.
//
// A thread a byte: 8 values, two or one accesses of 16 bytes where rows allow it. Limit: reading x.
#include "address/binarize.h"

#include "common/device.cuh"

namespace lutra {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// thresholds (d,) or null: threshold for all. whole: rows are whole bytes and begin at multiples of 16.
template <class T>
__global__ void __launch_bounds__(kThreads)
    binarize_kernel(const T* x, int64_t bytes, int64_t d, int64_t width, const float* thresholds, float threshold,
                    bool whole, uint8_t* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= bytes) return;
  int64_t row = 0, byte = at;
  if (!whole || thresholds) {
    row = bytes <= 0xffffffff ? static_cast<uint32_t>(at) / static_cast<uint32_t>(width) : at / width;
    byte = at - row * width;
  }
  float v[8];
  if (whole) {
    constexpr int N = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < 8; i += N) {
      const Pack<T, N> pack = load_pack<T, N>(x + at * 8 + i);
#pragma unroll
      for (int e = 0; e < N && e < 8; ++e) v[i + e] = pack[e];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = byte * 8 + i < d ? to_float(x[row * d + byte * 8 + i]) : quiet_nan();
  }
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float limit = !thresholds ? threshold : byte * 8 + i < d ? thresholds[byte * 8 + i] : 0.0f;
    bits |= static_cast<unsigned>(v[i] > limit) << i;
  }
  out[at] = static_cast<uint8_t>(bits);
}

template <class T>
void run(const BinarizeArgs& a, const Launch& l) {
  const int64_t width = div_up(a.d, 8), bytes = a.n * width;
  const bool whole = a.d % 8 == 0 && aligned(a.x, 16);
  launch("binarize", binarize_kernel<T>, dim3(grid_x(div_up(bytes, kThreads))), kThreads, 0, l,
         static_cast<const T*>(a.x), bytes, a.d, width, a.threshold, a.all, whole, a.out);
}

}  // namespace

void binarize(const BinarizeArgs& a, const Launch& l) {
  const DeviceGuard guard(l.device);
  switch (a.dtype) {
    case DType::f16: return run<__half>(a, l);
    case DType::bf16: return run<__nv_bfloat16>(a, l);
    default: return run<float>(a, l);
  }
}

}  // namespace cuda
}  // namespace lutra
