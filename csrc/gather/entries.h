// The ids of a range of bags as a list of rows.
#pragma once
#include "common/parallel.h"
#include "gather/bag_ids.h"

namespace lutra {
namespace LUTRA_NS {

// The ids of the bags [b0, b1): the caller's own arrays where they will do (int64, no padding), else copies, padding
// left out. ends[b - b0] is where bag b ends in the list.
struct Entries {
  const int64_t* index;
  const float* weights;
  int64_t n;
  bool compacted, failed;
  Buffer<int64_t> copy, ends;
  Buffer<float> weight_copy;

  template <class Id>
  Entries(const BagIds& bag, int64_t rows_, const float* w, const BagBounds& bounds, const Id* ids, int64_t b0,
          int64_t b1, BadFirst* bad)
      : compacted(bag.padding_idx >= 0), copy(sizeof(Id) == 8 && !compacted ? 0 : bounds.begin(b1) - bounds.begin(b0)),
        ends(compacted ? b1 - b0 : 0), weight_copy(compacted && w ? bounds.begin(b1) - bounds.begin(b0) : 0) {
    const int64_t e0 = bounds.begin(b0), e1 = bounds.begin(b1);
    const uint64_t rows = static_cast<uint64_t>(rows_);
    uint64_t outside = 0;  // no branch, so that the check is a vector loop
    for (int64_t e = e0; e < e1; ++e) outside |= static_cast<uint64_t>(static_cast<int64_t>(ids[e])) >= rows;
    if (outside) {
      int64_t e = e0;
      while (static_cast<uint64_t>(static_cast<int64_t>(ids[e])) < rows) ++e;
      bad->report(e);
    }
    failed = outside != 0;
    n = failed ? 0 : e1 - e0;
    weights = w ? w + e0 : nullptr;
    if (failed) {
      index = nullptr;
    } else if (compacted) {
      index = copy.data;
      n = 0;
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t end = bounds.begin(b + 1);
        for (int64_t e = bounds.begin(b); e < end; ++e) {
          copy[n] = ids[e];
          if (weights) weight_copy[n] = w[e];
          n += ids[e] != bag.padding_idx;
        }
        ends[b - b0] = n;
      }
      if (weights) weights = weight_copy.data;
    } else if (sizeof(Id) == 8) {
      index = reinterpret_cast<const int64_t*>(ids + e0);
    } else {
      for (int64_t e = e0; e < e1; ++e) copy[e - e0] = ids[e];
      index = copy.data;
    }
  }
};

}  // namespace LUTRA_NS
}  // namespace lutra
