// k nearest neighbours of packed bits, with selection inside the scan.
//
//   q (nq, b), x (n, b) uint8, contiguous: rows of 8 b bits.
//   hamming: score = |q ^ x|                       smaller is better
//   jaccard: score = 1 - |q & x| / |q | x|         smaller is better; 0 where both are empty; two fp32 roundings
//   scores (nq, k) fp32 (exact for hamming below 2^24 bits), ids (nq, k) int64: the k best, best first, equal scores
//   by increasing id. Where k > n the rest is id -1 and score +inf.
//   keep: null, or a bit for each row (little bit order): rows without it are passed over.
// Counts are integers, so that neither the level, nor the number of queries, nor of threads changes a result.
// Limits: reading x once (bandwidth) for one query; the vector units' popcounts for many.
//
// rescore_bits: asymmetric scores of given candidates. q (nq, d) fp32, x (n, b) uint8 with b = ceil(d / 8),
//   score = sum_j q_j * (bit j of x ? 1 : -1), larger is better; cand (nq, c) ids into x in increasing order, -1 is
//   skipped, equal neighbours count once; spare bits of a row's last byte are not looked at. *bad as in knn.h:
//   (2 << 40) + position of the first id outside [-1, n), or a row with a NaN score.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

enum class BinaryMetric : int { hamming = 0, jaccard = 1 };

struct BinaryArgs {
  const uint8_t* q;
  const uint8_t* x;
  int64_t nq, n, b, k;
  BinaryMetric metric;
  const uint8_t* keep;
  bool vpopcnt;  // the processor has AVX-512 VPOPCNTDQ (common/cpu.h), and the caller allows it
  float* scores;
  int64_t* ids;
};

struct RescoreBitsArgs {
  const float* q;
  const uint8_t* x;
  int64_t nq, n, d, b;
  const int64_t* cand;
  int64_t c, k;
  float* scores;
  int64_t* ids;
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(binary, ::lutra::BinaryArgs)
LUTRA_KERNEL(rescore_bits, ::lutra::RescoreBitsArgs)
#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {
int64_t binary_workspace(int64_t nq, int64_t n, int64_t b, int64_t k, const void* x, const Launch&);
int64_t rescore_bits_workspace(int64_t nq, int64_t c, int64_t k, const Launch&);
}  // namespace cuda
}  // namespace lutra
#endif
