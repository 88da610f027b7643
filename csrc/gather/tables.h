// One row out of each of several tables, weighted and summed: the second half of a MemoryFormer layer.
//
//   tables (n_tables, entries, dim) contiguous, f32 / f16 / bf16, or i8 codes with scale and minimum (n_tables,
//   entries) f32: row = minimum + scale * code; codes (tokens, n_tables) i32 in [0, entries);
//   weights (tokens, n_tables) f32 or nullptr (1); bias (dim,) of type out_dtype, or nullptr.
//   out[t] = bias + sum_k weights[t, k] * tables[k, codes[t, k]]      accumulated in f32, k in increasing order
//   out (tokens, dim) of type out_dtype: f32, f16 or bf16.
//   i8: sum of (weights * scale) * code, and at the end the sum of weights * minimum, both in that order.
//
// Few tokens (tables_rows.h): one pass over the rows, limited by random reads. Many tokens (tables_slabs.h): a slab of
// columns of one table is used for a block of tokens while it lies in the cache, so that each table is read about once
// per block. Both sum in one order: a token's result does not depend on the others.
//
// Gradients: grad_tables[k, c] = sum over t with codes[t, k] == c, in the order of t, of weights[t, k] grad_out[t]
// (written whole, or with `zeroed` in touched rows only; each table is one thread's work, so it is deterministic);
// grad_weights[t, k] = <grad_out[t], tables[k, codes[t, k]]>. Either may be nullptr. The bias' gradient is a plain
// column sum, left to the caller. *bad: position in codes of the first code outside [0, entries), or -1.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

struct TablesArgs {
  const void* tables;
  DType dtype;
  int64_t n_tables, entries, dim;
  const int32_t* codes;
  const float* weights;
  const void* bias;
  int64_t tokens;
  void* out;
  int64_t* bad;
  DType out_dtype;
  const float* scale;  // i8 only
  const float* minimum;
};

struct TablesBackwardArgs {
  const void* tables;
  DType dtype;
  int64_t n_tables, entries, dim;
  const int32_t* codes;
  const float* weights;
  int64_t tokens;
  const void* grad_out;
  void* grad_tables;
  float* grad_weights;
  int64_t* bad;
  DType grad_dtype;    // of grad_out and grad_tables; the tables' where these are not i8
  const float* scale;  // i8 only, which have no grad_tables
  const float* minimum;
  bool zeroed;  // grad_tables is zero already
};

}  // namespace lutra

LUTRA_KERNEL(tables, ::lutra::TablesArgs)
LUTRA_KERNEL(tables_backward, ::lutra::TablesBackwardArgs)
#ifdef LUTRA_CUDA_ENTRIES
#include "address/sign_hash.h"
namespace lutra {
namespace cuda {
// 0 where no workspace is needed (it may be nullptr then).
int64_t tables_workspace(int64_t tokens, int64_t n_tables, int64_t entries, int64_t dim, DType dtype, const Launch&);
int64_t tables_backward_workspace(const TablesBackwardArgs& a, const Launch&);  // looks at shapes, types and alignment

// sign_hash and tables. a.codes and a.weights are h's; with no more than kHashedInline tokens one launch does it all,
// and the four may be nullptr. The workspace is that of tables.
constexpr int64_t kHashedInline = 64;
void memory_linear(const SignHashArgs& h, const TablesArgs& a, const Launch&);
}  // namespace cuda
}  // namespace lutra
#endif
