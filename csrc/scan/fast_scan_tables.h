// A query's tables: made, rounded to bytes, laid out as the tiles read them.
#pragma once
#include "common/select.h"
#include "common/simd.h"
#include "scan/fast_scan.h"
#include "scan/fast_scan_tiles.h"

namespace lutra {
namespace LUTRA_NS {
namespace fast_scan_tables {

using fast_scan_tiles::kGroupTables;

struct Query {
  const uint8_t* table;
  float step, per, least;  // sum = least + step * (sum of entries), in keys; per = 1 / step
  Candidates best;
};

static inline float order_of(const FastScanArgs& a) { return a.metric == Metric::l2 ? -1.0f : 1.0f; }
static inline int64_t groups_of(int64_t m) { return (m + 7) / 8; }

static inline void float_tables(const FastScanArgs& a, int64_t i, float* out) {
  const float sign = order_of(a);
  if (a.tables) {
    const float* t = a.tables + i * a.m * 16;
    for (int64_t e = 0; e < a.m * 16; ++e) out[e] = sign * t[e];
    return;
  }
  const float* q = a.queries + i * a.ldq;
  for (int64_t j = 0; j < a.m; ++j)
    for (int c = 0; c < 16; ++c) {
      const float *book = a.codebooks + (j * 16 + c) * a.dsub, *qj = q + j * a.dsub;
      float sum = 0;
      if (a.metric == Metric::l2)
        for (int64_t s = 0; s < a.dsub; ++s) sum -= (qj[s] - book[s]) * (qj[s] - book[s]);
      else
        for (int64_t s = 0; s < a.dsub; ++s) sum += qj[s] * book[s];
      out[j * 16 + c] = sum;
    }
}

// Place of entry 0 of look-up j.
static inline int64_t place(int64_t j) { return j / 8 * kGroupTables + j % 8 * 16; }

// False where a table is not finite.
static inline bool round_tables(const float* t, int64_t m, uint8_t* out, Query* query) {
  const int64_t padded = groups_of(m) * 8;
  float widest = 0, least = 0, range[8];
  for (int64_t j0 = 0; j0 < padded; j0 += 8) {
    for (int i = 0; i < 8; ++i) {
      range[i] = 0;
      if (j0 + i >= m) continue;
      const float* tj = t + (j0 + i) * 16;
      float low = tj[0], high = tj[0];
      for (int c = 1; c < 16; ++c) {
        low = tj[c] < low ? tj[c] : low;
        high = tj[c] > high ? tj[c] : high;
      }
      range[i] = high - low;
      least += low;
    }
    for (int i = 0; i < 4; ++i) widest = range[i] + range[i + 4] > widest ? range[i] + range[i + 4] : widest;
  }
  float all = 0;  // a NaN fails every comparison above: it is looked for by itself
  for (int64_t e = 0; e < m * 16; ++e) all += t[e] * 0.0f;
  if (all != 0 || !(widest < __builtin_inff()) || least * 0.0f != 0) return false;
  const float step = widest > 0 ? widest / 254 : 1.0f, per = 1 / step;
  for (int64_t j = 0; j < padded; ++j) {
    uint8_t* to = out + place(j);
    if (j >= m) {
      for (int c = 0; c < 16; ++c) to[c] = 0;
      continue;
    }
    const float* tj = t + j * 16;
    float low = tj[0];
    for (int c = 1; c < 16; ++c) low = tj[c] < low ? tj[c] : low;
    for (int c = 0; c < 16; ++c) to[c] = static_cast<uint8_t>((tj[c] - low) * per + 0.5f);
  }
  query->table = out;
  query->step = step;
  query->per = per;
  query->least = least;
  return true;
}

}  // namespace fast_scan_tables
}  // namespace LUTRA_NS
}  // namespace lutra
