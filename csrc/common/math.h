// Elementary functions on vectors, at a SIMD level.
#pragma once
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {

// exp(x) for x <= 0, to about 2 ulp; 0 or 1e-38 below -87; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; exp r by its Taylor polynomial of degree 7 (error 3e-9), 2^n by the exponent.
LUTRA_INLINE vf exp_nonpositive(vf x) {
  const vf low = splat(-87.0f);
  x = x < low ? low : x;                // NaN compares false and stays
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const vf shifted = x * 1.44269504089f + magic;
  const vf n = shifted - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const vi exponent = ((vi)shifted - (vi)magic) << 23;
  return (vf)((vi)p + exponent);
}

}  // namespace LUTRA_NS
}  // namespace lutra
