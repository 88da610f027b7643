#include "common/levels.h"

#include "common/cpu.h"
#include "common/features.h"

#include <cstdlib>
#include <cstring>

namespace lutra {

Level g_level = Level::portable;
Features g_features = {};

Features found_features() {
  Features f = {};
#ifdef LUTRA_HAVE_v4
  if (best_level() == Level::v4) {
    f.vnni = __builtin_cpu_supports("avx512vnni");
    f.vbmi = __builtin_cpu_supports("avx512vbmi");
    f.bf16 = __builtin_cpu_supports("avx512bf16");
  }
#endif
  return f;
}

const char* level_name(Level level) {
  switch (level) {
    case Level::v4: return "avx512";
    case Level::v3: return "avx2";
    default: return "portable";
  }
}

Level best_level() {
#ifdef LUTRA_HAVE_v4
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    return Level::v4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c"))
    return Level::v3;
#endif
  return Level::portable;
}

bool baseline_ok() {
#ifdef LUTRA_HAVE_v4
  __builtin_cpu_init();
  return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("popcnt");
#else
  return true;
#endif
}

bool has_vpopcnt() {
#ifdef LUTRA_HAVE_v4
  __builtin_cpu_init();
  return best_level() == Level::v4 && __builtin_cpu_supports("avx512vpopcntdq");
#else
  return false;
#endif
}

bool has_vnni() {
#ifdef LUTRA_HAVE_v4
  __builtin_cpu_init();
  return best_level() == Level::v4 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool parse_level(const char* text, Level* out) {
  const Level all[] = {Level::portable, Level::v3, Level::v4};
  for (Level level : all)
    if (std::strcmp(text, level_name(level)) == 0) {
      *out = level;
      return true;
    }
  return false;
}

}  // namespace lutra
