// The check of codes that tables and its gradient share.
#pragma once
#include "common/levels.h"

#include <stdint.h>

namespace lutra {
namespace LUTRA_NS {

// The position of the first code outside [0, entries), or -1.
static inline int64_t first_bad_code(const int32_t* codes, int64_t n, int64_t entries) {
  const uint32_t limit = entries > INT32_MAX ? static_cast<uint32_t>(INT32_MAX) + 1u : static_cast<uint32_t>(entries);
  const int64_t block = 1 << 14;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = begin + block < n ? begin + block : n;
    uint32_t outside = 0;  // no branch, so that the check is a vector loop
    for (int64_t i = begin; i < end; ++i) outside |= static_cast<uint32_t>(codes[i]) >= limit;
    if (!outside) continue;
    int64_t i = begin;
    while (static_cast<uint32_t>(codes[i]) < limit) ++i;
    return i;
  }
  return -1;
}

}  // namespace LUTRA_NS
}  // namespace lutra
