// Zeroed memory that outlives a call: a kernel that needs a large map of which it touches little takes one, and gives
// it back zeroed, so that the next call neither allocates nor clears. Compiled once, for the platform's baseline.
#pragma once
#include <cstdint>

namespace lutra {

// At least `bytes` bytes, all zero, aligned to 64. Never null: out of memory aborts, as in Buffer.
void* scratch_take(int64_t bytes);
// Back, zero again. A few blocks of at most 4 MB are kept, the others are freed.
void scratch_give(void* memory);

}  // namespace lutra
