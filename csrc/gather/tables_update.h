// An optimizer's step on the rows of several tables that codes touched, in place: no gradient of a table is written.
//
//   g[k, c] = sum over t with codes[t, k] == c, in the order of t, of weights[t, k] grad[t]      (see tables.h)
//   and for each such row the rule of row_update.h. step.table is (n_tables * entries, dim), its state as there;
//   step.grad is (tokens, dim) of step.grad_dtype. The other arrays of step are not used.
//   squares != nullptr: nothing is updated; squares[k] = the sum of the squares of g[k].
//
// *step.bad: position in codes of the first code outside [0, entries), or -1.
// Limit: reading and writing the touched rows and their state; with many tokens the additions, whose gradients lie in
// the second-level cache (see tables_segments.h).
#pragma once
#include "gather/row_update.h"

namespace lutra {

struct TablesUpdateArgs {
  RowUpdateArgs step;
  int64_t n_tables, entries, tokens;
  const int32_t* codes;
  const float* weights;  // or nullptr: 1
  double* squares;
};

}  // namespace lutra

LUTRA_KERNEL(tables_update, ::lutra::TablesUpdateArgs)
#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {
// Shapes, types and alignment as in tables_update. 0: the call is not served (few tokens, or gradients of another type
// than the tables).
int64_t tables_update_workspace(const TablesUpdateArgs&, const Launch&);
}  // namespace cuda
}  // namespace lutra
#endif
