#pragma once
#include "cub/device/device_radix_sort.cuh"

namespace cub {
struct NullType {};

// A block's keys, ITEMS neighbouring ones of each thread.
template <class K, int THREADS, int ITEMS, class V = NullType, int RADIX_BITS = 4>
class BlockRadixSort {
 public:
  struct TempStorage {
    K keys[THREADS * ITEMS];
  };
  explicit BlockRadixSort(TempStorage& storage) : storage_(storage) {}
  void Sort(K (&keys)[ITEMS], int begin = 0, int end = sizeof(K) * 8) {
    const unsigned t = threadIdx.x;
    for (int i = 0; i < ITEMS; ++i) storage_.keys[t * ITEMS + static_cast<unsigned>(i)] = keys[i];
    __syncthreads();
    if (t == 0) {
      const emulate::races::As own(emulate::races::Kind::own);
      std::stable_sort(storage_.keys, storage_.keys + THREADS * ITEMS,
                       [=](K a, K b) { return emulated::digits(a, begin, end) < emulated::digits(b, begin, end); });
    }
    __syncthreads();
    for (int i = 0; i < ITEMS; ++i) keys[i] = storage_.keys[t * ITEMS + static_cast<unsigned>(i)];
  }

 private:
  TempStorage& storage_;
};
}  // namespace cub
