#include "address/hash_features.h"

#include "common/parallel.h"
#include "common/simd.h"
#include "common/team.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

void one_by_one(const HashFeaturesArgs& g, uint64_t x, int64_t j, float* out) {
  const double top = g.buckets - 1, scale = 1 / top;
  for (; j < g.k; ++j) {
    const uint64_t p = static_cast<uint64_t>(g.p[j]);
    const uint64_t h = (static_cast<uint64_t>(g.a[j]) * x + static_cast<uint64_t>(g.b[j])) % p;
    out[j] = static_cast<float>((2 * static_cast<double>(h % static_cast<uint64_t>(g.buckets)) - top) * scale);
  }
}

#if defined(LUTRA_LEVEL_v4)
constexpr int D = 8;
typedef __m512d vd;
LUTRA_INLINE vd all(double x) { return _mm512_set1_pd(x); }
LUTRA_INLINE vd load_d(const double* p) { return _mm512_loadu_pd(p); }
LUTRA_INLINE vd floor_d(vd x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
LUTRA_INLINE vd minus_product(vd x, vd y, vd z) { return _mm512_fnmadd_pd(x, y, z); }  // z - x y
LUTRA_INLINE vd product_minus(vd x, vd y, vd z) { return _mm512_fmsub_pd(x, y, z); }   // x y - z
LUTRA_INLINE vd below(vd r, vd p) {  // r - p where r >= p, r + p where r < 0
  r = _mm512_mask_sub_pd(r, _mm512_cmp_pd_mask(r, p, _CMP_GE_OQ), r, p);
  return _mm512_mask_add_pd(r, _mm512_cmp_pd_mask(r, _mm512_setzero_pd(), _CMP_LT_OQ), r, p);
}
LUTRA_INLINE void put_d(float* out, vd x) { _mm256_storeu_ps(out, _mm512_cvtpd_ps(x)); }
#elif defined(LUTRA_LEVEL_v3)
constexpr int D = 4;
typedef __m256d vd;
LUTRA_INLINE vd all(double x) { return _mm256_set1_pd(x); }
LUTRA_INLINE vd load_d(const double* p) { return _mm256_loadu_pd(p); }
LUTRA_INLINE vd floor_d(vd x) { return _mm256_floor_pd(x); }
LUTRA_INLINE vd minus_product(vd x, vd y, vd z) { return _mm256_fnmadd_pd(x, y, z); }
LUTRA_INLINE vd product_minus(vd x, vd y, vd z) { return _mm256_fmsub_pd(x, y, z); }
LUTRA_INLINE vd below(vd r, vd p) {
  r = r - (vd)_mm256_and_pd(_mm256_cmp_pd(r, p, _CMP_GE_OQ), p);
  return r + (vd)_mm256_and_pd(_mm256_cmp_pd(r, _mm256_setzero_pd(), _CMP_LT_OQ), p);
}
LUTRA_INLINE void put_d(float* out, vd x) { _mm_storeu_ps(out, _mm256_cvtpd_ps(x)); }
#endif

void features(const HashFeaturesArgs& g, const double* inverse, uint64_t x, float* out) {
  int64_t j = 0;
  (void)inverse;  // of no use one by one
#if defined(LUTRA_LEVEL_v4) || defined(LUTRA_LEVEL_v3)
  const vd id = all(static_cast<double>(x)), buckets = all(g.buckets);
  const vd top = all(g.buckets - 1), scale = all(1 / (g.buckets - 1));
  const vd per_bucket = all(1 / g.buckets);
  for (; j + D <= g.k; j += D) {
    const vd a = load_d(g.a + j), p = load_d(g.p + j), per_p = load_d(inverse + j);
    const vd high = a * id, low = product_minus(a, id, high);  // a x = high + low, below 2^63
    // |high - q p| is an integer below 2^33, and so is all that follows: nothing is rounded.
    vd r = minus_product(floor_d(high * per_p), p, high) + (low + load_d(g.b + j));
    r = below(minus_product(floor_d(r * per_p), p, r), p);
    r = below(minus_product(floor_d(r * per_bucket), buckets, r), buckets);
    put_d(out + j, ((r + r) - top) * scale);
  }
#endif
  one_by_one(g, x, j, out);
}

template <class Id>
void of_ids(const HashFeaturesArgs& g, const double* inverse) {
  const auto* ids = static_cast<const Id*>(g.ids);
  for (int64_t i = 0; i < g.n; ++i) {
    const uint64_t x = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
    if (x >> 32) {
      *g.bad = i;
      return;
    }
  }
  const int64_t grain = 40000 / (g.k * 2 + 10) + 1;
  team_ranges(g.n, grain, static_cast<double>(g.n * g.k) * 0.7, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) features(g, inverse, static_cast<uint64_t>(ids[i]), g.out + i * g.k);
  });
}

}  // namespace

void hash_features(const HashFeaturesArgs& g) {
  *g.bad = -1;
  Buffer<double> inverse(g.k);
  for (int64_t j = 0; j < g.k; ++j) inverse[j] = 1 / g.p[j];
  if (g.id_type == DType::i32)
    of_ids<int32_t>(g, inverse.data);
  else
    of_ids<int64_t>(g, inverse.data);
}

}  // namespace LUTRA_NS
}  // namespace lutra
