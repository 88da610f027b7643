// Exact k nearest neighbours with selection inside the scan.
//
//   q (nq, d) fp32, x (n, d) of type `storage`, row strides ldq, ldx in elements. Sums are fp32.
//   ip:       score = <q, x>                    larger is better
//   l2:       score = sum (q - x)^2             smaller is better; computed from differences, not from norms
//   cosine:   score = <q, x> / (|q| |x|)        larger is better; 0 where either has norm 0
//   l1, linf: score = sum, max |q - x|          smaller is better
//   poincare: arcosh(1 + 2 |q - x|^2 / ((1 - |q|^2) (1 - |x|^2)))  smaller is better; NaN outside the open unit ball.
//             The norms and the last step are fp64.
//   scores, ids (nq, k): the k best, best first, equal scores by increasing id. Where k > n the rest is
//   id -1 and score -inf (ip, cosine) or +inf (distances).
//   keep: bit (i & 7) of byte i >> 3 says whether row i may be found; the bits behind n are 0. Null: all may.
//   assign: k = 1 may be answered in another order of summation (best_one.h), whose scores differ in their last bits.
// No score matrix is written: a tile of queries and rows is held in registers, compared with each query's
// current k-th score, and only what passes is kept. On the CPU a score has the same bits whatever the batch, the
// threads or the function (knn, range, rescore): exact.h.
// *bad: a row of x whose score is NaN (x or q holds NaN or infinities), or -1; the results are then unspecified.
// Limits: reading x once (bandwidth) for few queries; 2 nq n d flops (FMA rate) for many.
//
// rescore: the same for given candidates: cand (nq, c) ids into x, -1 is skipped, duplicates count once;
// *bad: position in cand of the first id >= n or < -1 as (2 << 40) + position, or a row with a NaN score.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct KnnArgs {
  const float* q;
  const float* x;
  int64_t nq, n, d, ldq, ldx, k;
  Metric metric;
  float* scores;
  int64_t* ids;
  int64_t* bad;
  DType storage = DType::f32;
  const uint8_t* keep = nullptr;
  bool assign = false;
  const float* bias = nullptr;  // (n,), added to each row's score; ip only, and on the CPU without `keep`
  bool bf16_queries = false;    // CUDA: bf16 holds the queries' values
};

struct RescoreArgs {
  const float* q;
  const float* x;
  int64_t nq, n, d, ldq, ldx;
  const int64_t* cand;
  int64_t c, k;
  Metric metric;
  float* scores;
  int64_t* ids;
  int64_t* bad;
  DType storage = DType::f32;
};

}  // namespace lutra

LUTRA_KERNEL(knn, ::lutra::KnnArgs)
LUTRA_KERNEL(rescore, ::lutra::RescoreArgs)
#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {
// For tests: whether kernels for Hopper are used there, and from how many rows on the screen is (0: as usual).
void knn_paths(bool sm90, int64_t screen_rows);
// Of sizes, metric and storage; plain: of a call with neither keep nor bias.
int64_t knn_workspace(const KnnArgs&, bool plain, const Launch&);
int64_t rescore_workspace(int64_t nq, int64_t c, int64_t d, int64_t k, Metric, const Launch&);
}  // namespace cuda
}  // namespace lutra
#endif
