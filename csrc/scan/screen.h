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
//
// On CUDA (screen.cu) the bound is the same, but bars come from a sample and the rows that pass are scored afterwards;
// a row that cannot be coded (*bad) has an inverse of nearly 0 there, and every search scores it. screen_encode reads x
// of type `storage`; screen_mean makes the mean and begins the bounds. *bad, where it is asked for, starts at 2^63 - 1.
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
  DType storage = DType::f32;   // CUDA: of x
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
#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
struct ScreenMeanArgs {
  const void* x;
  DType storage;
  int64_t n, d, ldx, step;  // the mean is that of every step-th row
  bool normalize;
  float* mean;
  float* bounds;  // become 0
};
namespace cuda {
void screen_mean(const ScreenMeanArgs&, const Launch&);
int64_t screen_mean_workspace(int64_t n, int64_t d, int64_t step, bool normalize);
// Of sizes, metric and dtype; plain: of a call with neither keep nor bias.
int64_t screen_workspace(const ::lutra::ScreenArgs&, bool plain, const Launch&);
// For tests: from how many rows on the screen is used (0: as usual), and how many candidates a query may have.
void screen_paths(int64_t rows, int64_t capacity);
}  // namespace cuda
}  // namespace lutra
#endif
