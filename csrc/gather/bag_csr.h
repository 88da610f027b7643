// Bags of rows of a pruned table in compressed sparse rows.
//
//   Row r has the values[indptr[r] : indptr[r + 1]] in the columns[indptr[r] : indptr[r + 1]], each column once, zeros
//   elsewhere. indptr (rows + 1,) i32 or i64; columns (nnz,) of 1, 2 or 4 bytes, unsigned; values (nnz,) f32, f16,
//   bf16. Bags as in gather/bag.h, Mode::sum (weights may be nullptr) and Mode::mean. out (bags, dim) of the values'
//   type; sums are accumulated in f32, in the order of the ids.
//
//   bag_csr_backward: gradient of the values, from the plan of bag_sort. With `whole` all are written; else those of
//   touched rows only, and the others must be zero already. bag_csr_weight_grad: <grad_out[b], row(id_i)>, 0 at
//   padding_idx and for ids of no bag.
//
// *bad as in gather/bag.h, or kBadCsr for an indptr that decreases or leaves [0, nnz]. A column that is not below dim
// is dropped: nothing outside the arrays is touched whatever they hold. Limit: three random reads a row (indptr,
// columns, values), and one addition to memory a value.
#pragma once
#include "gather/bag.h"

namespace lutra {

constexpr int64_t kBadCsr = INT64_MIN;

struct CsrTable {
  const void* indptr;
  bool wide;  // indptr is i64
  const void* columns;
  int column_bytes;
  const void* values;
  DType dtype;
  int64_t rows, dim, nnz;
};

struct BagCsrArgs {
  BagIds bag;
  CsrTable table;
  const float* weights;  // (n_ids,) or nullptr
  void* out;
  int64_t* bad;
};

struct BagCsrBackwardArgs {
  CsrTable table;        // its values are not read
  const int64_t* order;  // the outputs of bag_sort
  const int64_t* starts;
  const int64_t* touched;
  const int32_t* bag_of;
  const float* bag_scale;  // Mode::mean, else nullptr
  const int64_t* count;
  const float* weights;
  const void* grad_out;  // (bags, dim), the values' type
  bool whole;
  void* grad_values;  // (nnz,)
  int64_t* bad;
};

struct BagCsrWeightGradArgs {
  BagIds bag;
  CsrTable table;
  const void* grad_out;
  float* grad_weights;  // (n_ids,)
  int64_t* bad;
};

}  // namespace lutra

LUTRA_KERNEL(bag_csr, ::lutra::BagCsrArgs)
LUTRA_KERNEL(bag_csr_weight_grad, ::lutra::BagCsrWeightGradArgs)
#ifdef LUTRA_CUDA_ENTRIES
namespace lutra {
namespace cuda {

// On CUDA ids are sorted in the same call.
struct CsrGradArgs {
  BagIds bag;
  CsrTable table;  // its values are not read
  const float* weights;
  const void* grad_out;  // (bags, dim), the values' type
  void* grad_values;     // (nnz,), whole
};
int64_t csr_grad_workspace(const CsrGradArgs& a, const Launch& l);
void csr_grad(const CsrGradArgs& a, const Launch& l);

}  // namespace cuda
}  // namespace lutra
#else
LUTRA_KERNEL(bag_csr_backward, ::lutra::BagCsrBackwardArgs)
#endif
