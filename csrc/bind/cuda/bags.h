// The ids of a bag call, as the CUDA bindings take them.
#pragma once
#include "bind/cuda/intake.h"
#include "gather/bag.h"

namespace lutra {

inline BagIds bag_ids(Address ids, int id_type, int64_t n_ids, Address offsets, bool last_offset, int64_t bags,
                      int64_t length, int64_t padding_idx, int mode) {
  return BagIds{ids.p,       static_cast<DType>(id_type), n_ids, offsets.p, last_offset, bags, length,
                padding_idx, static_cast<Mode>(mode)};
}

}  // namespace lutra
