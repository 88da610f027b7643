// Sums of look-ups over packed codes, written out or selected: the logits of a head tied to a table of codes.
//
//   tables: entry c of look-up j of token t at tables[t st + j sj + c], c < 2^bits, fp32
//   codes (n, row_bytes): code j is bits [j bits, (j + 1) bits) of a row, the lowest of a byte first; bits 1 to 8
//   out[t ldo + i] = bias[i] + sum_j tables[t][j][code(i, j)]         of type `dtype` (f32, f16, bf16); bias fp32 or
//   null k > 0: nothing is written out; scores, ids (tokens, k): the k largest of each token, largest first, equal ones
//   by
//     increasing row. A NaN sets *bad to its row; the results are then unspecified.
//
// With AVX512_VBMI the tables are rounded to integers on one scale a token, of 24 bits (16 where the result has 16 bits
// itself), looked up a byte at a time, 64 rows in a register, and summed exactly: an entry is off by half of
// R 2^-24 (R 2^-16), R being the largest range of a table; sums of m by about sqrt(m / 12) of that step. Elsewhere, and
// for tokens whose tables hold NaN or infinities, in fp32, j in increasing order. Limit: 7 vector instructions for 64
// look-ups of a byte of an entry (2 of them permutations); codes are read once for all tokens, and put column by column
// in the L1.
//
// lookups_backward: grad of the tables, grad_tables[t st + j sj + c] (+)= sum over i with code(i, j) = c of
// grad[t ldg + i], in fp32, i in increasing order: the same bits whatever the number of threads. (On CUDA, stretches of
// rows are summed so, then the stretches.)
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct LookupsArgs {
  const float* tables;
  int64_t st, sj, tokens, m;
  int bits;
  const uint8_t* codes;
  int64_t n, row_bytes;
  const float* bias;
  void* out;
  DType dtype;
  int64_t ldo, k;
  float* scores;
  int64_t *ids, *bad;
};

struct LookupsBackwardArgs {
  const void* grad;
  DType dtype;
  int64_t ldg, tokens, m;
  int bits;
  const uint8_t* codes;
  int64_t n, row_bytes;
  float* grad_tables;
  int64_t st, sj;
  bool accumulate;
};

}  // namespace lutra

LUTRA_KERNEL(lookups, ::lutra::LookupsArgs)
LUTRA_KERNEL(lookups_backward, ::lutra::LookupsBackwardArgs)
#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {
int64_t lookups_backward_workspace(int64_t tokens, int64_t m, int bits, int64_t n, const Launch&);
// The longest rows of codes of 1, 2, 4 or 8 bits whose tables have room in a device's shared memory.
int64_t lookups_row_bytes(int device);
int64_t lookups_workspace(int64_t tokens, int64_t n, int bits, int64_t row_bytes, int64_t k, const Launch&);
}  // namespace cuda
}  // namespace lutra
#endif
