// MUVERA's fixed dimensional encodings of sets of vectors (Dhulipala et al. 2024, arXiv 2405.19504).
//
//   tokens (n, d); document i has the rows ptr[i] .. ptr[i + 1]
//   For each repetition r and partition p of 2^k_sim (numbers and bits as in simhash.h):
//     block = scale * (sum of the document's tokens there) psi_r      (query)
//           = that divided by their number                            (document)
//   psi (repetitions, d, ld_psi) f32 of which `width` columns count, zeros behind; nullptr: no projection, width = d.
//   fill (documents only): a block without tokens takes scale * (token) psi_r of the token of the document whose bits
//   differ from those of p in the fewest places, the first on ties. A document without tokens is zeros.
//
//   out (documents, repetitions 2^k_sim width), or with final_map (one entry a value of that) a count-sketch of it,
//   (documents, final_dim): value j is added to output final_map[j] & 0x7fffffff, negated where bit 31 is set.
//   out == nullptr: the blocks of queries that have tokens: those of row i are row_ptr[i] and on, `blocks` (numbers
//   r 2^k_sim + p, rising) and `values` (.., width). fde_count says how many.
//
// partitions (n, repetitions): from simhash, or nullptr: computed here from planes (d, repetitions * k_sim).
//
// All fp32. First the tokens of a partition are summed, then the blocks that have tokens are projected (both are
// linear; a partition of one token is that token). Sums run in the order of the tokens, products in that of the
// dimensions; documents are spread over threads: the bits depend on nothing but the document.
// *bad receives the first token that holds NaN or infinity, or -1; then out is unspecified.
// Limit: the FMA rate, 2 d repetitions k_sim operations a token for partitions, 2 d width for a block with tokens.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct FdeArgs {
  const void* tokens;
  DType dtype;  // f32, f16, bf16
  int64_t n, d;
  const int64_t* ptr;  // (documents + 1,), rising from 0 to n
  int64_t documents;
  const float* planes;
  int64_t repetitions;
  int k_sim;  // 0 .. 16
  const float* psi;
  int64_t width, ld_psi;  // ld_psi: a multiple of 16
  float scale;
  bool query, fill;
  const int32_t* final_map;  // or nullptr
  int64_t final_dim;
  float* out;
  const int32_t* partitions;
  const int64_t* row_ptr;
  int32_t* blocks;
  float* values;
  int64_t* bad;
};

struct FdeCountArgs {
  const int32_t* partitions;  // (n, repetitions)
  const int64_t* ptr;
  int64_t documents, repetitions;
  int k_sim;
  int64_t* counts;  // (documents,): blocks with tokens
};

}  // namespace lutra

LUTRA_KERNEL(fde, ::lutra::FdeArgs)
LUTRA_KERNEL(fde_count, ::lutra::FdeCountArgs)

#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {
// The CUDA kernel writes dense encodings only, without final_map, for k_sim <= 11; it computes the partitions itself,
// in this many bytes.
int64_t fde_workspace(int64_t n, int64_t repetitions);
}  // namespace cuda
}  // namespace lutra
#endif
