// Asymmetric distance computation over product-quantized codes (Jegou, Douze, Schmid 2011), with selection.
//
//   q (nq, m * dsub) fp32; codes (n, m) u8, each < ksub; codebooks (m, ksub, dsub) fp32, ksub <= 256.
//   table[j][c] = <q_j, codebooks[j][c]> (ip) or |q_j - codebooks[j][c]|^2 (l2);  score_i = sum_j table[j][codes[i][j]]
//   in fp32, j in increasing order. Metric::cosine is not for codes: normalise first.
//   scores, ids (nq, k) and padding as in knn.h. *bad: a row of codes with a code >= ksub or a NaN score, or -1.
// Limit: table look-ups. Alone, a query takes one look-up per code; in a batch the tables of W queries are
// interleaved (W floats a code), so that one vector load and one add serve W queries.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct PqArgs {
  const float* q;
  const uint8_t* codes;
  const float* codebooks;
  int64_t nq, n, ldq, k;
  int64_t m, ksub, dsub;
  Metric metric;
  float* scores;
  int64_t* ids;
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(pq, ::lutra::PqArgs)
#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {
int64_t pq_workspace(int64_t nq, int64_t n, int64_t m, int64_t ksub, int64_t k, const Launch&);
// For tests: from how many look-ups on tables that fit are taken in slabs, and how many queries a launch has at most
// (0: as usual).
void pq_paths(int64_t wide, int64_t queries);
}  // namespace cuda
}  // namespace lutra
#endif
