// Twins of what the kernels use of CUB on a device: the same interface, stable sorts of the standard library.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda_runtime.h"

namespace cub {
namespace emulated {
template <class K>
inline uint64_t digits(K key, int begin, int end) {
  const uint64_t mask = end - begin >= 64 ? ~uint64_t{0} : (uint64_t{1} << (end - begin)) - 1;
  return static_cast<uint64_t>(key) >> begin & mask;
}
// The order of n keys, of which bits [begin, end) count.
template <class K>
std::vector<int64_t> order(const K* keys, int64_t n, int begin, int end, bool descending) {
  std::vector<int64_t> at(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) at[static_cast<size_t>(i)] = i;
  std::stable_sort(at.begin(), at.end(), [&](int64_t a, int64_t b) {
    const uint64_t x = digits(keys[a], begin, end), y = digits(keys[b], begin, end);
    return descending ? x > y : x < y;
  });
  return at;
}
constexpr size_t kTemporary = 512;
}  // namespace emulated

struct DeviceRadixSort {
  template <class K, class V, class N>
  static cudaError_t SortPairs(void* temporary, size_t& bytes, const K* keys, K* keys_out, const V* values,
                               V* values_out, N n, int begin = 0, int end = sizeof(K) * 8, cudaStream_t = nullptr) {
    if (!temporary) return bytes = emulated::kTemporary, cudaSuccess;
    const auto at = emulated::order(keys, n, begin, end, false);
    for (int64_t i = 0; i < n; ++i) {
      keys_out[i] = keys[at[static_cast<size_t>(i)]];
      values_out[i] = values[at[static_cast<size_t>(i)]];
    }
    return cudaSuccess;
  }
  template <class K, class N>
  static cudaError_t SortKeysDescending(void* temporary, size_t& bytes, const K* keys, K* out, N n, int begin = 0,
                                        int end = sizeof(K) * 8, cudaStream_t = nullptr) {
    if (!temporary) return bytes = emulated::kTemporary, cudaSuccess;
    const auto at = emulated::order(keys, n, begin, end, true);
    for (int64_t i = 0; i < n; ++i) out[i] = keys[at[static_cast<size_t>(i)]];
    return cudaSuccess;
  }
};
}  // namespace cub
