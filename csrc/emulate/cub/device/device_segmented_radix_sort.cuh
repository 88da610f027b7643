#pragma once
#include "cub/device/device_radix_sort.cuh"

namespace cub {
struct DeviceSegmentedRadixSort {
  template <class K, class N, class O>
  static cudaError_t SortKeysDescending(void* temporary, size_t& bytes, const K* keys, K* out, N, N segments,
                                        const O* begins, const O* ends, int begin = 0, int end = sizeof(K) * 8,
                                        cudaStream_t = nullptr) {
    if (!temporary) return bytes = emulated::kTemporary, cudaSuccess;
    for (N s = 0; s < segments; ++s) {
      const int64_t first = begins[s], n = ends[s] - first;
      const auto at = emulated::order(keys + first, n, begin, end, true);
      for (int64_t i = 0; i < n; ++i) out[first + i] = keys[first + at[static_cast<size_t>(i)]];
    }
    return cudaSuccess;
  }
};
}  // namespace cub
