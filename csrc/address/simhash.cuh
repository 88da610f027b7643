// The launch that simhash and fde share on CUDA.
#pragma once
#include "address/simhash.h"
#include "common/levels.h"

namespace lutra {
namespace cuda {

// Numbers of rows to out[row * row_step + repetition * repetition_step].
void simhash_numbers(const SimhashArgs& a, int64_t row_step, int64_t repetition_step, const Launch& l);

}  // namespace cuda
}  // namespace lutra
