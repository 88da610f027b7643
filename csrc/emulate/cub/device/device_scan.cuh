#pragma once
#include "cub/device/device_radix_sort.cuh"

namespace cub {
struct DeviceScan {
  template <class T, class O, class N>
  static cudaError_t InclusiveSum(void* temporary, size_t& bytes, const T* in, O* out, N n, cudaStream_t = nullptr) {
    if (!temporary) return bytes = emulated::kTemporary, cudaSuccess;
    O sum{};
    for (N i = 0; i < n; ++i) out[i] = sum = static_cast<O>(sum + in[i]);
    return cudaSuccess;
  }
};
}  // namespace cub
