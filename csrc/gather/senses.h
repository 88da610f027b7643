// Senses: of the several rows of a token, the one whose inner product with a context vector is the largest.
//
//   table (total, dim). The senses of token x are the rows [offsets[x], offsets[x+1]), or with offsets == nullptr
//   [x * each, (x + 1) * each).
//   score_l = sum_j float(table[l][j]) * float(context_i[j]) in f32
//   best_i  = the row of the largest score, the lowest among equals; a NaN score wins, the first one
//   out_i   = table[best_i], scores_i = its score
//
// The scores of a row are summed in an order that depends on dim and the level only. Nothing of size
// (n, senses, dim) is written.
// bad[0] receives the position of the first id outside [0, tokens), bad[1] that of the first whose token has no sense
// or offsets that leave the table; -1 where there is none. Otherwise the results are unspecified.
// Limit: reading the senses, senses * dim values a token, in blocks that lie together.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct SensesArgs {
  const void* table;
  DType dtype;  // f32, f16, bf16: of table, context and out
  int64_t total, dim, tokens;
  const int64_t* offsets;  // (tokens + 1,) or nullptr
  int64_t each;
  const void* ids;
  DType id_type;  // i32 or i64
  int64_t n;
  const void* context;  // (n, dim)
  void* out;            // (n, dim)
  int64_t* best;        // (n,)
  float* scores;        // (n,)
  int64_t* bad;         // (2,): the first bad id, the first token without senses
};

}  // namespace lutra

LUTRA_KERNEL(senses, ::lutra::SensesArgs)
