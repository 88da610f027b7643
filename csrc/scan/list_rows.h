// Exact scores of the rows of inverted lists (IVFFlat), with selection inside.
//
//   q (nq, d) fp32, row stride ldq. The rows of a block of 16 are interleaved: value j of row r of the arena is
//   x[((r / 16) * d + j) * 16 + r % 16], of type fp32, fp16, bf16 or i8. Lists, probes, positions, keep: lists.h.
//   ip: score = <q, x>; l2: score = sum (q - x)^2, from differences; in fp32, j in increasing order. Metric::cosine is
//   not for lists: normalise both sides first.
//   scores, ids (nq, k) and padding as in knn.h, ids being positions.
// A vector holds one value of W rows, the query's value is broadcast: scores come out in lanes and need no reduction,
// and a group of rows is multiplied with all queries of the batch that probe its list while it is in the L1.
// Limits: reading the probed lists once for a batch (bandwidth); 2 d flops a row and query.
#pragma once
#include "scan/lists_args.h"

namespace lutra {

struct ListRowsArgs {
  ListsArgs lists;
  const float* q;
  int64_t ldq, d;
  const void* x;
  DType dtype;
};

}  // namespace lutra

LUTRA_KERNEL(list_rows, ::lutra::ListRowsArgs)
