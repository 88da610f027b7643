// MaxSim: scores of late interaction, with the maxima inside the product.
//
//   score(i, j) = sum over tokens t of query i of max over tokens p of document j of <t, p>
//   Queries: rows [q_ptr[i], q_ptr[i + 1]) of q (q_rows, d), documents: rows [x_ptr[j], x_ptr[j + 1]) of x, row strides
//   ldq, ldx in elements. Rows whose mask byte is 0 do not exist. Maxima start at -inf: a document without tokens
//   scores -inf, a query without tokens 0. No row of similarities is written.
//   x: f32; f16, bf16 (converted to fp32 as they are read; bf16 times bf16 as it is where the CPU has AVX512-BF16);
//   i8 with a scale a row (or none): with AVX512-VNNI products of integers, float queries then being rounded to 16 bits
//   of their token's largest value; without it, and where a query is not finite, converted to fp32. u8: residual codes,
//   row p = centroids[centroid_ids[p]] + values[code of each dimension], over its norm where `unit` says so; the code
//   of dimension j is bits [j bits, (j + 1) bits) of a row, lowest first; bits 1, 2, 4 or 8; values (2^bits,). Without
//   candidates (cand null) the columns are the documents; otherwise the places of cand (nq, c), ids of documents, -1:
//   score -inf. k = 0: scores (nq, columns). k > 0: scores, ids (nq, k), the k best, equal scores by increasing id,
//   padded with -inf and -1; a candidate that is named twice counts once. argmax (columns, q_rows) or null: the row of
//   x that gives each query token's maximum, the lowest of equals; -1 where there is none. With k = 0 only. Sums: a
//   product in the order of d (fp32, one rounding a step where the level has FMA), a score in the order of the query's
//   tokens (CUDA: maxsim_stream.cuh says in which). So a score has the same bits whatever else is in the call, whatever
//   the threads. bad[0]: what is wrong (Bad), bad[1]: where; the results are then unspecified.
// Limits: 2 (query tokens) (document tokens) d operations at the FMA rate (vpdpbusd: twice the bytes, four times the
// products; vdpbf16ps: twice the products); for few query tokens reading x once.
//
// maxsim_backward: from grad (nq, columns) and argmax, to_q (q_rows, d) and to_x (x_rows, d), fp32, either may be null:
//   to_q[t] = sum over columns of grad x[argmax], to_x[r] = sum over pairs and tokens whose argmax is r of grad q[t],
//   in the order of columns, or of queries and their tokens: no atomics, the same bits whatever the threads. With
//   candidates `order` holds the places of cand sorted by document (then by place), and first (documents + 1) where
//   each document's places begin in it. x: f32, f16, bf16.
#pragma once
#include "common/levels.h"
#include "common/types.h"

namespace lutra {

enum class MaxsimBad : int64_t { none = 0, nan = 1, query_ptr = 2, doc_ptr = 3, candidate = 4, centroid = 5 };

struct MaxsimArgs {
  const void* q;
  DType q_type;  // f32, f16, bf16, or i8 with x of i8
  int64_t ldq;
  const int64_t* q_ptr;
  const uint8_t* q_mask;  // (q_rows,) or null
  int64_t nq, q_rows;
  const void* x;
  DType x_type;
  int64_t ldx;
  const int64_t* x_ptr;
  const uint8_t* x_mask;  // (x_rows,) or null
  const float* x_scale;   // (x_rows,) or null; i8
  int64_t documents, x_rows, d;
  const int32_t* centroid_ids;  // u8
  const float* centroids;       // (centroid_count, d)
  const float* values;
  int64_t centroid_count;
  int bits;
  bool unit;
  const int64_t* cand;  // (nq, c) or null
  int64_t c, k;
  float* scores;
  int64_t* ids;
  int32_t* argmax;
  int64_t* bad;  // 2 values
};

struct MaxsimBackwardArgs {
  const float* grad;
  const void* q;
  DType q_type;
  int64_t ldq;
  const int64_t* q_ptr;
  int64_t nq, q_rows;
  const void* x;
  DType x_type;
  int64_t ldx;
  const int64_t* x_ptr;
  int64_t documents, x_rows, d;
  const int32_t* argmax;
  int64_t columns;
  const int64_t* order;  // or null: all pairs
  const int64_t* first;
  float* to_q;
  float* to_x;
  bool* good;  // false: offsets fall or do not end at the rows; nothing is written then
};

}  // namespace lutra

LUTRA_KERNEL(maxsim, ::lutra::MaxsimArgs)
LUTRA_KERNEL(maxsim_backward, ::lutra::MaxsimBackwardArgs)

#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {
int64_t maxsim_workspace(int64_t nq, int64_t columns, int64_t k, const Launch&);  // bytes
}
}  // namespace lutra
#endif
