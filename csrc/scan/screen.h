// Exact search behind a screen: an int8 copy of the collection is scanned, and rows that it cannot rule out are scored
// exactly, in the same pass.
//
//   x (n, d) fp32; x' = x - mean, or x / |x| - mean where `normalize` (cosine); any mean will do, that of the rows
//   makes the codes finest. Each row has codes and a scale of its own (int8.h):
//   codes (ceil(n / 16), ceil(d / 4), 16, 4) uint8: code + 128; dimensions and rows that are not there: 128
//   inverse (16 ceil(n / 16),): 1 / scale;  half: |x'|^2 / (2 scale), or with a bias -bias / scale
//   bounds (4,), over all rows: the largest lost / scale, |code|, |x| and |x'|: what the codes can be wrong by.
//
// With A = <q, x'> (ip, cosine) or <q', x'> - |x'|^2 / 2 (l2, q' = q - mean), which order the rows as the metric does,
// the screen knows A to within margin(q) * scale: the bound of Cauchy-Schwarz (int8.h), and what fp32 can be wrong by
// besides. A row is scored exactly where A + margin * scale reaches the k-th best exact score so far. So no neighbour
// is missed: the results are those of knn, but for the last bits of scores, which are summed in another order. The
// threshold is exact, and close to its last value early on: some hundreds of a million rows pass it.
// Limits: reading d bytes a row (few queries), 64 products an instruction (many), and the rows that pass.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct ScreenEncodeArgs {
  const float* x;
  int64_t n, d, ldx, first;  // the rows are number `first` and on of the collection
  const float* mean;
  bool normalize;
  uint8_t* codes;  // of the whole collection, as the others
  float* inverse;
  float* half;
  float* bounds;                // made larger where these rows need it
  int64_t* bad;                 // the first row with NaN or infinities, or whose norm overflows; or -1
  const float* bias = nullptr;  // of these rows: the codes are for scores <q, x> + bias; |bias| <= 1e6
};

struct ScreenArgs {
  const float* q;
  const void* x;  // the exact rows
  DType dtype;    // of x: f32, f16, bf16, i8, u8
  int64_t nq, n, d, ldq, ldx, k;
  Metric metric;  // ip, l2, cosine; the codes must be normalized for cosine, and for it alone
  const uint8_t* codes;
  const float* inverse;
  const float* half;
  const float* mean;
  const float* bounds;
  const uint8_t* keep;  // packed bits over rows, or null
  bool vnni;            // may be used
  float* scores;
  int64_t* ids;
  int64_t* passed;  // how many rows were scored exactly, over all queries
  int64_t* bad;     // a row with a NaN score, -1, or -2: scores that leave fp32; nothing is computed, use knn
  const float* bias = nullptr;  // (n,): that of the codes; metric ip
};

}  // namespace lutra

LUTRA_KERNEL(screen_encode, ::lutra::ScreenEncodeArgs)
LUTRA_KERNEL(screen, ::lutra::ScreenArgs)
