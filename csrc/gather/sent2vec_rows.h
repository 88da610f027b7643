// How sent2vec's kernel reads and writes rows: alone, or beside other threads that do the same (Hogwild).
#pragma once
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {

struct Alone {
  LUTRA_INLINE vf load(const float* p) { return LUTRA_NS::load(p); }
  LUTRA_INLINE void store(float* p, vf v) { LUTRA_NS::store(p, v); }
};

// One instruction that the compiler does not look into, or relaxed atomics: a number is never torn, the rest is chance.
struct Shared {
  LUTRA_INLINE vf load(const float* p) {
#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
    vf v;
    __asm__ volatile("vmovups %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const vf_unaligned*>(p)));
    return v;
#elif defined(__SSE__)
    vf v;
    __asm__ volatile("movups %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const vf_unaligned*>(p)));
    return v;
#else
    vf v;
    for (int i = 0; i < W; ++i) {
      const int32_t bits = __atomic_load_n(reinterpret_cast<const int32_t*>(p) + i, __ATOMIC_RELAXED);
      float f;
      memcpy(&f, &bits, 4);
      v[i] = f;
    }
    return v;
#endif
  }
  LUTRA_INLINE void store(float* p, vf v) {
#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
    __asm__ volatile("vmovups %1, %0" : "=m"(*reinterpret_cast<vf_unaligned*>(p)) : "v"(v));
#elif defined(__SSE__)
    __asm__ volatile("movups %1, %0" : "=m"(*reinterpret_cast<vf_unaligned*>(p)) : "x"(v));
#else
    for (int i = 0; i < W; ++i) {
      const float f = v[i];
      int32_t bits;
      memcpy(&bits, &f, 4);
      __atomic_store_n(reinterpret_cast<int32_t*>(p) + i, bits, __ATOMIC_RELAXED);
    }
#endif
  }
};

}  // namespace LUTRA_NS
}  // namespace lutra
