// Which rows each bag takes, as the bindings of all bag kernels get it.
#pragma once
#include "bind/core/intake.h"
#include "gather/bag.h"

namespace lutra {

// The ids of a bag call: (ids, id_type, n_ids, offsets, last_offset, bags, length, padding_idx, mode).
inline BagIds bag_ids(Ptr ids, int id_type, int64_t n_ids, Ptr offsets, bool last_offset, int64_t bags, int64_t length,
                      int64_t padding_idx, int mode) {
  const auto t = static_cast<DType>(id_type);
  return BagIds{ids.raw(n_ids, t),
                t,
                n_ids,
                offsets.raw(offsets.p ? bags + last_offset : 0, t),
                last_offset,
                bags,
                length,
                padding_idx,
                static_cast<Mode>(mode)};
}

}  // namespace lutra
