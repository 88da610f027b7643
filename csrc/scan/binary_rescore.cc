// Asymmetric rescoring: <q, signs> = 2 (sum of q where the bit is set) - (sum of q), candidates one after another
// with the next rows already being fetched. Limit: random reads of rows.
#include "scan/binary.h"

#include "common/parallel.h"
#include "common/select.h"
#include "common/simd.h"

namespace lutra {
namespace LUTRA_NS {
namespace {

// The sum of q[j] over the set bits of b bytes, an even number of them. Two running sums of 8 values, whatever the
// width of a vector: sixteen lanes are two of eight.
LUTRA_INLINE float sum_of_set(const float* q, const uint8_t* x, int64_t b) {
#if defined(LUTRA_LEVEL_v4)
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < b; j += 2) {
    uint16_t bits;
    memcpy(&bits, x + j, 2);
    sum = _mm512_mask_add_ps(sum, bits, sum, _mm512_loadu_ps(q + j * 8));
  }
  return _mm512_reduce_add_ps(sum);
#else
  constexpr int kParts = 16 / W;
#if defined(LUTRA_LEVEL_v3)
  const vi lane = {1, 2, 4, 8, 16, 32, 64, 128};
#else
  const vi lane = {1, 2, 4, 8};
#endif
  vf sum[kParts] = {};
  for (int64_t j = 0; j < b; j += 2)
    for (int p = 0; p < kParts; ++p) {
      const vi bits = (vi){} + (x[j + p * W / 8] >> (p * W % 8));
      sum[p] += (vf)((vi)load(q + j * 8 + p * W) & (vi)((bits & lane) != (vi){}));
    }
  for (int p = 1; p < kParts; ++p) sum[0] += sum[p];
  return reduce_add(sum[0]);
#endif
}

int64_t one_query(const RescoreBitsArgs& a, int64_t i, float* q, uint8_t* row, float* keys, int64_t* who,
                  int64_t capacity) {
  const int64_t even = a.b / 2 * 2;
  int64_t bad = -1;
  double total = 0;
  for (int64_t j = 0; j < a.d; ++j) total += q[j] = a.q[i * a.d + j];
  TopK best;
  topk_start(&best, a.k, capacity, keys, who);
  const int64_t* cand = a.cand + i * a.c;
  for (int64_t j = 0; j < a.c; ++j) {
    const int64_t id = cand[j];
    if (id < -1 || id >= a.n) return (static_cast<int64_t>(2) << 40) + i * a.c + j;
    if (id < 0 || (j > 0 && id == cand[j - 1])) continue;
    constexpr int64_t kAhead = 8;
    if (j + kAhead < a.c && cand[j + kAhead] >= 0 && cand[j + kAhead] < a.n)
      for (int64_t at = 0; at < a.b; at += 64) __builtin_prefetch(a.x + cand[j + kAhead] * a.b + at);
    const uint8_t* x = a.x + id * a.b;
    float set = sum_of_set(q, x, even);
    if (even < a.b) {
      row[0] = x[even];
      set += sum_of_set(q + even * 8, row, 2);
    }
    const float score = static_cast<float>(2.0 * set - total);
    if (score != score) {
      if (bad < 0) bad = id;
      continue;
    }
    topk_push(&best, score, id);
  }
  TopK* part = &best;
  topk_finish(&part, 1, a.k, 1.0f, a.scores + i * a.k, a.ids + i * a.k);
  return bad;
}

}  // namespace

void rescore_bits(const RescoreBitsArgs& a) {
  const int64_t capacity = topk_capacity(a.k, a.c);
  Buffer<int64_t> bad(a.nq);
  const double cost = static_cast<double>(a.nq) * a.c * (a.b * 0.4 + 15);
  const int64_t grain = 1 + 1024 / (1 + a.c);
  parallel_ranges(a.nq, grain, cost, [&](int64_t begin, int64_t end) {
    const int64_t padded = (a.b + 3) * 8;
    Buffer<float> q(padded);  // zeros behind the last value: what the last byte's spare bits hold does not matter
    uint8_t row[2] = {0, 0};
    Buffer<float> keys(capacity);
    Buffer<int64_t> who(capacity);
    memset(q.data, 0, padded * sizeof(float));
    for (int64_t i = begin; i < end; ++i) bad[i] = one_query(a, i, q.data, row, keys.data, who.data, capacity);
  });
  for (int64_t i = 0; i < a.nq && *a.bad < 0; ++i) *a.bad = bad[i];
}

}  // namespace LUTRA_NS
}  // namespace lutra
