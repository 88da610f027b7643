// The rules of row_update.h on a vector of columns of one row: what row_update and tables_update share.
#pragma once
#include "gather/row_update.h"
#include "gather/rows.h"

namespace lutra {
namespace LUTRA_NS {

LUTRA_INLINE vf root(vf x) {
#if defined(LUTRA_LEVEL_v4)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(LUTRA_LEVEL_v3)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  vf out;
  for (int i = 0; i < W; ++i) out[i] = __builtin_sqrtf(x[i]);
  return out;
#endif
}

// 16 random bits for each of the columns from j on.
LUTRA_INLINE vu bits_of_columns(uint32_t key, int64_t j) {
  vu x;
  for (int i = 0; i < W; ++i) x[i] = key + (static_cast<uint32_t>(j) + static_cast<uint32_t>(i)) * kGolden32;
  return mix32(x) >> 16;
}

// v with random bits added below those that bf16 keeps, and these cleared: a bf16 that a store takes as it is.
LUTRA_INLINE vf round_randomly(vf v, vu bits) {
  const vu u = (vu)v;
  const vu finite = (vu)((u & 0x7f800000u) != 0x7f800000u);
  return (vf)((u + (bits & finite)) & (~finite | 0xffff0000u));
}

template <class T>
LUTRA_INLINE vf take(const typename T::type* p, int part) {
  return part ? load_part<T>(p, part) : T::load(p);
}
template <class T>
LUTRA_INLINE void put(typename T::type* p, vf v, int part) {
  if (part)
    store_part<T>(p, v, part);
  else
    T::store(p, v);
}

// A vector of columns from j on (part > 0: only so many) of one row.
template <class T, Rule R, bool Random>
LUTRA_INLINE void update_columns(const RowUpdateArgs& a, typename T::type* w, const float* g, float* s0, float* s1,
                                 float rate, uint32_t key, int64_t j, int part) {
  vf x = take<T>(w + j, part) * a.shrink;
  const vf grad = take<F32>(g + j, part);
  if (R == Rule::sgd || R == Rule::rowwise_adagrad) {
    x -= grad * rate;
  } else if (R == Rule::momentum) {
    const vf m = take<F32>(s0 + j, part) * a.a + grad;
    put<F32>(s0 + j, m, part);
    x -= m * rate;
  } else if (R == Rule::adagrad) {
    const vf sum = take<F32>(s0 + j, part) + grad * grad;
    put<F32>(s0 + j, sum, part);
    x -= grad * rate / (root(sum) + a.eps);
  } else {
    vf m = take<F32>(s0 + j, part), v = take<F32>(s1 + j, part);
    m += (grad - m) * a.a;  // here a and b hold 1 - beta
    v += (grad * grad - v) * a.b;
    put<F32>(s0 + j, m, part);
    put<F32>(s1 + j, v, part);
    x -= m * rate / (root(v) * a.scale + a.eps);
  }
  if (Random) x = round_randomly(x, bits_of_columns(key, j));
  put<T>(w + j, x, part);
}

}  // namespace LUTRA_NS
}  // namespace lutra
