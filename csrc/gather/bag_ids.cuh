// Where a bag's ids lie, on the device; BagIds of bag.h as the kernels read it.
#pragma once
#include "common/device.cuh"
#include "gather/bag.h"

namespace lutra {
namespace cuda {

struct BagView {
  Ids ids, offsets;
  int64_t n_ids, bags, length, padding_idx;
  bool last_offset;

  // Bag b holds the positions [*begin, *end). False where its offsets are out of order or out of range.
  __device__ __forceinline__ bool range(int64_t b, int64_t* begin, int64_t* end) const {
    if (!offsets.p) {
      *begin = b * length;
      *end = *begin + length;
      return true;
    }
    *begin = offsets[b];
    *end = (last_offset || b + 1 < bags) ? offsets[b + 1] : n_ids;
    const bool good = *begin >= 0 && *begin <= *end && *end <= n_ids;
    if (!good) *begin = *end = 0;
    return good;
  }

  // The bag of position i, or -1 where none holds it.
  __device__ __forceinline__ int64_t bag_of(int64_t i) const {
    if (!offsets.p) return length > 0 ? i / length : -1;
    int64_t low = -1, high = bags;  // the last bag that begins at or before i (empty bags before it do too)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (offsets[middle] <= i)
        low = middle;
      else
        high = middle;
    }
    int64_t begin, end;
    return low >= 0 && range(low, &begin, &end) && begin <= i && i < end ? low : -1;
  }
};

inline BagView view_of(const BagIds& b) {
  return BagView{{b.ids, b.id_type == DType::i64},
                 {b.offsets, b.id_type == DType::i64},
                 b.n_ids,
                 b.bags,
                 b.length,
                 b.padding_idx,
                 b.last_offset};
}

}  // namespace cuda
}  // namespace lutra
