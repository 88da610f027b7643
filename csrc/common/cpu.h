// What this machine can run; the choice of SIMD level. Compiled for the platform's baseline only.
#pragma once
#include "common/levels.h"

namespace lutra {

const char* level_name(Level level);  // "portable", "avx2", "avx512"
Level best_level();                   // the highest level that this processor runs
bool baseline_ok();                   // false: not even the portable level would run
bool has_vpopcnt();                   // AVX-512 VPOPCNTDQ, beyond the highest level
bool has_vnni();                      // AVX-512 VNNI, likewise
bool parse_level(const char* text, Level* out);

}  // namespace lutra
